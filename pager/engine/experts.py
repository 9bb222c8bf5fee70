"""The experts function that transformers' models call, and the kernels that multiply tokens with experts in slots."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, nullcontext
from copy import copy
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, linear
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from pager.cache.device import DeviceSlots
from pager.cache.pager import ExpertPager
from pager.engine.gates import NO_COPIES, put_under_pools, unmasked
from pager.errors import ConfigError
from pager.models.families import ExpertLayer, Family
from pager.pools.step import StepRouting
from pager.store.expert_source import InPlace, SideBySide
from pager.store.pack_format import RecordFormat, scales_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SMALL_EXPERT_BYTES = 128 * 1024
"""Up to this size a kernel call costs more than copying an expert, so copies are multiplied by one call."""

COPIED_PAIRS = 256
"""The most experts that are copied together."""

MOST_COPIED_BYTES = 36 * 1024**2
"""The most that is copied for one call in half precision, COPIED_PAIRS at a time. Copies of 24 KiB take 2 µs a pair; a
call for each expert takes 31 µs an expert. With 16 to 127 experts copies are faster up to 1,536 pairs.
"""

GATHERED_BYTES = 8 * 1024**2
"""The most that is copied to have a layer's small experts side by side, from slots and page cache; above that they are
multiplied where they are."""

COPIED_ROWS = 1024
"""The most rows that are computed when every token goes through every copied expert."""

HALF_PRECISION_ROWS = 16
"""The rows of a oneDNN tile. oneDNN compiles a kernel of 0.7 MB, in a millisecond, for every new number of rows."""

TURNED_ROWS, LEAST_TURNED_BYTES, MOST_TURNED_INPUTS = frozenset({32, 64}), 2**21, 3072
"""The numbers of rows that are multiplied as columns, behind a large matrix: oneDNN then reads the matrix as it lies,
in 0.77 (32 rows) and 0.88 (64) of the time, with the same results to the bit. Other numbers of rows gain nothing, and
matrices with 4,096 inputs take longer (AVX512-BF16, no AMX).
"""

ROWS_TOGETHER = 128
"""The rows up to which experts are computed together, so that gathering and gating are done once for all of them."""

SUMMED_BYTES, LEAST_SUMMED_COLUMNS = 1 << 20, 16
"""The outputs of pairs that are weighted and added up at a time, in fp32."""

_AS_IT_IS = nullcontext()

Kernel = Callable[[Any, Tensor, Tensor, Tensor], Tensor]
"""`kernel(module, hidden_TD, slot_TK, weights_TK)` → [T, D]: the weighted sum of each token's experts."""


def run_slots(module: Any, hidden_TD: Tensor, slot_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Returns [T, D] from experts that are all in their slots."""
    if hidden_TD.device.type != "cpu":
        return grouped(module, hidden_TD, slot_TK, weights_TK)
    num_tokens, num_picks = slot_TK.shape
    if isinstance(module, AlsoInPlace) and is_plain(module):
        return (pairs_in_place if num_tokens == 1 else sorted_pairs)(module, hidden_TD, slot_TK, weights_TK)
    if not is_plain(module):
        if num_tokens == 1 and quantised_in(module):
            return quantised_pairs(module, hidden_TD, slot_TK, weights_TK)
        return sorted_pairs(module, hidden_TD, slot_TK, weights_TK)
    if num_tokens == 1:
        is_small = 3 * module.down_proj[0].nbytes <= SMALL_EXPERT_BYTES
        return (copied_pairs if is_small else pairs_in_place)(module, hidden_TD, slot_TK, weights_TK)
    num_pairs, expert_bytes = num_tokens * num_picks, 3 * module.down_proj[0].nbytes
    is_half = hidden_TD.dtype != torch.float32
    if expert_bytes > SMALL_EXPERT_BYTES:
        return sorted_pairs(module, hidden_TD, slot_TK, weights_TK)
    if num_pairs > COPIED_PAIRS:
        if not is_half or num_pairs * expert_bytes > MOST_COPIED_BYTES:
            return sorted_pairs(module, hidden_TD, slot_TK, weights_TK)
        parts = (tensor.split(max(1, COPIED_PAIRS // num_picks)) for tensor in (hidden_TD, slot_TK, weights_TK))
        return torch.cat([run_slots(module, *part) for part in zip(*parts, strict=True)])
    slot_U, place_TK = slot_TK.unique(return_inverse=True)
    num_rows = num_tokens * len(slot_U)
    # In half precision a batched product of matrices is slow, one of vectors is not.
    is_shared = 2 * len(slot_U) <= num_pairs or not is_half
    if is_shared and num_rows <= COPIED_ROWS:
        return _run_copied_experts(module, hidden_TD, slot_U, place_TK, weights_TK)
    return copied_pairs(module, hidden_TD, slot_TK, weights_TK)


def is_plain(module: Any) -> bool:
    """Tells whether the experts are gate, up and down matrices in multiplication layout, without biases or norms of
    their own.
    """
    if quantised_in(module):
        return False
    others = ("has_bias", "is_transposed", "has_post_expert_norm")
    return getattr(module, "has_gate", True) and not any(getattr(module, name, False) for name in others)


def any_expert(module: Any, slot: int, hidden_ND: Tensor) -> Tensor:
    """Returns [N, D] from the expert in a slot, whatever parameters its module has."""
    quantised = quantised_in(module)
    if quantised is not None:
        return quantised.down(slot, module._apply_gate(quantised.gate_up(slot, hidden_ND)))
    name = "gate_up_proj" if module.has_gate else "up_proj"
    inner = _projected(module, name, slot, hidden_ND)
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    out_ND = _projected(module, "down_proj", slot, inner)
    return module.post_expert_norm(out_ND) if getattr(module, "has_post_expert_norm", False) else out_ND


class QuantisedSlabs:
    """The slabs of experts in 8 or 4 bits, and the products of rows with one of them."""

    def __init__(self, record: RecordFormat, slabs: Mapping[str, Tensor]) -> None:
        self._record = record
        self._product = record.product
        typed = record.views(slabs)
        self._parts = {name: part.unbind() for name, part in typed.items()}

    def also(self, experts: Mapping[str, Sequence[Tensor]]) -> QuantisedSlabs:
        """Returns the same with further experts, numbered behind the slots. `experts` has a part of each by name."""
        further = [
            self._record.views(dict(zip(experts, parts, strict=True))) for parts in zip(*experts.values(), strict=True)
        ]
        found = copy(self)
        found._parts = {name: (*parts, *(each[name] for each in further)) for name, parts in self._parts.items()}
        return found

    def gate_up(self, slot: int, hidden_ND: Tensor) -> Tensor:
        return self._times("gate_up_proj", slot, hidden_ND)

    def down(self, slot: int, inner_NF: Tensor) -> Tensor:
        return self._times("down_proj", slot, inner_NF)

    def _times(self, name: str, slot: int, rows_ND: Tensor) -> Tensor:
        return self._product(rows_ND, self._parts[name][slot], self._parts[scales_of(name)][slot])


def quantised_in(module: Any) -> QuantisedSlabs | None:
    """Returns the quantised slabs of a module; None where its experts are plain floats."""
    return getattr(module, "quantised", None)


def quantised_pairs(module: Any, hidden_TD: Tensor, slot_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Computes one token's experts in 8 or 4 bits, one after the other."""
    quantised, slots = module.quantised, slot_TK[0].tolist()
    inner_PF = module._apply_gate(torch.cat([quantised.gate_up(slot, hidden_TD) for slot in slots]))
    out_PD = torch.cat([quantised.down(slot, inner_PF[place, None]) for place, slot in enumerate(slots)])
    return _weighted(out_PD[None], weights_TK)


class AlsoInPlace:
    """A module's experts in their slots and, numbered behind these, the ones that are computed where the page cache has
    them.
    """

    def __init__(self, module: Any, slots: DeviceSlots, in_place: Mapping[int, InPlace]) -> None:
        self._module = module
        self._numbers = {expert: slots.total_slots + number for number, expert in enumerate(in_place)}
        further = zip(slots.slabs, zip(*in_place.values(), strict=True), strict=True)
        quantised = quantised_in(module)
        if quantised is not None:
            self.quantised = quantised.also({name: [whole for (whole,) in pieces] for name, pieces in further})
        else:
            for name, pieces in further:
                setattr(self, name, _Further(getattr(module, name), pieces))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def numbered(self, slot_of_E: Tensor) -> Tensor:
        """Returns the slot of each expert, or its number behind the slots."""
        numbers_E = slot_of_E.clone()
        numbers_E[list(self._numbers)] = torch.tensor(list(self._numbers.values()), dtype=slot_of_E.dtype)
        return numbers_E


class InFile:
    """A module's small experts, all of them where they lie side by side in a file that the page cache has."""

    def __init__(self, module: Any, names: Iterable[str], found: SideBySide) -> None:
        self._module = module
        for name, parameter in zip(names, found.parameters, strict=True):
            setattr(self, name, parameter)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class Gathered:
    """Small experts of a layer, copied side by side for one call, from slots and from where the page cache has them."""

    def __init__(
        self, module: Any, slots: DeviceSlots, slot_of: Mapping[int, int], in_place: Mapping[int, InPlace]
    ) -> None:
        self._module = module
        self._experts = [*slot_of, *in_place]
        slot_N = torch.tensor(list(slot_of.values()), dtype=torch.long)
        for (name, slab), further in zip(slots.slabs.items(), zip(*in_place.values(), strict=True), strict=True):
            side_by_side = slab.new_empty(len(self._experts), *slab.shape[1:])
            torch.index_select(slab, 0, slot_N, out=side_by_side[: len(slot_N)])
            pieces = [piece for each in further for piece in each]
            torch.cat(pieces, out=side_by_side[len(slot_N) :].flatten(0, 1))
            setattr(self, name, side_by_side)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def numbered(self, slot_of_E: Tensor) -> Tensor:
        """Returns the number of each expert that is here."""
        numbers_E = torch.zeros_like(slot_of_E)
        numbers_E[self._experts] = torch.arange(len(self._experts), dtype=slot_of_E.dtype)
        return numbers_E


class _Further:
    """A slab, and pieces of tensors that are found behind it."""

    def __init__(self, slab: Tensor, pieces: Sequence[Sequence[Tensor]]) -> None:
        self._slab = slab
        self._pieces = pieces
        self.shape = slab.shape

    def __getitem__(self, number: int) -> Tensor:
        behind = number - len(self._slab)
        if behind < 0:
            return self._slab[number]
        pieces = self._pieces[behind]
        return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))


def _projected(module: Any, name: str, slot: int, hidden: Tensor) -> Tensor:
    weight = getattr(module, name)[slot]
    bias = getattr(module, f"{name}_bias")[slot] if module.has_bias else None
    return linear(hidden, weight.t() if module.is_transposed else weight, bias)


def grouped(module: Any, hidden_TD: Tensor, slot_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Computes one grouped product for all pairs, for a GPU. In bf16 on compute capability 9.0 and 10 it fetches
    nothing.

    Elsewhere torch fetches the counts of rows, and multiplies expert by expert.
    """
    output_TD: Tensor = grouped_mm_experts_forward(module, hidden_TD, slot_TK.long(), weights_TK)
    return output_TD


def pairs_in_place(module: Any, hidden_TD: Tensor, slot_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Computes a product of matrix and vector per pair, with the weights in their slots."""
    gate_up, down = module.gate_up_proj, module.down_proj
    slots = slot_TK.flatten().tolist()
    inner_P2F = hidden_TD.new_empty(len(slots), gate_up.shape[1])
    hidden = [hidden_D for hidden_D in hidden_TD.unbind() for _ in range(slot_TK.shape[1])]
    for slot, hidden_D, inner in zip(slots, hidden, inner_P2F.unbind(), strict=True):
        torch.mv(gate_up[slot], hidden_D, out=inner)
    out_PD = hidden_TD.new_empty(len(slots), hidden_TD.shape[1])
    for slot, inner, out in zip(slots, module._apply_gate(inner_P2F).unbind(), out_PD.unbind(), strict=True):
        torch.mv(down[slot], inner, out=out)
    return _weighted(out_PD.view(*slot_TK.shape, -1), weights_TK)


def copied_pairs(module: Any, hidden_TD: Tensor, slot_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Copies the weights of every pair together: one product for gates and ups, one for downs."""
    num_tokens, num_picks = slot_TK.shape
    slot_P = slot_TK.flatten()
    inner_T = torch.bmm(
        module.gate_up_proj.index_select(0, slot_P).view(num_tokens, -1, hidden_TD.shape[1]), hidden_TD.unsqueeze(-1)
    )
    inner_PF = module._apply_gate(inner_T.view(num_tokens * num_picks, -1))
    out_PD = torch.bmm(module.down_proj.index_select(0, slot_P), inner_PF.unsqueeze(-1))
    return _weighted(out_PD.view(num_tokens, num_picks, -1), weights_TK)


def copied_experts(module: Any, hidden_TD: Tensor, slot_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Copies the weights of every distinct expert together, runs all tokens through each, and picks the pairs'
    outputs.
    """
    slot_U, place_TK = slot_TK.unique(return_inverse=True)
    return _run_copied_experts(module, hidden_TD, slot_U, place_TK, weights_TK)


def _run_copied_experts(module: Any, hidden_TD: Tensor, slot_U: Tensor, place_TK: Tensor, weights_TK: Tensor) -> Tensor:
    num_tokens, num_experts = len(hidden_TD), len(slot_U)
    inner_T = torch.mm(hidden_TD, module.gate_up_proj.index_select(0, slot_U).flatten(0, 1).t())
    inner_TUF = module._apply_gate(inner_T.view(num_tokens, num_experts, -1))
    out_UTD = torch.bmm(inner_TUF.transpose(0, 1), module.down_proj.index_select(0, slot_U).transpose(1, 2))
    # Picked, not multiplied by zero: a token's output of other experts may be infinite.
    rows_TK = place_TK * num_tokens + torch.arange(num_tokens)[:, None]
    out_PD = out_UTD.flatten(0, 1).index_select(0, rows_TK.flatten())
    return _weighted(out_PD.view(*place_TK.shape, -1), weights_TK)


def _weighted(out_TKD: Tensor, weights_TK: Tensor) -> Tensor:
    """Returns [T, D] in the dtype of the outputs, added up in that of the weights, which some families keep in fp32."""
    return torch.bmm(weights_TK.unsqueeze(1), out_TKD.to(weights_TK.dtype)).squeeze(1).to(out_TKD.dtype)


def sorted_pairs(module: Any, hidden_TD: Tensor, slot_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Computes a product for each expert with all its tokens, with the weights in their slots."""
    outputs = PairOutputs(module, hidden_TD, slot_TK, weights_TK)
    outputs.add_all()
    return outputs.total()


class PairOutputs:
    """The outputs of (token, expert) pairs, sorted by expert and computed a few experts at a time.

    They are added up in the same order however many calls of `add` they took. Legend: R rows, the pairs of an expert
    one after the other; in half precision further rows follow them, whose outputs nobody reads.
    """

    def __init__(self, module: Any, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> None:
        """Sorts the pairs. `index_TK` names experts by any integers: expert ids or slots."""
        self._module = module
        self._is_plain = is_plain(module)
        self._hidden_TD = hidden_TD
        self._weights_TK = weights_TK
        ids_P, order_P = index_TK.flatten().sort(stable=True)
        ids, count_E = ids_P.unique_consecutive(return_counts=True)
        counts = count_E.tolist()
        rows = [*map(_padded, counts)] if self._is_plain and hidden_TD.dtype != torch.float32 else counts
        starts = list(accumulate(rows, initial=0))
        self._rows_of: dict[int, tuple[int, int]] = dict(zip(ids.tolist(), pairwise(starts), strict=True))
        row_P = torch.arange(len(order_P), device=order_P.device)
        if rows is not counts:
            before = [start - pairs for start, pairs in zip(starts, accumulate(counts, initial=0), strict=True)][:-1]
            row_P += torch.tensor(before, device=order_P.device).repeat_interleave(count_E)
        self._token_R = order_P.new_zeros(starts[-1]).index_copy_(0, row_P, order_P // index_TK.shape[1])
        self._row_TK = torch.empty_like(order_P).index_copy_(0, order_P, row_P).view(index_TK.shape)
        self._out_RD = hidden_TD.new_empty(starts[-1], hidden_TD.shape[1])
        on_cpu = hidden_TD.device.type == "cpu"
        self._turns = on_cpu and self._is_plain and hidden_TD.dtype == torch.bfloat16 and _gains_turned(module)

    def add(self, ids: Iterable[int], slots: Iterable[int]) -> None:
        """Computes the pairs of the experts `ids`, which are in these slots."""
        together: list[tuple[int, int, int]] = []
        for expert, slot in zip(ids, slots, strict=True):
            start, end = self._rows_of[expert]
            if self._turns and end - start in TURNED_ROWS:
                self._add_turned(slot, start, end)
                continue
            if together and (together[-1][2] != start or end - together[0][1] > ROWS_TOGETHER):
                self._add_together(together)
                together = []
            together.append((slot, start, end))
        if together:
            self._add_together(together)

    def _add_together(self, experts: Sequence[tuple[int, int, int]]) -> None:
        """Computes experts, by slot and rows, whose rows follow one another."""
        module, sizes = self._module, [end - start for _, start, end in experts]
        first, last = experts[0][1], experts[-1][2]
        hidden_RD, out_RD = self._hidden_TD.index_select(0, self._token_R[first:last]), self._out_RD[first:last]
        if self._is_plain:
            inner_RF = hidden_RD.new_empty(len(hidden_RD), module.gate_up_proj.shape[1])
            self._multiply([module.gate_up_proj[slot] for slot, *_ in experts], hidden_RD, inner_RF, sizes)
            inner_RF = module._apply_gate(inner_RF)
            self._multiply([module.down_proj[slot] for slot, *_ in experts], inner_RF, out_RD, sizes)
            return
        some = zip(experts, hidden_RD.split(sizes), strict=True)
        torch.cat([any_expert(module, slot, hidden_ND) for (slot, *_), hidden_ND in some], out=out_RD)

    def _add_turned(self, slot: int, start: int, end: int) -> None:
        """Computes an expert whose rows are columns until its output is turned back."""
        module, hidden_ND = self._module, self._hidden_TD.index_select(0, self._token_R[start:end])
        inner_FN = torch.mm(module.gate_up_proj[slot], hidden_ND.t())
        out_DN = torch.mm(module.down_proj[slot], module._apply_gate(inner_FN.t()).t())
        self._out_RD[start:end].copy_(out_DN.t())

    def _multiply(self, matrices: Sequence[Tensor], rows: Tensor, out: Tensor, sizes: Sequence[int]) -> None:
        """Multiplies so many of the rows with each of the matrices; a row that is alone by a product with a vector."""
        products = list(zip(matrices, rows.split(sizes), out.split(sizes), strict=True))
        with getattr(self._module, "one_row", _AS_IT_IS):
            for matrix, some, into in products:
                if len(some) == 1:
                    torch.mv(matrix, some[0], out=into[0])
        for matrix, some, into in products:
            if len(some) > 1:
                torch.mm(some, matrix.t(), out=into)

    def add_all(self) -> None:
        """Computes every pair, where ids are slots."""
        self.add(self._rows_of, self._rows_of)

    def total(self) -> Tensor:
        """Returns [T, D], after every pair was computed."""
        row_TK, weights_TK = self._row_TK, self._weights_TK
        total_TD = torch.empty_like(self._hidden_TD)
        if weights_TK.dtype == self._out_RD.dtype:
            # Rounded as transformers round: each weighted output, and the sum, which is taken in fp32.
            weight_R = weights_TK.new_zeros(len(self._out_RD)).index_copy_(0, row_TK.flatten(), weights_TK.flatten())
            width = max(LEAST_SUMMED_COLUMNS, SUMMED_BYTES // (4 * len(self._out_RD)))
            for total_TC, out_RC in zip(total_TD.split(width, 1), self._out_RD.split(width, 1), strict=True):
                weighted_RC = (out_RC * weight_R[:, None]).float()
                total_TC.copy_(embedding_bag(row_TK, weighted_RC, mode="sum"))
            return total_TD
        num_tokens = max(1, SUMMED_BYTES // (row_TK.shape[1] * total_TD.shape[1] * 4))
        parts = zip(total_TD.split(num_tokens), row_TK.split(num_tokens), weights_TK.split(num_tokens), strict=True)
        for total_ND, row_NK, weights_NK in parts:
            total_ND.copy_((self._out_RD[row_NK] * weights_NK[..., None]).sum(1))
        return total_TD


def _gains_turned(module: Any) -> bool:
    shape: torch.Size = module.gate_up_proj.shape
    _, num_outputs, num_inputs = shape
    is_large = num_outputs * num_inputs * torch.bfloat16.itemsize >= LEAST_TURNED_BYTES
    return is_large and max(num_outputs // 2, num_inputs) <= MOST_TURNED_INPUTS


def _padded(num_rows: int) -> int:
    """Returns the number of rows to compute in half precision: one of a few values, not much above `num_rows`."""
    for few in (1, 4, 8):
        if num_rows <= few:
            return few
    return -(-num_rows // HALF_PRECISION_ROWS) * HALF_PRECISION_ROWS


KERNELS: dict[str, Kernel] = {
    "pairs, in place": pairs_in_place,
    "pairs, copied": copied_pairs,
    "experts, copied": copied_experts,
    "experts, in place": sorted_pairs,
}


NAME = "expert_pager_slots"


class OpenStep(threading.local):
    """The step in which the calling thread runs a model, shared by all layers of that model; None between steps."""

    routing: StepRouting | None = None


class LayerExperts:
    """Runs one layer's experts: maps expert ids to slots, and slots to outputs."""

    def __init__(self, pager: ExpertPager, layer: ExpertLayer, open_step: OpenStep) -> None:
        self.pager = pager
        self.layer = layer.layer
        self.name = layer.experts
        # whether its gate turns logits into masses by sigmoid, where that had to be tried
        self.scores_by_sigmoid = False
        self._slot_of_E = pager.slots.slot_of_LE[layer.layer]
        self._open_step = open_step

    def __reduce__(self) -> NoReturn:
        raise TypeError(NO_COPIES)

    @property
    def step(self) -> StepRouting:
        """Returns the step that the calling thread has open. Raises ConfigError outside of one."""
        step = self._open_step.routing
        if step is None:
            raise ConfigError(
                "a layer of a paged model cannot run by itself, as it is not known whose tokens it gets; call the "
                "model or its inner model (model.model), or open expert_paging.step(...) around the call"
            )
        return step

    def run(self, module: Any, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Returns [T, D]: the weighted sum of each token's experts. Raises ExpertUnavailable."""
        step = self.step
        if step.pages_on_demand:
            return self._run_in_waves(module, step, hidden_TD, index_TK, weights_TK)
        for request in step.awaiting:
            assert request.lease is not None, "without a lease, experts are paged on demand"
            request.lease.wait(self.layer)
        if step.is_in_place:
            found = self.pager.layer_in_place(self.layer) if self._are_small(module) else None
            if found is not None:
                in_file = InFile(module, self.pager.slots.slabs, found)
                return run_slots(in_file, hidden_TD, found.number_of_E.take(index_TK), weights_TK)
            slot_of, in_place = self.pager.beside_leases(self.layer, _distinct(index_TK))
            return self._run_here_and_there(module, slot_of, in_place, hidden_TD, index_TK, weights_TK)
        # A row whose logits are not finite also picks from outside of its pool: it reads no slot, and its
        # result is discarded.
        slot_TK = self._slot_of_E.take(index_TK).clamp_min_(0)
        return run_slots(module, hidden_TD, slot_TK, weights_TK)

    def _run_here_and_there(
        self,
        module: Any,
        slot_of: Mapping[int, int],
        in_place: Mapping[int, InPlace],
        hidden_TD: Tensor,
        index_TK: Tensor,
        weights_TK: Tensor,
    ) -> Tensor:
        """Computes experts that are in these slots, and others where the page cache has them, in one call."""
        slots, slot_of_E = self.pager.slots, self._slot_of_E
        experts, slots_E = module, slot_of_E
        if in_place:
            nbytes = (len(slot_of) + len(in_place)) * slots.record_bytes
            is_small = self._are_small(module) and nbytes <= GATHERED_BYTES
            experts = Gathered(module, slots, slot_of, in_place) if is_small else AlsoInPlace(module, slots, in_place)
            slots_E = experts.numbered(slot_of_E)
        return run_slots(experts, hidden_TD, slots_E.take(index_TK), weights_TK)

    def _are_small(self, module: Any) -> bool:
        """Tells whether the kernels want the experts side by side."""
        return is_plain(module) and self.pager.slots.record_bytes <= SMALL_EXPERT_BYTES

    def _run_in_waves(
        self, module: Any, step: StepRouting, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor
    ) -> Tensor:
        """Computes as many experts at a time as there are slots; each is read once, and each pair computed once."""
        wanted = _distinct(index_TK)
        slot_of_E = self._slot_of_E
        if self.pager.hit_for_good(self.layer, wanted, step.meter):
            return run_slots(module, hidden_TD, slot_of_E.take(index_TK), weights_TK)
        outputs: PairOutputs | None = None
        experts = module
        in_place = self.pager.in_place(self.layer, wanted, step.meter)
        waves = self.pager.demand(self.layer, wanted, usage=step.meter, lease=step.reservation, in_place=in_place)
        with closing(waves):
            for wave in waves:
                if outputs is None and len(wave) == len(wanted):
                    in_slots = [expert for expert in wave if expert not in in_place]
                    slot_of = dict(zip(in_slots, slot_of_E[in_slots].tolist(), strict=True))
                    return self._run_here_and_there(module, slot_of, in_place, hidden_TD, index_TK, weights_TK)
                if outputs is None and in_place:
                    experts = AlsoInPlace(module, self.pager.slots, in_place)
                outputs = outputs or PairOutputs(experts, hidden_TD, index_TK, weights_TK)
                slots_E = experts.numbered(slot_of_E) if in_place else slot_of_E
                outputs.add(wave, slots_E[list(wave)].tolist())
        assert outputs is not None, "every token has an expert"
        return outputs.total()


def _distinct(index_TK: Tensor) -> list[int]:
    """Returns the experts that tokens have picked, in order."""
    return sorted(set(index_TK.flatten().tolist()))


def experts_in_slots(module: Any, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """The function registered with transformers."""
    if torch.is_grad_enabled() and (hidden_TD.requires_grad or weights_TK.requires_grad):
        return _Forward.apply(module, hidden_TD, index_TK, weights_TK)  # type: ignore[no-untyped-call, no-any-return]
    layer: LayerExperts = module.paging
    with unmasked():
        return layer.run(module, hidden_TD, index_TK, weights_TK)


class _Forward(torch.autograd.Function):
    """Wraps experts in a forward that autograd records, such as one with an adapter's weights; it has no backward.

    By the time of a backward the slots hold other experts, which autograd would not notice.
    """

    @staticmethod
    def forward(_: Any, module: Any, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        layer: LayerExperts = module.paging
        return layer.run(module, hidden_TD, index_TK, weights_TK)

    @staticmethod
    def backward(*_: Any) -> NoReturn:
        raise ConfigError(
            "a paged model computes no gradients: its experts are replaced while it runs; train the whole model with "
            "transformers, and load the result, or an adapter of its attention, here"
        )


ALL_EXPERTS_FUNCTIONS.register(NAME, experts_in_slots)


def attach(
    model: PreTrainedModel,
    family: Family,
    pager: ExpertPager,
    open_step: OpenStep,
    record: RecordFormat | None = None,
) -> str | None:
    """Connects every sparse layer of `model` (without expert weights) to the pager's slots, and its gate to the pools.

    `open_step` tells all of these layers which step a thread has open; `record` is what quantised experts are in.
    Returns why the model runs with all its experts only, where it does.
    """
    layers = {}
    quantised = QuantisedSlabs(record, pager.slots.slabs) if record else None
    for each in family.layers:
        experts: Any = model.get_submodule(each.experts)
        experts.paging = layers[each.experts] = LayerExperts(pager, each, open_step)
        experts.num_experts = pager.slots.total_slots  # the kernels index the slab
        # Plain attributes: the slabs belong to the pager and must not appear among the model's parameters.
        if quantised is not None:
            experts.quantised = quantised
        for name, slab in {} if quantised else pager.slots.slabs.items():
            object.__setattr__(experts, name, slab)
    unpoolable = put_under_pools(model, family, layers)
    model.set_experts_implementation(NAME)
    return unpoolable
