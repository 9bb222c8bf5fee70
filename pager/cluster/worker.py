"""The worker process: an engine that a loader made, its token server and metrics, and the file of its warm set.

The file lists the experts that the worker held, so that its next process pages them in before it is ready. This is best
effort: for a file that cannot be used, the worker logs one line and starts cold. Knows no Ray and no torch.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, Protocol

from expert_pager.v1 import worker_pb2 as pb

from pager import __version__
from pager.cluster.placement import Health, LoadedModel, WorkerReady
from pager.cluster.spare import NUM_THREADS
from pager.cluster.tokens import StreamEvent, SubmissionObserver, TokenEngine, TokenServer
from pager.config import ServiceConfig, WorkerConfig
from pager.engine.interface import EngineObserver
from pager.errors import PagerError, PortInUse
from pager.memory import NUM_READERS, Budgets, format_address
from pager.observe import tracing
from pager.observe.metrics import LoopLag, MetricsServer, leave_out_of_collections
from pager.observe.worker_metrics import EngineLoad, TierBytes, WorkerMetrics
from pager.reading import replace_file
from pager.threads import LoopThread
from pager.types import PagingCounts, RoutingFacts
from pager.wire import encode_bitmap, encode_paging

if TYPE_CHECKING:
    from pager.cache.tiers import HostTier
    from pager.memory import Plan
    from pager.models.open_model import OpenModel

log = logging.getLogger(__name__)

VERSION = 1
MAX_BYTES = 16 * 2**20

Experts = Sequence[Sequence[int]]  # the routed experts of each layer


class WarmFile:
    """The file of one worker's warm set. Only that worker writes it, from several of its threads."""

    def __init__(self, folder: Path, worker: str, fingerprint: str, facts: RoutingFacts) -> None:
        self._path = folder / f"{worker}.json"
        self._fingerprint = fingerprint
        self._routed_per_layer = facts.routed_per_layer
        self._saved: Any = None

    def read(self) -> list[list[int]] | None:
        """Returns what to page in; None where there is no file, or one of another model, which is logged."""
        try:
            if self._path.stat().st_size > MAX_BYTES:
                raise ValueError(f"it has more than {MAX_BYTES} bytes")
            return self._checked(json.loads(self._path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            log.warning("%s is ignored, and this worker starts cold: %s", self._path, error)
            return None

    def save(self, experts: Experts) -> None:
        """Replaces the file in one step, if something changed. A worker that holds nothing writes nothing."""
        content = [list(layer) for layer in experts]
        if content == self._saved or not any(content):
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            document = {"version": VERSION, "fingerprint": self._fingerprint, "experts": content}
            replace_file(self._path, json.dumps(document).encode())
        except OSError as error:
            log.warning("the list of this worker's experts could not be saved to %s: %s", self._path, error)
        else:
            self._saved = content

    def _checked(self, document: Any) -> list[list[int]]:
        """Returns the file's experts. Raises ValueError that says what is wrong."""
        if not isinstance(document, dict) or document.get("version") != VERSION:
            raise ValueError(f"it is not a file of version {VERSION}")
        if document.get("fingerprint") != self._fingerprint:
            raise ValueError("it is of another model")
        experts = document.get("experts")
        if not isinstance(experts, list) or len(experts) != len(self._routed_per_layer):
            raise ValueError(f"it does not have {len(self._routed_per_layer)} layers")
        for number, (layer, routed) in enumerate(zip(experts, self._routed_per_layer, strict=True)):
            if not isinstance(layer, list) or not all(type(each) is int and 0 <= each < routed for each in layer):
                raise ValueError(f"layer {number} has {routed} routed experts, and the file names another")
        return experts


Sink = Callable[[Sequence[StreamEvent]], None]
CLOSE_TIMEOUT_S = 5.0
WARM_UP_TIMEOUT_S = 120.0
REMEMBER_EVERY_S = 15.0
REMEMBERED_PAGE_INS = 256
PLAN_IN_LABEL = ("slot_bytes", "host_bytes", "kv_bytes", "max_running", "num_threads")


class Status(EngineLoad, Protocol):
    """The part of the engine's status that a worker reads."""

    @property
    def is_stepping(self) -> bool: ...
    @property
    def progress(self) -> int: ...
    @property
    def place_s(self) -> float | None: ...


class WorkerEngine(TokenEngine, Protocol):
    def status(self) -> Status: ...
    def run(self) -> None: ...  # on the thread that loaded it, until `stop`
    def stop(self, drain_s: float = 0.0) -> None: ...


@dataclass(frozen=True, slots=True)
class LoadedEngine:
    """A loader's result: an engine that does not run yet, and access to what it holds."""

    engine: WorkerEngine
    model: LoadedModel
    kv_block_bytes: int
    resident: Callable[[], Sequence[Sequence[int]]]  # per layer the routed experts in device slots
    paging: Callable[[], PagingCounts]
    tiers: Callable[[], dict[str, TierBytes]]
    page_in: Callable[[Experts, float], None]  # returns when the experts are loaded, or after this many seconds
    close: Callable[[], None]


class HostAccess(Protocol):
    """The host tier that this worker shares with the others of its node."""

    def attach(self, opened: OpenModel, plan: Plan) -> HostTier: ...
    def used_bytes(self) -> tuple[int, int]: ...


class EngineLoader(Protocol):
    """Loads a model for one worker, which is slow. Raises PagerError for what the operator can mend."""

    def __call__(
        self, config: ServiceConfig, sink: Sink, observer: WorkerObserver, host: HostAccess | None
    ) -> LoadedEngine: ...


class WorkerObserver(WorkerMetrics, EngineObserver, SubmissionObserver):
    """The worker's metrics as all three observers. It also remembers recent page-ins, on which placement depends."""

    def __init__(self, metric_tenants: str = "") -> None:
        """Makes the metrics. `metric_tenants` lists the tenants that metrics name, separated by commas."""
        super().__init__([name.strip() for name in metric_tenants.split(",") if name.strip()])
        self._recent: deque[float] = deque(maxlen=REMEMBERED_PAGE_INS)

    def transferred(self, source: str, destination: str, nbytes: int, seconds: float) -> None:
        super().transferred(source, destination, nbytes, seconds)
        if destination == "device" and seconds > 0:
            self._recent.append(nbytes / seconds)

    def page_in_bytes_per_s(self) -> float:
        """Returns the median throughput of the recent page-ins; 0 before the first."""
        recent = list(self._recent)
        return statistics.median(recent) if recent else 0.0

    def peak_page_in_bytes_per_s(self) -> float:
        """Returns an upper bound of what all readers together have reached; 0 before the first page-in."""
        return NUM_READERS * max(list(self._recent), default=0.0)


class Worker:
    """One engine on one device. `load` is called once; `health` from any thread, even during `load`."""

    def __init__(self, index: int, config: ServiceConfig, bind_host: str, load_engine: EngineLoader) -> None:
        self._index = index
        self._config = config
        self._bind_host = bind_host
        self._load_engine = load_engine
        self._observer = WorkerObserver(config.router.metric_tenants)
        self._loop = LoopThread("tokens")
        self._token = secrets.token_urlsafe(32)
        self._server = TokenServer(self._token, self._observer)
        self._lag = LoopLag(self._observer.loop_lag)
        self._metrics_server: MetricsServer | None = None
        self._loaded: LoadedEngine | None = None
        self._ready: WorkerReady | None = None
        self._is_draining = False
        self._is_closed = False
        self._warm_file: WarmFile | None = None
        self._ends = Event()

    def load(self, host: HostAccess | None = None) -> WorkerReady | PagerError:
        """Loads the model and starts to serve. Errors are returned, because Ray would wrap a raised one."""
        os.environ[NUM_THREADS] = str(self._config.workers.most_threads)  # read when torch is imported
        started = time.monotonic()
        try:
            tracing.start("expert-pager-worker", __version__, os.environ)
            loading: Future[LoadedEngine] = Future()
            Thread(target=self._run_engine, args=(host, loading), name="engine", daemon=True).start()
            loaded = self._loaded = loading.result()
            self._observer.watch_tiers(loaded.tiers)
            self._observer.watch_engine(loaded.engine.status, loaded.kv_block_bytes)
            self._observer.describe_model(_labels_of(loaded.model))
            self._metrics_server = self._serve_metrics()
        except PagerError as error:
            return error
        except Exception as error:
            log.exception("the model could not be loaded")
            return PagerError(f"the model could not be loaded: {error!r}; the worker's log has the details")
        self._warm_up(loaded)
        leave_out_of_collections()
        bind = format_address(self._bind_host, 0)
        address = self._loop.run(self._server.start(bind, loaded.engine, self._load_report))
        self._loop.run(self._lag.start())
        self._ready = WorkerReady(address, self._token, self._metrics_server.address, os.getpid(), loaded.model)
        log.info("ready after %.1f s: %s on %s", time.monotonic() - started, loaded.model.name, loaded.model.device)
        return self._ready

    def _run_engine(self, host: HostAccess | None, loading: Future[LoadedEngine]) -> None:
        """Runs the thread that loads the model and steps it: see `Engine.run`."""
        try:
            loaded = self._load_engine(self._config, self._server.deliver, self._observer, host)
        except BaseException as error:
            loading.set_exception(error)
        else:
            loading.set_result(loaded)
            loaded.engine.run()

    def ready(self) -> WorkerReady | None:
        """Returns the worker's report once it has loaded; None until then."""
        return self._ready

    def health(self) -> Health:
        if self._ready is None or self._loaded is None:
            return Health(progress=None)
        status = self._loaded.engine.status()
        return Health(status.progress if status.is_stepping else None)

    def drain(self, timeout_s: float) -> None:
        """Refuses new requests, gives those in flight so long to end, fails the rest with NotReady, and closes. Blocks.

        Routers are told, and their streams end when all has been sent. For that they have what is left of the time, and
        CLOSE_TIMEOUT_S at least.
        """
        end_s = time.monotonic() + timeout_s
        if self._ready is not None and self._loaded is not None:
            self._is_draining = True
            # There is no wait for this: what an uninformed router still sends is refused, and placed
            # elsewhere.
            self._loop.start(self._server.announce_drain())
            self._loaded.engine.stop(timeout_s)
            left_s = max(CLOSE_TIMEOUT_S, end_s - time.monotonic())
            try:
                self._loop.run(self._server.finish(left_s), left_s + CLOSE_TIMEOUT_S)
            except TimeoutError:
                log.warning("the last messages of the requests were not sent within %.1f s", left_s + CLOSE_TIMEOUT_S)
        self.close()

    def close(self) -> None:
        """Ends what is running and closes sockets and files. Best effort: the process ends next. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        self._ends.set()
        self._remember()
        with suppress(TimeoutError):
            self._loop.run(self._lag.stop(), CLOSE_TIMEOUT_S)
            self._loop.run(self._server.stop(), CLOSE_TIMEOUT_S)
        if self._metrics_server is not None:
            self._metrics_server.close()
        if self._loaded is not None:
            self._loaded.engine.stop()
            self._loaded.close()
        self._loop.stop()
        tracing.stop()

    def _warm_up(self, loaded: LoadedEngine) -> None:
        """Pages in what the last worker of this index held, and from then on saves what this one holds."""
        workers = self._config.workers
        if workers.state is None:
            return
        name = f"worker-{self._index}"
        self._warm_file = WarmFile(Path(workers.state), name, loaded.model.fingerprint, loaded.model.facts)
        experts = self._warm_file.read()
        if experts:
            started = time.monotonic()
            loaded.page_in(experts, WARM_UP_TIMEOUT_S)
            num_held, num_asked = (sum(map(len, each)) for each in (loaded.resident(), experts))
            log.info("paged in %d of %d remembered experts in %.1f s", num_held, num_asked, time.monotonic() - started)
        Thread(target=self._remember_often, name="warm set", daemon=True).start()

    def _remember_often(self) -> None:
        """Saves the warm set now and then, in case the process ends without notice."""
        while not self._ends.wait(REMEMBER_EVERY_S):
            self._remember()

    def _remember(self) -> None:
        if self._warm_file is not None and self._loaded is not None:
            self._warm_file.save(self._loaded.resident())

    def _serve_metrics(self) -> MetricsServer:
        """Serves metrics on this worker's own port or, where other indices are on other nodes, on the first free one.

        Raises PortInUse, ConfigError.
        """
        workers, registry = self._config.workers, self._observer.registry
        first = workers.metrics_port
        if not first or workers.per_node is None:
            return MetricsServer(registry, self._bind_host, first + self._index if first else 0)
        for port in range(first, first + workers.per_node - 1):
            with suppress(PortInUse):
                return MetricsServer(registry, self._bind_host, port)
        return MetricsServer(registry, self._bind_host, first + workers.per_node - 1)

    def _load_report(self) -> pb.Load:
        assert self._loaded is not None, "a load report before the model is loaded"
        status = self._loaded.engine.status()
        return pb.Load(
            **encode_paging(self._loaded.paging()),
            waiting=status.waiting,
            running=status.running,
            resident=[encode_bitmap(layer) for layer in self._loaded.resident()],
            page_in_bytes_per_s=self._observer.page_in_bytes_per_s(),
            peak_page_in_bytes_per_s=self._observer.peak_page_in_bytes_per_s(),
            place_s=status.place_s,
            draining=self._is_draining,
            kv_share=status.kv_blocks_used / max(1, status.kv_blocks_total),
        )


def _labels_of(model: LoadedModel) -> dict[str, str]:
    return {
        "version": __version__,
        "model": model.name,
        "dtype": model.dtype,
        "device": model.device,
        "fingerprint": model.fingerprint,
        "plan": ", ".join(f"{name} {model.plan_facts.get(name)}" for name in PLAN_IN_LABEL),
    }


def budgets_of(workers: WorkerConfig, *, has_host_tier: bool = True) -> Budgets:
    """Returns the budgets of one worker; the router that starts it plans with them too, before anything slow."""
    return Budgets(
        expert_memory=workers.expert_memory,
        host_memory=workers.host_memory if has_host_tier else 0,
        kv_memory=workers.kv_memory,
        max_running=workers.max_running,
        num_sharing=workers.sharing_a_node,
    )
