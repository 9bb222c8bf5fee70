"""Where the time of one request went at its worker, as spans of its trace."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

from pager import tracing
from pager.engine.sequence import Sequence


def record_spans(sequence: Sequence, outcome: str) -> None:
    """Of a sequence that has ended, however far it came. Nothing for a request without a trace."""
    request = sequence.request
    if request.traceparent is not None:
        tracing.record(request.traceparent, _parts(sequence, outcome), request.tracestate)


def _parts(sequence: Sequence, outcome: str) -> Iterator[tracing.Part]:
    """Queue, prefill and decode follow each other; what was paged from a tier overlaps with any of them."""
    now_s = time.monotonic()
    unix_s = time.time() - now_s  # what turns monotonic seconds into unix seconds

    def part(name: str, start_s: float, end_s: float, **facts: int | str) -> tracing.Part:
        return tracing.Part(name, unix_s + start_s, unix_s + (now_s if math.isnan(end_s) else end_s), facts)

    prefill_s, first_s = sequence.prefill_started_s, sequence.first_token_s
    yield part("queue", sequence.submitted_s, sequence.admitted_s)
    if not math.isnan(prefill_s):
        yield part("prefill", prefill_s, first_s, num_tokens=sequence.num_prefilled)
    if not math.isnan(first_s):
        yield part("decode", first_s, now_s, num_tokens=len(sequence.output_ids), outcome=outcome)
    for tier, reads in sequence.reads.items():
        facts = {"num_experts": reads.num_experts, "num_bytes": reads.num_bytes}
        yield part(f"page {tier.value}", reads.started_s, reads.ended_s, **facts)
