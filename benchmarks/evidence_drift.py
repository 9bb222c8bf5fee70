"""Texts that change their domain, read under a pool: what drift costs, and what widening and going exact save."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from benchmarks.evidence_claims import Claim
from benchmarks.evidence_measure import Scale
from pager.engine.paged_model import load_paged_model
from pager.lab.corpus import Cut, Text, digest_of, read_texts
from pager.lab.drift import ChangingText, Reading, changing_texts, read
from pager.lab.report import Bootstrap, Interval, table
from pager.memory.plan import Budgets
from pager.memory.units import format_bytes
from pager.types import DriftAction, DriftPolicy, PoolPolicy, Share

POOL = Share(0.25)
BUDGET = "50%"
TOKENS = 256
WINDOW = 16
QUIET_SHARE = 0.9  # of unchanging training documents, those whose drift stays below the threshold
EAGER = DriftPolicy(0.58, window=4)
"""Takes almost any text for one that drifts: what is saved is what little such a text does not want at all."""
ACTIONS = ("exact", "pool", "widened", "widened soon", "exact after drift")
Facts = dict[str, Any]


def measure_drift(model: Path, corpus: Path, folder: Path, scale: Scale, per_domain: int = 2) -> Facts:
    """Kept in `folder`; measured once under the same conditions."""
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
    """Markdown."""
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
