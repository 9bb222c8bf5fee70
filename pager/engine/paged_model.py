"""The steps from a checkpoint on disk to a transformers model whose routed experts live in slots."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from torch.nn.functional import linear

from pager.cache.device import DeviceSlots
from pager.cache.lease import Lease
from pager.cache.pager import CacheOptions, ExpertPager
from pager.cache.stats import NoObserver, PagerObserver, UsageMeter
from pager.cache.tiers import HostTier
from pager.cache.trace import TraceHeader, TraceRecorder
from pager.engine.attention import layers_in_library, layers_of
from pager.engine.experts import OpenStep, attach
from pager.engine.gates import NO_COPIES
from pager.engine.kv import LayerAttention, kv_bytes_per_token, state_bytes
from pager.engine.workspace import limit_kernels, staging_bytes, workspace_of
from pager.errors import CheckpointError, ConfigError, InvalidRequest, UnsupportedModel
from pager.memory import NUM_READERS, STAGING_BUFFERS, Budgets, Machine, Needs, Plan, plan
from pager.models.families import Family
from pager.models.open_model import OpenModel
from pager.pools.drift import check_can_drift, check_drift
from pager.pools.pick import largest_counts
from pager.pools.step import RequestRouting, StepRouting
from pager.sampling import default_sampling
from pager.types import Bytes, ExpertKey, Full, PoolPolicy, RoutingFacts, SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PagedModel:
    """A transformers model, the pager that its experts live in, and the experts that the running forward may use.

    Any thread may open a step. Steps of different threads take turns: one at a time uses the slots, so that each has
    all of them and finds its own requests. A thread may open further steps within its own.
    """

    def __init__(
        self,
        opened: OpenModel,
        model: PreTrainedModel,
        pager: ExpertPager,
        planned: Plan,
        *,
        closing: ExitStack,
    ) -> None:
        """Wraps a loaded model. `closing` lists what `close` closes."""
        self.model = model
        self.pager = pager
        self.plan = planned
        self.facts: RoutingFacts = opened.facts
        self.config = opened.config
        self.dtype = opened.dtype
        self.record = opened.record
        self.device = pager.slots.device
        self.path = opened.checkpoint.path
        self.fingerprint: str = opened.checkpoint.fingerprint
        self._open_step = OpenStep()
        if self.device.type == "cpu" and is_faster_without_onednn(model.get_output_embeddings().weight):
            run_single_rows_without_onednn(model, opened.family)
        unpoolable = attach(model, opened.family, pager, self._open_step, opened.record)
        self.family = replace(opened.family, unpoolable=unpoolable)
        self._turn = threading.RLock()  # held by the thread that has a step open
        self._closing = closing
        self._is_closed = False

    def __reduce__(self) -> NoReturn:
        raise TypeError(NO_COPIES)

    @property
    def fully_resident(self) -> bool:
        """Tells whether there is a slot for every routed expert."""
        return self.pager.num_slots >= sum(self.facts.routed_per_layer)

    @property
    def default_sampling(self) -> SamplingParams:
        """Returns what holds where a request says nothing. Raises CheckpointError for settings that no request may
        have.
        """
        try:
            return default_sampling(self.model.generation_config)
        except InvalidRequest as error:
            path = self.path / "generation_config.json"
            raise CheckpointError(f"{path} is not valid: {error.message}; repair it or remove it") from None

    @property
    def open_step(self) -> StepRouting | None:
        """The innermost step that the calling thread has open: what the model runs belongs to its requests."""
        return self._open_step.routing

    @contextmanager
    def step(
        self,
        requests: Sequence[RequestRouting],
        *,
        rows: Tensor | None = None,
        valid: Tensor | None = None,
        prefill: bool = False,
        beside: StepRouting | None = None,
    ) -> Iterator[StepRouting]:
        """Runs the block in a new step of these requests, and hands its measurements to them. T tokens in flattened
        [B·S] order; see `StepRouting` for the arguments and `running` for the rest.
        """
        step = StepRouting(requests, rows=rows, valid=valid, prefill=prefill, beside=beside)
        with self.running(step):
            yield step
        step.settle()

    @contextmanager
    def running(self, step: StepRouting) -> Iterator[None]:
        """Makes what the model runs in the block belong to the requests of `step`. Waits for the steps of other
        threads.

        Raises ConfigError once the model is closed.
        """
        with self._turn:
            if self._is_closed:
                raise ConfigError("this model was closed, and its experts can no longer be read; load it once more")
            around = self._open_step.routing
            self._open_step.routing = step
            try:
                with step.forward():
                    yield
            finally:
                self._open_step.routing = around
                step.share_costs(self.pager.close_account)

    @cached_property
    def layers(self) -> tuple[LayerAttention, ...]:
        """The attention of each layer in the engine: what it keeps and what it sees. Raises UnsupportedModel."""
        return layers_of(self.config, self.dtype)

    @cached_property
    def keeps_states(self) -> bool:
        """Tells whether layers hand on more than keys and values: then prompts run whole, and share no prefixes."""
        return any(each.state is not None for each in self.layers)

    def routing(
        self, policy: PoolPolicy, *, lease: Lease | None = None, meter: UsageMeter | None = None
    ) -> RequestRouting:
        """Returns the routing of a new request. Raises PoolTooSmall, InvalidRequest, UnsupportedModel."""
        self.check_policy(policy)
        return RequestRouting(self.facts, policy, device=self.device, lease=lease, meter=meter)

    def slots_needed(self, policy: PoolPolicy, tenant: str = "") -> int:
        """The slots to reserve before a request of the tenant starts.

        Raises PoolTooLarge, and what `check_policy` raises.
        """
        self.check_policy(policy)
        if policy.fixed is not None:
            needed = policy.fixed.num_experts
        elif isinstance(policy.size, Full):
            needed = max(self.facts.top_k_per_layer, default=0)
        else:
            needed = sum(largest_counts(policy.size, self.facts))
        self.pager.check_size(needed, tenant)
        return needed

    def reserve(self, policy: PoolPolicy, usage: UsageMeter | None = None, *, evicts: bool = True) -> Lease | None:
        """All the slots a request will need, or None when not to be had now. A known pool starts to load at once;
        unless it `evicts`, only into slots that are free.
        """
        needed = self.slots_needed(policy, "" if usage is None else usage.tenant)
        if policy.fixed is not None:
            return self.pager.reserve_pool(policy.fixed.keys(), usage, evicts=evicts)
        return self.pager.reserve(needed, usage)

    def reserve_in_place(self, policy: PoolPolicy, usage: UsageMeter) -> Lease | None:
        """A lease without slots, where the page cache has the experts that the request may use: those of a known pool,
        or for an exact one whichever it will want. None for a pool that its prefill chooses, or that drift may change.
        """
        if policy.drift is not None or not (policy.fixed is not None or isinstance(policy.size, Full)):
            return None
        return self.pager.lease_in_place(list(policy.fixed.keys()) if policy.fixed is not None else [], usage)

    def take_slots(self, policy: PoolPolicy, lease: Lease, tenant: str) -> bool:
        """Gives a lease without slots all that its request needs, or finds a pool in the page cache again. Returns
        whether. Raises PoolTooLarge where the slots can never be had, as when another tenant was guaranteed them.
        """
        needed = self.slots_needed(policy, tenant)
        if policy.fixed is None:
            return lease.become((), needed)
        keys = list(policy.fixed.keys())
        return lease.become(keys) or self.pager.has_in_place(keys)

    def check_policy(self, policy: PoolPolicy) -> None:
        """Checks a policy. Raises PoolTooSmall, InvalidRequest, UnsupportedModel."""
        check_can_drift(policy)
        if policy.drift is not None:
            check_drift(policy.drift)
        if isinstance(policy.size, Full) and policy.fixed is None:
            return
        unpoolable = self.family.unpoolable
        if unpoolable is not None:
            raise UnsupportedModel(f"this model runs with all its experts only: {unpoolable}; ask for the full model")
        if isinstance(policy.size, Bytes) and policy.fixed is None:
            raise InvalidRequest(
                "a prefill chooses its pool layer by layer and cannot share bytes out over layers that it has not "
                "seen; give a count ('32'), a share ('12.5%') or a count for each layer ('16,24,32')",
                field="pool.size.bytes",
            )
        largest_counts(policy.size, self.facts)

    def close(self) -> None:
        """Stops the readers and releases the tiers. The model cannot run afterwards. Idempotent."""
        self._is_closed = True
        self._closing.close()


@torch.inference_mode(False)  # reader threads fill the slots, which they could not do if the caller's mode marked them
def load_paged_model(
    path: str | Path,
    *,
    device: str = "cpu",
    dtype: torch.dtype | str | None = None,
    budgets: Budgets | None = None,
    host_tier: Callable[[OpenModel, Plan], HostTier] | None = None,
    cache: CacheOptions | None = None,
    observer: PagerObserver | None = None,
    trace: Path | None = None,
) -> PagedModel:
    """Plans the memory, loads trunk and shared experts and opens the experts' tiers.

    Where the plan has a host tier, `host_tier` makes it; without one, the tier is this process's own. The model then
    owns it. `trace` names a file to record every access to an expert in (`pager.cache.trace`). Raises CheckpointError,
    UnsupportedModel, BudgetError, ConfigError.
    """
    cache, budgets = cache or CacheOptions(), budgets or Budgets()
    if cache.num_readers < 1:
        raise ConfigError(f"num_readers must be at least 1, not {cache.num_readers}: no thread would read experts")
    opened = OpenModel.open(path, dtype, device=device)
    with opened.checkpoint, ExitStack() as closing:
        machine = Machine.detect(device)  # refuses an unknown device
        if opened.record is not None:
            opened.record.check_machine(device, opened.dtype)
        planned = plan(needs_of(opened, device, cache.num_readers), budgets, machine)
        limit_kernels(planned)
        source = opened.open_experts()
        closing.callback(source.close)
        model = opened.load_trunk(device)
        host = (host_tier or own_host_tier)(opened, planned) if planned.host_records else None
        if host is not None:
            closing.callback(host.close)
        facts, resident = opened.facts, shared_experts(opened.facts)
        slots = DeviceSlots(
            planned.num_slots,
            opened.slot_shape,
            opened.slot_dtype,
            device,
            num_layers=facts.num_layers,
            max_experts=max(facts.experts_per_layer),
            num_pinned=len(resident),
        )
        recorder = None
        if trace is not None:
            header = TraceHeader(opened.checkpoint.fingerprint, planned.expert_bytes, facts.routed_per_layer)
            recorder = TraceRecorder(trace, header, (observer or NoObserver()).traced)
            closing.callback(recorder.close)
        pager = ExpertPager(
            source, slots, resident=resident, host=host, options=cache, observer=observer, trace=recorder
        )
        closing.callback(pager.close)
        return PagedModel(opened, model, pager, planned, closing=closing.pop_all())


# --- products of one row ----------------------------------------------------------------------------------------------
#
# torch hands products in half precision to oneDNN. With one row, its own loops read the matrix up to twice as fast.


WORTH = 1.25
"""The own loops have to be this many times as fast, so that processes on alike machines choose alike."""

TRIED_BYTES, LEAST_PARTS, MOST_PARTS = 2**21, 8, 32


class _WithoutOneDnn:
    """A switch: oneDNN is off in the process while some thread is in a block. Mutable, thread-safe.

    Whatever other threads compute meanwhile takes longer, and differs by rounding.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_inside = 0

    def __enter__(self) -> None:
        with self._lock:
            self._num_inside += 1
            torch.backends.mkldnn.enabled = False  # type: ignore[assignment]

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._num_inside -= 1
            if not self._num_inside:
                torch.backends.mkldnn.enabled = True  # type: ignore[assignment]


_without_onednn = _WithoutOneDnn()


@torch.inference_mode()
def is_faster_without_onednn(matrix: Tensor) -> bool:
    """Tells whether this machine multiplies one row faster by torch's own loops, in half precision.

    It tries with a few dozen parts of a large matrix, each read once and so from memory. A processor's caches hold a
    matrix of fewer parts, and oneDNN is as fast with what they hold.
    """
    parts = matrix.split(max(1, TRIED_BYTES // matrix[:1].nbytes))[:MOST_PARTS]
    if matrix.dtype == torch.float32 or len(parts) < LEAST_PARTS or not torch.backends.mkldnn.enabled:
        return False
    row = torch.ones(1, matrix.shape[1], dtype=matrix.dtype)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for number, part in enumerate(parts):
        with _without_onednn if number % 2 else nullcontext():
            started_s = time.perf_counter()
            linear(row, part)
            seconds[bool(number % 2)].append(time.perf_counter() - started_s)
    return statistics.median(seconds[False]) >= WORTH * statistics.median(seconds[True])


def run_single_rows_without_onednn(model: PreTrainedModel, family: Family) -> None:
    """Makes forwards of one token, of one text, run without oneDNN, and so an expert that one token has for itself."""
    for layer in family.layers:
        model.get_submodule(layer.experts).one_row = _without_onednn
    forward = model.forward

    @wraps(forward)
    def forward_once(*args: Any, **kwargs: Any) -> Any:
        tokens = kwargs.get("input_ids", args[0] if args else None)
        if not isinstance(tokens, torch.Tensor) or tokens.numel() != 1:
            return forward(*args, **kwargs)
        with _without_onednn:
            return forward(*args, **kwargs)

    object.__setattr__(model, "forward", forward_once)


def shared_experts(facts: RoutingFacts) -> list[ExpertKey]:
    """Returns the shared experts, the last of their layers: every token uses them, so they stay in memory."""
    layers = zip(facts.experts_per_layer, facts.shared_per_layer, strict=True)
    return [
        ExpertKey(layer, expert)
        for layer, (experts, shared) in enumerate(layers)
        for expert in range(experts - shared, experts)
    ]


def own_host_tier(opened: OpenModel, planned: Plan) -> HostTier:
    """Makes a host tier that no other process shares. Raises BudgetError."""
    return HostTier.create(planned.host_bytes, opened.slot_shape, opened.slot_dtype)


def needs_of(opened: OpenModel, device: str, num_readers: int = NUM_READERS) -> Needs:
    """Returns what the planner has to know of a model that is to run on `device`, with torch's threads as they are
    now.
    """
    layers = layers_in_library(opened)
    return Needs(
        trunk_bytes=opened.trunk_bytes,
        expert_bytes=opened.expert_bytes,
        facts=opened.facts,
        kv_bytes_per_token=kv_bytes_per_token(layers, opened.dtype),
        state_bytes=state_bytes(layers),
        context_tokens=opened.config.max_position_embeddings,
        staging_bytes=staging_bytes(opened, device, num_readers=num_readers, num_buffers=STAGING_BUFFERS),
        workspace=workspace_of(opened, device, layers, num_readers=num_readers),
    )
