"""One answer on its way to a client: what it measured, and sending that does not wait for ever."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any, Self

import grpc
from google.protobuf.message import Message

from pager.errors import SlowReader
from pager.types import Account, ExpertPool, TokenChunk
from router_service.access_log import tell
from router_service.metrics import RouterMetrics


class StreamMeter:
    """Owns the times of one answer, and counts what its request uses at workers. Made when the call arrives.

    A context manager around the answer: its pace counts however it ends.
    """

    def __init__(self, metrics: RouterMetrics, tenant: str) -> None:
        self._metrics = metrics
        self._tenant = tenant
        self._arrived_s = time.perf_counter()
        self._first_s = self._last_s = 0.0
        self._num_tokens = 0
        self.has_started = False

    def seen(self, chunk: TokenChunk, predicted: ExpertPool | None) -> TokenChunk:
        """The chunk to send: a last one without the recall of its prediction gets it."""
        self.has_started = True
        now_s = time.perf_counter()
        if chunk.token_ids and not self._num_tokens:
            self._first_s = now_s
            self._metrics.first_token(self._tenant, now_s - self._arrived_s)
            tell(first_token_ms=round(1000 * (now_s - self._arrived_s), 1))
        if chunk.token_ids:
            self._last_s = now_s
        self._num_tokens += len(chunk.token_ids)
        tell(completion_tokens=self._num_tokens)
        usage = chunk.usage
        if usage is None:
            return chunk
        if usage.pool is not None and predicted is not None:
            self._metrics.predicted(predicted, usage.pool)
            if usage.predicted_recall is None:
                usage = replace(usage, predicted_recall=predicted.recall_of(usage.pool))
        return replace(chunk, usage=usage)

    def sent(self) -> None:
        self._metrics.sent.inc()

    def settled(self, account: Account) -> None:
        self._metrics.settled(self._tenant, account)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._num_tokens > 1:
            self._metrics.output_token(self._tenant, (self._last_s - self._first_s) / (self._num_tokens - 1))


async def send(context: grpc.aio.ServicerContext[Any, Any], message: Message, timeout_s: float) -> None:
    """Raises SlowReader when the client takes nothing for `timeout_s`."""
    try:
        async with asyncio.timeout(timeout_s):
            await context.write(message)
    except TimeoutError:
        raise SlowReader(f"the client read nothing for {timeout_s:g} s; read faster") from None
