"""What a model writes after a prompt, and whether a naive Bayes classifier takes it for the prompt's domain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.naive_bayes import MultinomialNB
from sklearn.pipeline import Pipeline, make_pipeline

from pager.engine.loading import PagedModel
from pager.types import PoolPolicy

WORDS_AND_SIGNS = r"\w+|[^\w\s]"


@dataclass(frozen=True, slots=True)
class Sampling:
    """Plain sampling: nothing is cut off the distribution."""

    num_tokens: int = 128
    temperature: float = 1.0
    seed: int = 0
    batch_rows: int = 64


@torch.inference_mode()
def sample(paged: PagedModel, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
    """Continuations of prompts of one length, with all experts; an end of text does not end them."""
    torch.manual_seed(sampling.seed)
    continued: list[list[int]] = []
    for start in range(0, len(prompts), sampling.batch_rows):
        inputs = torch.tensor([list(prompt) for prompt in prompts[start : start + sampling.batch_rows]])
        inputs = inputs.to(paged.device)
        with paged.step([paged.document(PoolPolicy())], prefill=True):
            output: Any = paged.model.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                do_sample=True,
                temperature=sampling.temperature,
                top_k=0,
                top_p=1.0,
                min_new_tokens=sampling.num_tokens,
                max_new_tokens=sampling.num_tokens,
            )
        continued += output[:, inputs.shape[1] :].tolist()
    return continued


def domain_classifier(texts: Sequence[str], domains: Sequence[str]) -> Pipeline:
    """Multinomial naive Bayes over counts of words and signs; every domain is as likely beforehand."""
    counts = CountVectorizer(token_pattern=WORDS_AND_SIGNS, lowercase=False, min_df=2)
    classifier = make_pipeline(counts, MultinomialNB(alpha=0.1, fit_prior=False))
    return classifier.fit(list(texts), list(domains))


def recognised(classifier: Pipeline, texts: Sequence[str], domains: Sequence[str]) -> np.ndarray:
    """bool [N]: does the classifier name the text's domain?"""
    return np.asarray(classifier.predict(list(texts)) == np.asarray(domains))
