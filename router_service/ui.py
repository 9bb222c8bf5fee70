"""The page `/ui`, the state that it shows, and the pools in use."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from importlib import resources
from string import Template
from typing import TYPE_CHECKING, Any
from wsgiref.headers import Headers

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pager import __version__
from pager.cluster.placement import ClusterPort, WorkerState, WorkerView
from pager.types import ExpertPool, Full, ModelInfo, PagingCounts, PoolPolicy, Usage, WorkerResidency
from router_service.hints import HintStore, all_workers, size_name

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

log = logging.getLogger("expert_pager.router")

KEPT = 256  # rows kept beyond those of requests in flight
MAX_WAITS = 512  # the most first tokens between two looks whose times are kept
LONGEST_SIZE = 40  # characters; a size can name every layer
SAMPLE_S = 5.0
NUM_SAMPLES = 60
MAX_WORKERS = 32
MAX_POOLS = 40
_COUNTS = tuple(each.name for each in fields(PagingCounts))
_SERVING = (WorkerState.READY, WorkerState.DRAINING)
STATE_PATH, POOL_PATH = "/ui/state.json", "/ui/pool.json"
STATE_TIMEOUT_S = 5.0
_SAFE = (
    ("Cache-Control", "no-store"),
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
)
_Answer = tuple[str, str, bytes]  # status, type and body


@dataclass(frozen=True, slots=True)
class PoolLabel:
    """The identity of a row. `name` is the tenant's own; `pool` is None while, or because, none is known."""

    tenant: str
    name: str
    size: str  # "count:8" and the like; "named" for a named pool, and the codeword's name for a codeword's
    pool: ExpertPool | None
    is_expected: bool  # predicted; the prefill has not chosen yet


@dataclass(slots=True)
class PoolUse:
    """One row of the table. Mutable, owned by the log."""

    live: int = 0
    answers: int = 0
    paging: PagingCounts = field(default_factory=PagingCounts)
    mode: str = ""  # the mode of the last answer


@dataclass(slots=True)
class PoolRow:
    """The use of one pool by all tenants, without their names."""

    size: str
    pool: ExpertPool | None
    is_expected: bool
    use: PoolUse
    num_tenants: int


@dataclass(slots=True)
class PoolLog:
    """Owns the rows, the latest used last. Of rows without live requests the longest unused are dropped first."""

    rows: dict[PoolLabel, PoolUse] = field(default_factory=dict)

    @contextmanager
    def following(
        self, tenant: str, name: str, policy: PoolPolicy, pool: ExpertPool | None, codeword: str = ""
    ) -> Iterator[LivePool]:
        """Counts a live request for the duration of the block. `pool` is fixed, predicted or that of `codeword`."""
        is_expected = policy.fixed is None and pool is not None and not isinstance(policy.size, Full)
        size = codeword or ("named" if name else size_label(policy))
        live = LivePool(self, PoolLabel(tenant, name, size, policy.fixed or pool, is_expected))
        self._use(live.label).live += 1
        try:
            yield live
        finally:
            self._left(live.label)

    def ended(self, label: PoolLabel, usage: Usage) -> None:
        actual = PoolLabel(label.tenant, label.name, label.size, usage.pool, is_expected=False)
        use = self._use(actual)
        use.answers += 1
        use.paging += usage.paging
        use.mode = usage.mode

    def find(self, digest: str) -> ExpertPool | None:
        """Returns the pool of this digest, if one of the rows has it."""
        return next((each.pool for each in self.rows if each.pool is not None and each.pool.digest == digest), None)

    def of_all_tenants(self) -> list[PoolRow]:
        """Returns the rows, merged over tenants and names, the latest used first."""
        found: dict[tuple[str, ExpertPool | None, bool], list[tuple[PoolLabel, PoolUse]]] = {}
        for label, use in reversed(self.rows.items()):
            found.setdefault((label.size, label.pool, label.is_expected), []).append((label, use))
        return [
            PoolRow(*shared, _sum([use for _, use in each]), len({label.tenant for label, _ in each}))
            for shared, each in found.items()
        ]

    def _use(self, label: PoolLabel) -> PoolUse:
        self.rows[label] = self.rows.pop(label) if label in self.rows else PoolUse()
        return self.rows[label]

    def _left(self, label: PoolLabel) -> None:
        use = self.rows[label]
        use.live -= 1
        if not use.live and not use.answers:
            del self.rows[label]
        idle = [label for label, use in self.rows.items() if not use.live]
        for oldest in idle[: max(0, len(idle) - KEPT)]:
            del self.rows[oldest]


@dataclass(frozen=True, slots=True)
class LivePool:
    """One request in flight."""

    log: PoolLog
    label: PoolLabel

    def answered(self, usage: Usage) -> None:
        self.log.ended(self.label, usage)


def _sum(uses: list[PoolUse]) -> PoolUse:
    """Adds up the uses; the first is the latest."""
    return PoolUse(
        live=sum(use.live for use in uses),
        answers=sum(use.answers for use in uses),
        paging=sum((use.paging for use in uses), PagingCounts()),
        mode=next((use.mode for use in uses if use.mode), ""),
    )


@dataclass(slots=True)
class Served:
    """The counts of what this router has sent to its clients since its start. Mutable; its metrics own it."""

    tokens: int = 0
    answers: int = 0
    errors: int = 0  # answers that ended otherwise, except those that their clients left
    # the times of first tokens since the last look
    waits_s: deque[float] = field(default_factory=lambda: deque(maxlen=MAX_WAITS))

    def ended(self, code: str) -> None:
        """Counts a call to generate that ended with this gRPC status."""
        self.answers += code == "OK"
        self.errors += code not in ("OK", "CANCELLED")


@dataclass(slots=True)
class Sample:
    """The counts of what this router sent and its workers paged in `seconds` until `end_unix_s`."""

    end_unix_s: float
    seconds: float = 0.0
    paged: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_COUNTS, 0))
    tokens: int = 0
    answers: int = 0
    errors: int = 0
    waits_s: list[float] = field(default_factory=list)


class Watch:
    """Owns the samples. Lives on the router's event loop; `beat` is called about once a second."""

    def __init__(
        self,
        model: ModelInfo,
        cluster: ClusterPort,
        hints: HintStore,
        pools: PoolLog,
        served: Served | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._served = served or Served()
        self._sent = (0, 0, 0)  # tokens, answers and errors at the last beat
        self._model = model
        self._cluster = cluster
        self._hints = hints
        self._pools = pools
        self._clock = clock
        self._last_s = clock()
        self._last: dict[str, PagingCounts] = {}  # the last counts of each worker that serves
        self._samples: deque[Sample] = deque([Sample(time.time())], NUM_SAMPLES)

    def beat(self) -> None:
        """Adds what was paged since the last beat. What a new worker paged before is not counted."""
        now_s = self._clock()
        if self._samples[-1].seconds >= SAMPLE_S:
            self._samples.append(Sample(time.time()))
        sample = self._samples[-1]
        sample.seconds += now_s - self._last_s
        sample.end_unix_s = time.time()
        serving = {worker.id: worker.paging for worker in self._cluster.workers() if worker.state in _SERVING}
        for worker_id, totals in serving.items():
            before = self._last.get(worker_id, totals)
            for name in _COUNTS:
                sample.paged[name] += max(0, getattr(totals, name) - getattr(before, name))
        self._last_s, self._last = now_s, serving
        sent = (self._served.tokens, self._served.answers, self._served.errors)
        tokens, answers, errors = (now - before for now, before in zip(sent, self._sent, strict=True))
        sample.tokens, sample.answers, sample.errors = (
            sample.tokens + tokens, sample.answers + answers, sample.errors + errors
        )  # fmt: skip
        self._sent = sent
        sample.waits_s = [*sample.waits_s, *self._served.waits_s][-MAX_WAITS:]
        self._served.waits_s.clear()

    def pool(self, digest: str) -> dict[str, Any] | None:
        """Returns the experts of a pool that is shown; None for one that is not."""
        pool = self._pools.find(digest)
        return None if pool is None else {"digest": digest, "num_experts": pool.num_experts, "experts": pool.experts}

    async def state(self) -> dict[str, Any]:
        """Returns JSON of at most about 200 kB, which names no tenant and no named pool: anyone may see it."""
        workers = await all_workers(self._cluster.workers(), self._hints)
        shown = [_worker(each, self._model) for each in workers[:MAX_WORKERS]]
        rows = sorted(self._pools.of_all_tenants(), key=lambda row: row.use.live, reverse=True)
        waits_s = sorted(wait_s for sample in self._samples for wait_s in sample.waits_s)
        return {
            "version": __version__,
            "model": {"name": self._model.name, "routed_per_layer": self._model.facts.routed_per_layer},
            "now_unix_s": round(time.time(), 1),
            "workers": shown,
            "workers_left_out": len(workers) - len(shown),
            "pools": [_pool(row, shown) for row in rows[:MAX_POOLS]],
            "pools_left_out": max(0, len(rows) - MAX_POOLS),
            "samples": [_sample(sample) for sample in self._samples],
            "first_token_s": {"median": _share(waits_s, 0.5), "p95": _share(waits_s, 0.95)},
        }


def _worker(worker: WorkerResidency, model: ModelInfo) -> dict[str, Any]:
    return {
        "id": worker.id,
        "state": worker.state,
        "remote": worker.is_remote,
        "waiting": worker.waiting,
        "running": worker.running,
        "slots": worker.num_slots,
        "expert_bytes": worker.expert_bytes,
        "page_in_bytes_per_s": worker.page_in_bytes_per_s if isinstance(worker, WorkerView) else None,
        "resident": [layer.hex() for layer in worker.bitmaps(model.facts)],
    }


def _pool(row: PoolRow, workers: list[dict[str, Any]]) -> dict[str, Any]:
    pool = row.pool
    return {
        "tenants": row.num_tenants,
        "size": row.size,
        "digest": pool.digest if pool is not None else None,
        "experts": pool.num_experts if pool is not None else None,
        "is_expected": row.is_expected,
        "resident": _resident(pool, workers),
        "live": row.use.live,
        "answers": row.use.answers,
        "experts_hit": row.use.paging.experts_hit,
        "experts_missed": row.use.paging.experts_missed,
        "bytes_paged": row.use.paging.bytes_paged,
        "mode": row.use.mode,
    }


def _resident(pool: ExpertPool | None, workers: list[dict[str, Any]]) -> dict[str, int]:
    """Returns how many of the pool's experts each worker holds."""
    if pool is None:
        return {}
    found = {}
    for worker in workers:
        masks = [int.from_bytes(bytes.fromhex(layer), "little") for layer in worker["resident"]]
        layers = zip(pool.experts, masks, strict=True)
        found[worker["id"]] = sum(mask >> expert & 1 for experts, mask in layers for expert in experts)
    return found


def _sample(sample: Sample) -> dict[str, float | None]:
    return {
        "end_unix_s": round(sample.end_unix_s, 1),
        "seconds": round(sample.seconds, 3),
        **sample.paged,
        "tokens": sample.tokens,
        "answers": sample.answers,
        "errors": sample.errors,
        "first_token_s": _share(sorted(sample.waits_s), 0.5),
    }


def _share(values: Sequence[float], share: float) -> float | None:
    """Returns the value at or below which this share of the sorted `values` lies; None for no values."""
    return round(values[min(len(values) - 1, int(share * len(values)))], 4) if values else None


class Page:
    """Answers in the threads of the HTTP server, and gets the state from the event loop."""

    def __init__(self, watch: Watch, loop: asyncio.AbstractEventLoop) -> None:
        self._watch = watch
        self._loop = loop
        style, script = _part("page.css"), _part("page.js") + _part("playground.js")
        html = Template(_part("page.html"))
        # The metrics port has no TLS and takes no prompts.
        self._html, self._html_to_ask = (
            html.substitute(style=style, script=script, playground=playground).encode() for playground in ("no", "yes")
        )
        self._policy = (
            f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; connect-src 'self'; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )

    def routes(self) -> list[Route]:
        """Returns the page as routes of an ASGI application."""

        async def answer(request: Request) -> Response:
            path, query = request.url.path, request.url.query
            found = self._fixed(request.method, path, self._html_to_ask)
            if found is None:
                try:
                    async with asyncio.timeout(STATE_TIMEOUT_S):
                        state = await self._state(path, query)
                    found = await asyncio.to_thread(_in_json, state)
                except Exception as error:
                    found = _failed(error)
            status, kind, body = found
            headers = {**dict(_SAFE), "Content-Security-Policy": self._policy}
            return Response(body, int(status[:3]), headers, kind)

        return [Route(path, answer, methods=["GET"]) for path in ("/ui", "/ui/", STATE_PATH, POOL_PATH)]

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answers as a WSGI application, mounted at `/ui`."""
        method = environ["REQUEST_METHOD"]
        path, query = environ.get("PATH_INFO", ""), environ.get("QUERY_STRING", "")
        status, kind, body = self._fixed(method, path, self._html) or self._from_thread(path, query)
        headers = Headers([("Content-Type", kind), ("Content-Length", str(len(body))), *_SAFE])
        headers["Content-Security-Policy"] = self._policy
        start_response(status, headers.items())
        return [] if method == "HEAD" else [body]

    def _fixed(self, method: str, path: str, html: bytes) -> _Answer | None:
        """Returns the answer, if the state has no part in it."""
        if method not in ("GET", "HEAD"):
            return "405 Method Not Allowed", "text/plain", b"GET or HEAD only\n"
        if path in ("/ui", "/ui/"):
            return "200 OK", "text/html; charset=utf-8", html
        if path not in (STATE_PATH, POOL_PATH):
            known = f"there is /ui, {STATE_PATH} and {POOL_PATH}?digest=DIGEST\n"
            return "404 Not Found", "text/plain", known.encode()
        return None

    async def _state(self, path: str, query: str) -> dict[str, Any] | None:
        """Returns what is asked for; None for a pool that is not shown. Runs on the event loop."""
        return await self._watch.state() if path == STATE_PATH else self._watch.pool(query.removeprefix("digest="))

    def _from_thread(self, path: str, query: str) -> _Answer:
        asked = asyncio.run_coroutine_threadsafe(self._state(path, query), self._loop)
        try:
            return _in_json(asked.result(STATE_TIMEOUT_S))
        except Exception as error:
            asked.cancel()
            return _failed(error)


def _failed(error: Exception) -> _Answer:
    """Returns the answer for a state that could not be read: a failure of the page must not end anything else."""
    log.warning("the state for /ui could not be read: %s", type(error).__name__)
    return "503 Service Unavailable", "text/plain", b"the router does not answer in time\n"


def _in_json(state: dict[str, Any] | None) -> _Answer:
    if state is None:
        return "404 Not Found", "text/plain", b"no pool of this digest is shown any more\n"
    return "200 OK", "application/json", json.dumps(state, separators=(",", ":"), allow_nan=False).encode()


def _part(name: str) -> str:
    return resources.files("router_service").joinpath("ui_page", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def size_label(policy: PoolPolicy) -> str:
    """Returns a short text for the size that a request asked for."""
    text = "fixed" if policy.fixed is not None else size_name(policy.size)
    return text if len(text) <= LONGEST_SIZE else f"{text[: LONGEST_SIZE - 1]}…"
