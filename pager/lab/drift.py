"""What it costs when a text changes its domain under a pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.naive_bayes import MultinomialNB
from sklearn.pipeline import Pipeline, make_pipeline
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from pager.engine.paged_model import PagedModel
from pager.errors import InvalidRequest
from pager.lab.corpus import Text, domains_of
from pager.pools.document import DocumentRouting
from pager.pools.widening import answer_drift
from pager.types import DriftReport, PoolPolicy

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


CHUNK_TOKENS = 4


@dataclass(frozen=True, slots=True)
class ChangingText:
    """A text of one domain up to `changes_at` and of another from there on; its first tokens choose the pool."""

    token_ids: tuple[int, ...]
    prompt_tokens: int
    changes_at: int
    domains: tuple[str, str]


@dataclass(frozen=True, slots=True)
class Reading:
    """One text read under one policy. Nats are added up over the predictions of the tokens after the prompt."""

    nats: np.ndarray  # [tokens after the prompt]
    num_unchanged: int  # of them, those before the change
    bytes_paged: int
    pool_experts: int | None  # in all layers, at the end; None without a pool
    report: DriftReport | None

    @property
    def loss(self) -> float:
        """Mean nats a token after the prompt."""
        return float(self.nats.mean())

    @property
    def loss_after_change(self) -> float:
        return float(self.nats[self.num_unchanged :].mean())


def changing_texts(
    texts: Sequence[Text], num_tokens: int, *, prompt_tokens: int = 64, in_prompt: bool = False, step: int = 1
) -> list[ChangingText]:
    """A pair for every domain and document of it that is long enough: it goes on as one of the domain `step` further.

    The halves have `num_tokens / 2` each; with `in_prompt` the change comes in the middle of the prompt instead.
    Raises InvalidRequest where no two domains have documents that long.
    """
    changes_at = prompt_tokens // 2 if in_prompt else num_tokens // 2
    rest = num_tokens - changes_at
    domains = domains_of(texts)
    enough = {
        domain: [text for text in texts if text.domain == domain and len(text.token_ids) >= max(changes_at, rest)]
        for domain in domains
    }
    domains = [domain for domain in domains if enough[domain]]
    if len(domains) < 2:
        raise InvalidRequest(f"fewer than two domains have documents of {max(changes_at, rest)} tokens")
    pairs = []
    for place, domain in enumerate(domains):
        other = domains[(place + step) % len(domains)]
        if other == domain:
            continue
        for number, first in enumerate(enough[domain]):
            second = enough[other][number % len(enough[other])]
            ids = (*first.token_ids[:changes_at], *second.token_ids[:rest])
            pairs.append(ChangingText(ids, prompt_tokens, changes_at, (domain, other)))
    return pairs


def read(
    paged: PagedModel, texts: Sequence[ChangingText], policy: PoolPolicy, *, chunk_tokens: int = CHUNK_TOKENS
) -> list[Reading]:
    """Reads the texts one after the other, paging on demand; the cache of experts goes on from text to text.

    Raises what `PagedModel.document` raises.
    """
    return [_read(paged, text, paged.document(policy), chunk_tokens) for text in texts]


@torch.inference_mode()
def _read(paged: PagedModel, text: ChangingText, document: DocumentRouting, chunk_tokens: int) -> Reading:
    cache = DynamicCache(config=paged.model.config)
    before, prompt = _bytes_paged(paged), text.prompt_tokens
    ids = torch.tensor([text.token_ids], device=paged.device)
    next_V, nats = _forward(paged, document, cache, ids[:, :prompt], prefill=True)[-1], []
    for chunk in ids[:, prompt:].split(chunk_tokens, dim=1):
        logits_SV = _forward(paged, document, cache, chunk)
        nats.append(cross_entropy(torch.cat([next_V[None], logits_SV[:-1]]), chunk[0], reduction="none"))
        next_V = logits_SV[-1]
        answer_drift(document)
    return Reading(
        nats=torch.cat(nats).double().cpu().numpy(),
        num_unchanged=max(0, text.changes_at - prompt),
        bytes_paged=_bytes_paged(paged) - before,
        pool_experts=document.pool.num_experts if document.pool is not None else None,
        report=document.monitor.report() if document.monitor is not None else None,
    )


def _forward(
    paged: PagedModel, document: DocumentRouting, cache: DynamicCache, ids_1S: Tensor, *, prefill: bool = False
) -> Tensor:
    """[S, V] logits."""
    with paged.step([document], prefill=prefill):
        logits_1SV: Tensor = paged.model(input_ids=ids_1S, past_key_values=cache, use_cache=True).logits
    return logits_1SV[0].float()


def _bytes_paged(paged: PagedModel) -> int:
    stats = paged.pager.stats()
    return stats.paging.bytes_paged
