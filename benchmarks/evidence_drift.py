"""Texts that change their domain, read under a pool: what drift costs, and what widening and going exact save."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from benchmarks.evidence_claims import Claim
from benchmarks.evidence_facts import Facts, Scale
from pager.engine.paged_model import PagedModel, load_paged_model
from pager.errors import InvalidRequest
from pager.lab.corpus import Cut, Text, digest_of, domains_of, read_texts
from pager.lab.report import Bootstrap, Interval, table
from pager.memory import Budgets, format_bytes
from pager.pools.drift import answer_drift
from pager.pools.step import RequestRouting
from pager.types import DriftAction, DriftPolicy, DriftReport, PoolPolicy, Share

POOL = Share(0.25)
BUDGET = "50%"
TOKENS = 256
WINDOW = 16
CHUNK_TOKENS = 4
QUIET_SHARE = 0.9  # of unchanging training documents, those whose drift stays below the threshold
EAGER = DriftPolicy(0.58, window=4)
"""A policy that takes almost any text for one that drifts: all that it saves are experts that no text wants."""
ACTIONS = ("exact", "pool", "widened", "widened soon", "exact after drift")


def measure_drift(model: Path, corpus: Path, folder: Path, scale: Scale, per_domain: int = 2) -> Facts:
    """Measures what drift costs, once under the same conditions; the result is kept in `folder`."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    cut = Cut(64, TOKENS)
    asked = _long(read_texts([str(corpus / "*.valid.jsonl*")], tokenizer, cut, max_documents=4 * per_domain))
    known = _long(read_texts([str(corpus / "*.train.jsonl*")], tokenizer, cut, max_documents=4 * per_domain))
    asked, known = _few(asked, per_domain), _few(known, per_domain)
    paged = load_paged_model(model, dtype="float32", budgets=Budgets(expert_memory=BUDGET))
    try:
        conditions = f"3 {paged.fingerprint} {digest_of(asked)} {digest_of(known)} {scale}"
        path = folder / "drift.json"
        stored: Facts = json.loads(path.read_text()) if path.exists() else {}
        if stored.get("conditions") == conditions:
            return stored
        eager = PoolPolicy(POOL, drift=EAGER)
        still = [ChangingText(text.token_ids, cut.prompt_tokens, TOKENS // 2, (text.domain,) * 2) for text in known]
        peaks = [
            reading.report.peak_mass
            for reading in read(paged, still, PoolPolicy(POOL, drift=DriftPolicy(0.999, window=WINDOW)))
            if reading.report is not None
        ]
        threshold = float(np.quantile(peaks, QUIET_SHARE))
        alarms = [reading.report.widenings > 0 for reading in read(paged, still, eager) if reading.report is not None]
        facts: Facts = {"conditions": conditions, "threshold": threshold, "false_alarms": float(np.mean(alarms))}
        policies = {
            "exact": PoolPolicy(),
            "pool": PoolPolicy(POOL),
            "widened": PoolPolicy(POOL, drift=DriftPolicy(threshold, window=WINDOW)),
            "widened soon": eager,
            "exact after drift": PoolPolicy(POOL, drift=DriftPolicy(threshold, DriftAction.EXACT, WINDOW)),
        }
        for where, in_prompt in (("in the prompt", True), ("in the answer", False)):
            texts = changing_texts(asked, TOKENS, in_prompt=in_prompt)
            found = {name: read(paged, texts, policy) for name, policy in policies.items()}
            facts[where] = _summary(texts, found)
    finally:
        paged.close()
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts, indent=1))
    return facts


def drift_claims(facts: Facts) -> list[Claim]:
    found = facts["in the prompt"]["widened soon"]
    return [
        Claim(
            "drift",
            "a prompt that changes its domain halfway, pool widened soon: within 0.03 nats of exact",
            Interval(**found["above_exact"]),
            0.03,
        ),
        Claim("drift", "and reads at most what exact reads", Interval(**found["bytes_of_exact"]), 1.0, "{:.2f}"),
    ]


def drift_section(facts: Facts) -> str:
    """The section of docs/evidence.md in Markdown."""
    rows = []
    for where in ("in the prompt", "in the answer"):
        for action in ACTIONS:
            found = facts[where][action]
            interval = found["above_exact"]
            rows.append(
                [
                    f"{where}: {action}",
                    f"{interval['mean']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]",
                    f"{found['after_change']:.3f}",
                    format_bytes(round(found["bytes_paged"])),
                    f"{found['pool_experts']:.0f}" if found["pool_experts"] else "all",
                    f"{found['drifted']:.0%}",
                ]
            )
    header = [
        "the domain changes",
        "loss above exact",
        "after the change",
        "read a text",
        "experts at the end",
        "drifted",
    ]
    said = (
        f"`emo-tiny` reads texts of {TOKENS} tokens that go over into another domain, in the middle of a prompt of 64 "
        f"or in the middle of the text, {facts['in the prompt']['texts']} of each kind, four tokens at a time. Pool: "
        f"25 % of the experts, chosen from the prompt; cache: {BUDGET} of them. The threshold, "
        f"{facts['threshold']:.2f} of gate mass outside of the pool over {WINDOW} tokens, leaves {QUIET_SHARE:.0%} "
        f"of unchanging training documents alone. Widened soon: a threshold of {EAGER.threshold:g} over {EAGER.window} "
        f"tokens, which widens the pools of {facts['false_alarms']:.0%} of them too."
    )
    return f"{said}\n\n{table(header, rows)}"


def _summary(texts: Sequence[ChangingText], found: dict[str, list[Reading]]) -> Facts:
    bootstrap = Bootstrap([text.domains[0] for text in texts])
    counts = np.array([len(reading.nats) for reading in found["exact"]])
    exact_nats = np.array([reading.nats.sum() for reading in found["exact"]])
    exact_bytes = np.array([reading.bytes_paged for reading in found["exact"]], dtype=float)
    summary: Facts = {"texts": len(texts)}
    for action, readings in found.items():
        nats = np.array([reading.nats.sum() for reading in readings])
        read_bytes = np.array([reading.bytes_paged for reading in readings], dtype=float)
        reports = [reading.report for reading in readings if reading.report is not None]
        after = [
            reading.loss_after_change - exact.loss_after_change
            for reading, exact in zip(readings, found["exact"], strict=True)
        ]
        sizes = [reading.pool_experts for reading in readings if reading.pool_experts is not None]
        drifted = [each.widenings > 0 or each.exact_from is not None for each in reports]
        summary[action] = {
            "above_exact": asdict(bootstrap.mean_over_domains(nats - exact_nats, counts)),
            "after_change": float(np.mean(after)),
            "bytes_paged": float(read_bytes.mean()),
            "bytes_of_exact": asdict(bootstrap.mean_over_domains(read_bytes, np.maximum(exact_bytes, 1))),
            "pool_experts": float(np.mean(sizes)) if sizes else None,
            "drifted": float(np.mean(drifted or [False])),
        }
    return summary


def _long(texts: Sequence[Text]) -> list[Text]:
    return [text for text in texts if len(text.token_ids) >= TOKENS]


def _few(texts: Sequence[Text], per_domain: int) -> list[Text]:
    return [
        text
        for domain in dict.fromkeys(text.domain for text in texts)
        for text in [each for each in texts if each.domain == domain][:per_domain]
    ]


# --- reading texts that change their domain -------------------------------------------------------------------------


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
        """The mean nats a token after the prompt."""
        return float(self.nats.mean())

    @property
    def loss_after_change(self) -> float:
        return float(self.nats[self.num_unchanged :].mean())


def changing_texts(
    texts: Sequence[Text], num_tokens: int, *, prompt_tokens: int = 64, in_prompt: bool = False, step: int = 1
) -> list[ChangingText]:
    """Makes a text of every document that is long enough: it goes on as one of the domain `step` further.

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

    Raises what `PagedModel.routing` raises.
    """
    return [_read(paged, text, paged.routing(policy), chunk_tokens) for text in texts]


@torch.inference_mode()
def _read(paged: PagedModel, text: ChangingText, document: RequestRouting, chunk_tokens: int) -> Reading:
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
    paged: PagedModel, document: RequestRouting, cache: DynamicCache, ids_1S: Tensor, *, prefill: bool = False
) -> Tensor:
    """The logits of a chunk: [S, V]."""
    with paged.step([document], prefill=prefill):
        logits_1SV: Tensor = paged.model(input_ids=ids_1S, past_key_values=cache, use_cache=True).logits
    return logits_1SV[0].float()


def _bytes_paged(paged: PagedModel) -> int:
    return paged.pager.stats().paging.bytes_paged
