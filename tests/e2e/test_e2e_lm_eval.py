"""lm-eval's numbers over HTTP are those of the whole model in transformers: a generating task and one of likelihoods.

`python -m tests.e2e.test_e2e_lm_eval URL FOLDER` prints both as JSON. A process of its own, since lm-eval brings much.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.files import EMO_TINY

pytestmark = pytest.mark.slow

DOCUMENTS = (
    ("SELECT name FROM users", (" WHERE id = 1", " because of the", "\n\nThe")),
    ("def mean(values):", ("\n    return", " is a hotel", " 4 5 6")),
    ("The hotel is", (" open", "()", "SELECT")),
    ("import numpy", (" as np", " Dear Sir", " {")),
)


def test_the_numbers_are_those_of_the_whole_model(idle_service: Any, tmp_path: Path) -> None:
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [sys.executable, "-m", "tests.e2e.test_e2e_lm_eval", idle_service.ready["http_url"], str(tmp_path)],
        env=os.environ | offline, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    whole, served = json.loads(done.stdout.splitlines()[-1])
    assert served["scores"] == whole["scores"]
    assert served["texts"] == whole["texts"]
    assert served["logprobs"] == pytest.approx(whole["logprobs"], abs=1e-3)
    assert len(whole["logprobs"]) == sum(len(choices) for _, choices in DOCUMENTS)


def tasks(folder: Path) -> list[dict[str, Any]]:
    documents = folder / "documents.jsonl"
    lines = [json.dumps({"prompt": prompt, "choices": choices, "label": 0}) for prompt, choices in DOCUMENTS]
    documents.write_text("\n".join(lines))
    shared: dict[str, Any] = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(documents)}},
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
    }
    options = {"until": ["\n\n"], "max_gen_toks": 16, "do_sample": False, "temperature": 0.0}
    metrics = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("exact_match", "acc")]
    writing = {"task": "writing", "output_type": "generate_until", "doc_to_target": "{{choices[0]}}"}
    choosing = {"task": "choosing", "output_type": "multiple_choice", "doc_to_choice": "{{choices}}"}
    return [
        shared | writing | {"generation_kwargs": options, "metric_list": metrics[:1]},
        shared | choosing | {"doc_to_target": "{{label}}", "target_delimiter": "", "metric_list": metrics[1:]},
    ]


def numbers(model: Any, folder: Path, **options: Any) -> dict[str, Any]:
    """What lm-eval makes of a model: its scores, and the answers that they are of."""
    import lm_eval

    found = lm_eval.simple_evaluate(
        model, tasks=tasks(folder), num_fewshot=0, log_samples=True, bootstrap_iters=0, **options
    )
    answers = {name: [each["resps"] for each in samples] for name, samples in found["samples"].items()}
    return {
        "scores": [found["results"]["writing"]["exact_match,none"], found["results"]["choosing"]["acc,none"]],
        "texts": [answer[0][0] for answer in answers["writing"]],
        "logprobs": [choice[0][0] for answer in answers["choosing"] for choice in answer],
    }


def main(url: str, folder: Path) -> None:
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import pager  # noqa: F401 - transformers know EMO from here on

    model = AutoModelForCausalLM.from_pretrained(EMO_TINY, dtype=torch.float32)
    whole = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(EMO_TINY), batch_size=1, device="cpu")
    arguments = {"model": "emo-tiny", "base_url": f"{url}/v1/completions", "tokenizer": str(EMO_TINY)}
    found = [
        numbers(whole, folder),
        numbers("local-completions", folder, model_args=arguments | {"num_concurrent": 4, "max_length": 1024}),
    ]
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
