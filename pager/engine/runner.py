"""Forwards of the model over KV blocks, their recording as CUDA graphs, and the number of threads that compute them on
a CPU.

Legend: B rows, S new tokens a row, C tokens of context, V vocabulary, L layers, E experts of a layer.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pager.cache.device import DeviceSlots
from pager.engine import attention
from pager.engine.attention import KvStep, PromptStep, RowContexts
from pager.engine.kv import KvCache, blocks_for, token_slots
from pager.engine.paged_model import PagedModel
from pager.engine.sampler import logprobs_of
from pager.engine.states import StateStep
from pager.errors import UnsupportedModel
from pager.pools.step import RequestRouting
from pager.sampling import not_applied
from pager.types import Count, ExpertPool, PoolPolicy, PoolSource, TokenLogprobs

log = logging.getLogger(__name__)

STEPS_BEFORE_CAPTURE = 4
"""Steps of a group before it is recorded: one that changes sooner never is. A new shape first runs once unrecorded."""

Step = Callable[[], Tensor]
Capture = Callable[[Step], Step]
"""Records a step's device work without doing it. The returned function does it, and returns the step's result."""


class CudaCapture:
    """Graphs on the current device that share their memory: one of them is used at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._latest: torch.cuda.CUDAGraph | None = None  # memory that no graph shares any more is lost for good

    def __call__(self, step: Step) -> Step:
        graph = torch.cuda.CUDAGraph()
        # The outer block restores this stream even if the capture cannot be ended. Device work of other
        # threads, such as those that read experts, is not captured.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
        ):
            result = step()
        self._latest = graph

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


def capture_on(device: torch.device) -> Capture | None:
    """Returns the function that records steps on this device; None where they are not recorded."""
    return CudaCapture() if device.type == "cuda" else None


class Recorder:
    """Records steps until one cannot be recorded; from then on it is off. Mutable."""

    def __init__(self, capture: Capture | None) -> None:
        self._capture = capture

    @property
    def is_on(self) -> bool:
        return self._capture is not None

    def record(self, step: Step) -> Step | None:
        """Returns the step's replay; None, with a warning, where it cannot be recorded."""
        assert self._capture is not None, "it is off"
        try:
            return self._capture(step)
        except Exception as error:
            self._capture = None
            log.warning("decode steps run without a CUDA graph from now on, as one could not be recorded: %s", error)
            return None


class GroupGraph:
    """The graph of one group, if it has one now. Mutable."""

    def __init__(self) -> None:
        self._num_to_run = STEPS_BEFORE_CAPTURE
        self._made_for: tuple[object, ...] = ()
        self._replay: Step | None = None

    def replay(self, *made_for: object, record: Callable[[], Step | None]) -> Step | None:
        """Returns the replay of the next step; None when the step itself has to run. `made_for` is everything that a
        graph depends on.
        """
        if self._made_for != made_for:
            self._made_for, self._replay = made_for, None
            self._num_to_run = max(1, self._num_to_run)
        if self._num_to_run:
            self._num_to_run -= 1
        elif self._replay is None:
            self._replay = record()
        return self._replay


@dataclass(frozen=True, slots=True)
class RowStart:
    """The start of a batch's row: its block table, the token to run next, that token's position, and the place of its
    state.
    """

    blocks: Sequence[int]
    token_id: int
    position: int
    place: int = 0


@dataclass(frozen=True, slots=True)
class PromptPart:
    """Tokens of one prompt that run in a forward, after `num_past` tokens of the same prompt that ran before.

    `prompt_tokens` is the length of the whole prompt, `place` where its state is kept.
    """

    token_ids: Sequence[int]
    blocks: Sequence[int]
    num_past: int = 0
    prompt_tokens: int = 0
    place: int = 0

    @property
    def positions(self) -> range:
        return range(self.num_past, self.num_past + len(self.token_ids))


class DecodeBatch:
    """The device state of a fixed set of requests, one token a step each. Made anew when the set changes; mutable.

    Its tensors stay in place, so that a recorded step finds in them what the last one left.
    """

    @torch.inference_mode(False)  # tensors made in inference mode could not be changed outside of it
    def __init__(self, rows: Sequence[RowStart], device: torch.device) -> None:
        self._slots_BC = token_slots([row.blocks for row in rows], device)
        self.token_B1 = torch.tensor([[row.token_id] for row in rows], device=device)
        self.position_B1 = torch.tensor([[row.position] for row in rows], device=device)
        self._place_B = torch.tensor([row.place for row in rows], device=device)
        self.context = 1 + max(row.position for row in rows)

    def padded_context(self, cache: KvCache) -> int:
        """The context, or somewhat more: by a quarter at most from 256 tokens on. It seldom changes."""
        unit = 1 << max(6, (self.context - 1).bit_length() - 3)
        return min(-(-self.context // unit) * unit, self._slots_BC.shape[1], cache.gather_tokens)

    def kv_step(
        self, cache: KvCache, padded_context: int | None = None, on_layer: Callable[[], None] = lambda: None
    ) -> KvStep:
        """Returns what the next step reads and writes. With `padded_context`, nothing in it changes shape until that
        does. `on_layer` is called before every layer that has a state.
        """
        slots_BC = self._slots_BC[:, : padded_context or self.context]
        write_B = self._slots_BC.gather(1, self.position_B1)[:, 0]
        is_full = len(slots_BC) == 1 and padded_context is None
        position_B = self.position_B1[:, 0]
        states = None
        if cache.states:
            states = StateStep(cache.states, self._place_B, position_B, position_B + 1, on_layer)
        contexts = RowContexts(slots_BC, self.position_B1, cache.dtype, is_full=is_full)
        return KvStep(cache, write_B, contexts, states=states)

    def advance(self, token_B: torch.Tensor) -> None:
        """Makes the sampled tokens the next step's input."""
        self.feed(token_B)
        self.count_step()

    def feed(self, token_B: torch.Tensor) -> None:
        """Does the device's part of `advance`."""
        self.token_B1.copy_(token_B[:, None])
        self.position_B1 += 1

    def count_step(self) -> None:
        """Does the host's part of `advance`."""
        self.context += 1


class ModelRunner:
    """Owns the KV tensors and calls the model. Used by one thread; `num_layers_run` may be read by any."""

    def __init__(
        self,
        model: PreTrainedModel,
        cache: KvCache,
        device: torch.device,
        *,
        on_layer: Callable[[], None] = lambda: None,
    ) -> None:
        """Sets the model up. `on_layer` is called before every layer of a forward; an exception from it leaves the
        forward.

        `cache` is made for the model's `attention.layers_of`. Raises UnsupportedModel where rows cannot run beside each
        other.
        """
        attention.install(model)
        self._rotary = attention.install_rotary(model)
        self.num_layers_run = 0
        self._on_layer = on_layer
        self._model: Callable[..., object] = model
        self._base = model.base_model
        self._head = model.get_output_embeddings()
        if settings := not_applied(model.generation_config):
            log.warning(
                "the model's generation_config.json has %s, which pager.load_model applies and this engine does not; "
                "its answers are those without",
                ", ".join(settings),
            )
        vocabulary = range(self._head.weight.shape[0])  # transformers lets others pass, too
        suppressed = [each for each in model.generation_config.suppress_tokens or [] if each in vocabulary]
        self._suppressed = torch.tensor(suppressed, dtype=torch.long, device=device) if suppressed else None
        self._cache = cache
        self.device = device

    def is_long(self, num_tokens: int) -> bool:
        """Tells whether a prompt of this many tokens has other keys than a shorter one that begins alike."""
        return self._rotary is not None and self._rotary.is_long(num_tokens)

    @property
    def keeps_states(self) -> bool:
        """Tells whether layers hand on more than keys and values."""
        return bool(self._cache.states)

    @property
    def shares_prefills(self) -> bool:
        """Tells whether prompts may run together: not where a row's length decides on its rotary tables, nor where a
        layer hands a state from each token of a row to the next.
        """
        return self._rotary is None and not self.keeps_states

    @torch.inference_mode()
    def prefill(self, parts: Sequence[PromptPart], rows: DecodeBatch | None = None) -> torch.Tensor:
        """Returns [N, V] logits after the last token of each part, and then of each of `rows`, by one forward. Takes
        more than one part only where it `shares_prefills`.
        """
        is_lone = len(parts) == 1 and rows is None
        assert is_lone or self.shares_prefills, "the lengths of these prompts would change each other's answers"
        writes, prompts, num_before = [], [], 0
        for part in parts:
            start, end = part.num_past, part.num_past + len(part.token_ids)
            slots_C = token_slots([part.blocks], self.device)[0, :end]
            writes.append(slots_C[start:])
            read_1C = slots_C[None] if start else None
            prompts.append(PromptStep(num_before, num_before + end - start, start, read_1C))
            num_before += end - start
        token_1T = torch.tensor([[token for part in parts for token in part.token_ids]], device=self.device)
        position_1T = torch.tensor([[position for part in parts for position in part.positions]], device=self.device)
        ends_N = torch.tensor([prompt.end - 1 for prompt in prompts], device=self.device)
        contexts = None
        if rows is not None:
            step = rows.kv_step(self._cache)
            contexts = step.rows
            writes.append(step.write_T)
            token_1T = torch.cat([token_1T, rows.token_B1.T], 1)
            position_1T = torch.cat([position_1T, rows.position_B1.T], 1)
            ends_N = torch.cat([ends_N, torch.arange(num_before, token_1T.shape[1], device=self.device)])
        step = KvStep(self._cache, torch.cat(writes), contexts, prompts, self._states_of(parts[0]))
        return self._forward(token_1T, position_1T, step, prompt_tokens=parts[0].prompt_tokens, kept=ends_N)[0]

    def _states_of(self, part: PromptPart) -> StateStep | None:
        """Returns the states of a forward that runs a part of one prompt; None for a model without."""
        if not self.keeps_states:
            return None
        place, before, after = (
            torch.tensor([each], device=self.device)
            for each in (part.place, part.num_past, part.num_past + len(part.token_ids))
        )
        return StateStep(self._cache.states, place, before if part.num_past else None, after, self._begin_layer)

    @contextmanager
    def keeping_hidden(self) -> Iterator[list[Tensor]]:
        """Yields a list that holds, after a forward in the block, the last hidden states [1, S, D] of its tokens."""
        kept: list[Tensor] = []

        def keep(_: object, __: object, output: Any) -> None:
            kept[:] = [output.last_hidden_state]  # of the forward that ends last: others may run within it

        hook = self._base.register_forward_hook(keep)
        try:
            yield kept
        finally:
            hook.remove()

    @torch.inference_mode()
    def prompt_logprobs(
        self, kept: Sequence[Tensor], logits_1V: Tensor, next_ids: Sequence[int], num_top: int
    ) -> list[TokenLogprobs]:
        """Returns the log-probabilities of `next_ids`, which follow the tokens of a forward whose hidden states were
        kept.

        Logits are computed for some of the tokens at a time: as many as fit into the memory that the layers leave.
        Raises UnsupportedModel where the model does more with its head's output than return it.
        """
        hidden_SD = kept[0][0]
        last_1V = self._without_suppressed(self._head(hidden_SD[-1:]))
        if not torch.allclose(last_1V.float(), logits_1V.float(), rtol=1e-2, atol=1e-2):
            raise UnsupportedModel(
                "this model changes the output of its head, so that logits of its prompt are not known"
            )
        num_tokens = max(4, min(256, 2 * hidden_SD.shape[1] * len(hidden_SD) // logits_1V.shape[1]))
        found: list[TokenLogprobs] = []
        for start in range(0, len(next_ids), num_tokens):
            ids = next_ids[start : start + num_tokens]
            found += logprobs_of(self._head(hidden_SD[start : start + len(ids)]), ids, [num_top] * len(ids))
        return found

    def padded_context(self, batch: DecodeBatch) -> int:
        """The context to `decode` with where a step is to have the shapes of the last one."""
        return batch.padded_context(self._cache)

    @torch.inference_mode()
    def decode(self, batch: DecodeBatch, padded_context: int | None = None) -> torch.Tensor:
        """Returns [B, V] logits of every row's next token, by one forward. It does not wait for the device."""
        step = batch.kv_step(self._cache, padded_context, self._begin_layer)
        return self._forward(batch.token_B1, batch.position_B1, step)[:, -1]

    @torch.inference_mode()
    def _forward(
        self,
        token_BS: torch.Tensor,
        position_BS: torch.Tensor,
        step: KvStep,
        *,
        prompt_tokens: int = 0,
        kept: torch.Tensor | int = 1,
    ) -> torch.Tensor:
        """Returns [B, kept, V] logits of every row's last tokens, or of those at the places that `kept` has."""
        if self._rotary is not None:
            self._rotary.prompt_tokens = prompt_tokens
        cache = {} if step.states is None else {"past_key_values": step.states}
        output = self._model(
            input_ids=token_BS,
            position_ids=position_BS,
            use_cache=False,
            output_router_logits=False,
            logits_to_keep=kept,
            kv_step=step,
            on_layer=self._begin_layer,
            **cache,
        )
        if step.states is not None:
            step.states.finish()
        return self._without_suppressed(output.logits)  # type: ignore[attr-defined]

    def _without_suppressed(self, logits: Tensor) -> Tensor:
        """Logits in which the tokens that the model's own settings rule out have none."""
        return logits if self._suppressed is None else logits.index_fill(-1, self._suppressed, -torch.inf)

    def _begin_layer(self) -> None:
        self.num_layers_run += 1
        self._on_layer()


# More threads make a small model slower: OpenMP starts and ends a team for each operation, and a team waits for its
# last thread, whose core another process may be using.
BATCHES = (1, 8)
CONTEXT_TOKENS = 64
TIME_S = 1.0  # no round begins after that; there is at least one
MAX_ROUNDS = 15
WORTH = 1.1  # a step has to be this many times as fast to justify more threads, which others could use


def use_fastest_num_threads(paged: PagedModel, most: int) -> int:
    """Measures which number of threads computes steps fastest, sets it for this thread and later ones, and returns it.

    To be called before anything is paged, by the thread that will step. The measurement pages nothing: it uses slots as
    if they held experts.
    """
    if paged.device.type != "cpu" or most == 1:
        torch.set_num_threads(most)
        return most
    seconds = step_seconds(paged, [*(1 << power for power in range((most - 1).bit_length())), most])
    chosen = choose(seconds)
    torch.set_num_threads(chosen)
    for count, found in seconds.items():
        told = ", ".join(f"{1e3 * each:.2f} ms with {rows}" for rows, each in zip(BATCHES, found, strict=True))
        log.info("threads %d: a step took %s rows%s", count, told, "; chosen" if count == chosen else "")
    return chosen


def choose(seconds: dict[int, list[float]]) -> int:
    """Returns the number of threads, from the seconds of a step of each batch with each number, in rising order."""
    chosen, *others = seconds
    for count in others:
        gains = [before / now for before, now in zip(seconds[chosen], seconds[count], strict=True)]
        if statistics.geometric_mean(gains) >= WORTH:
            chosen = count
    return chosen


def step_seconds(paged: PagedModel, counts: list[int]) -> dict[int, list[float]]:
    """The median time of a decode step of each of BATCHES, by the number of threads; they take turns."""
    cache = KvCache(paged.layers, blocks_for(CONTEXT_TOKENS), paged.dtype, paged.device)
    runner = ModelRunner(paged.model, cache, paged.device)
    pool = ExpertPool(tuple(tuple(range(routed)) for routed in paged.facts.routed_per_layer))
    policy = PoolPolicy(Count(max(paged.facts.routed_per_layer)), PoolSource.FIXED, pool)
    row = RowStart(range(blocks_for(CONTEXT_TOKENS)), 0, CONTEXT_TOKENS - 1)
    taken: dict[int, list[list[float]]] = {count: [[] for _ in BATCHES] for count in counts}
    end_s = time.perf_counter() + TIME_S
    with _all_in_slots(paged.pager.slots):
        for number in range(1 + MAX_ROUNDS):
            if number > 1 and time.perf_counter() > end_s:
                break
            for count in counts:
                torch.set_num_threads(count)
                for times, num_rows in zip(taken[count], BATCHES, strict=True):
                    started_s = time.perf_counter()
                    lease = paged.pager.reserve(0)  # reserves nothing: every expert counts as loaded
                    requests = [RequestRouting(paged.facts, policy, lease=lease) for _ in range(num_rows)]
                    with paged.step(requests):
                        runner.decode(DecodeBatch([row] * num_rows, paged.device))
                    if number:  # the first one makes buffers, kernels and teams
                        times.append(time.perf_counter() - started_s)
    return {count: [statistics.median(times) for times in batches] for count, batches in taken.items()}


@contextmanager
def _all_in_slots(slots: DeviceSlots) -> Iterator[None]:
    """Makes the map find every expert in some slot, whatever its bytes are."""
    slot_of_LE = slots.slot_of_LE
    held_LE = slot_of_LE.clone()
    is_absent_LE = held_LE < 0
    numbers = torch.arange(int(is_absent_LE.sum()), dtype=held_LE.dtype)
    slot_of_LE[is_absent_LE] = numbers % max(1, slots.num_slots)
    try:
        yield
    finally:
        slot_of_LE.copy_(held_LE)
