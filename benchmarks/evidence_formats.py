"""What experts in 8 and 4 bits cost in quality: the loss with all experts, beside that of the model as it is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from benchmarks.checkpoints import quantised
from benchmarks.evidence_claims import Claim
from benchmarks.evidence_facts import Facts, Scale
from pager.engine.paged_model import load_paged_model
from pager.lab.corpus import Cut, Text, digest_of, read_texts
from pager.lab.recording import EVERY_EXPERT, Forwards
from pager.lab.report import Bootstrap, Interval, table
from pager.memory import Budgets
from pager.store.pack_format import KINDS

DTYPE = torch.bfloat16
MOST_NATS = {"int8": 0.002, "int4": 0.02, "fp8": 0.002}


@dataclass(frozen=True, slots=True)
class Losses:
    """The nats of each text's tokens after its prompt, added up, and the bytes of an expert."""

    nats_N: tuple[float, ...]
    expert_bytes: int


def measure_formats(model: Path, corpus: Path, folder: Path, scale: Scale) -> Facts:
    """Measures the model as it is and quantised, once under the same conditions; the result is kept in `folder`."""
    cut = Cut()
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    texts = read_texts([str(corpus / "*.valid.jsonl*")], tokenizer, cut, max_documents=scale.max_documents)
    conditions = f"2 {digest_of(texts)} {DTYPE}"
    path = folder / "formats.json"
    stored: Facts = json.loads(path.read_text()) if path.exists() else {}
    if stored.get("conditions") == conditions:
        return stored
    plain = losses(model, texts, cut)
    with TemporaryDirectory() as work:
        found = {kind: losses(quantised(model, Path(work) / kind, kind, DTYPE), texts, cut) for kind in KINDS}
    facts: Facts = {"conditions": conditions, **summary(texts, cut, plain, found)}
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts, indent=1))
    return facts


def losses(path: Path, texts: Sequence[Text], cut: Cut) -> Losses:
    """Runs every text with all experts, in the dtype that it is served in."""
    paged = load_paged_model(path, dtype=DTYPE, budgets=Budgets(expert_memory="100%"))
    try:
        ids = [text.token_ids for text in texts]
        outcomes = Forwards(paged, cut.prompt_tokens).outcomes(ids, [EVERY_EXPERT] * len(ids))
        return Losses(tuple(outcome.nats for outcome in outcomes), paged.facts.expert_bytes)
    finally:
        paged.close()


def summary(texts: Sequence[Text], cut: Cut, plain: Losses, found: Mapping[str, Losses]) -> dict[str, Any]:
    """The loss of the model as it is, and for each kind its rise, with intervals over resampled documents."""
    bootstrap = Bootstrap([text.domain for text in texts])
    tokens_N = np.array([len(text.token_ids) - cut.prompt_tokens for text in texts])
    nats_N = np.array(plain.nats_N)
    return {
        "texts": len(texts),
        "tokens": int(tokens_N.sum()),
        "loss": bootstrap.mean_over_domains(nats_N, tokens_N).to_dict(),
        "expert_bytes": {"bfloat16": plain.expert_bytes} | {kind: each.expert_bytes for kind, each in found.items()},
        "rises": {
            kind: bootstrap.mean_over_domains(np.array(each.nats_N) - nats_N, tokens_N).to_dict()
            for kind, each in found.items()
        },
    }


def format_claims(models: Mapping[str, Facts]) -> list[Claim]:
    """At most so many nats for each kind, of each model."""
    claims = []
    for name, facts in models.items():
        for kind, most in MOST_NATS.items():
            says = f"{name}, {kind}: rise of at most {most:g} nats"
            claims.append(Claim("quantised experts", says, Interval(**facts["rises"][kind]), most, "{:.4f}"))
    return claims


def format_section(models: Mapping[str, Facts]) -> str:
    """A table of both models, with what an expert takes."""
    rows = [
        [
            f"{name}, {kind}",
            f"{facts['expert_bytes'][kind] / facts['expert_bytes']['bfloat16']:.2f}",
            _figure(rise),
        ]
        for name, facts in models.items()
        for kind, rise in facts["rises"].items()
    ]
    some = next(iter(models.values()))
    losses_of = ", ".join(f"{name}'s loss is {facts['loss']['mean']:.3f}" for name, facts in models.items())
    text = (
        f"Routed and shared experts packed by `expert-pager pack --experts`, everything in bfloat16, all experts "
        f"allowed, on {some['texts']} documents ({some['tokens']} tokens after their prompts); {losses_of}. Nothing is "
        "calibrated."
    )
    return f"{text}\n\n{table(['experts in', 'bytes, bfloat16 = 1', 'rise of the loss'], rows)}"


def _figure(rise: Mapping[str, float]) -> str:
    return f"{rise['mean']:.4f} [{rise['low']:.4f}, {rise['high']:.4f}]"
