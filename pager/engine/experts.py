"""The experts function: transformers' models call it with expert ids, it finds their slots and runs the kernel there.

Legend: T tokens, K experts a token, P = T·K pairs, E experts of a layer, S slots, D hidden, F expert intermediate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import closing
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from pager.cache.pager import ExpertPager
from pager.engine.documents import StepRouting
from pager.engine.trunk import moe_blocks
from pager.models.families import Family

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "expert_pager_slots"

# Below this size it is cheaper to copy the pairs' weights together and multiply once than to loop over experts: on one
# AVX-512 core, 8 tokens with 7 experts of 24 to 48 KiB each take 0.6 ms instead of 1.0.
BATCHED_EXPERT_BYTES = 128 * 1024
BATCHED_PAIRS = 256

# In half precision oneDNN compiles a kernel of 0.7 MB for every number of rows it meets, which takes a millisecond; its
# tiles have 16 rows anyway.
HALF_PRECISION_ROWS = 16


class LayerExperts:
    """Stands behind one layer's experts module: from expert ids to slots to outputs."""

    def __init__(self, pager: ExpertPager, layer: int) -> None:
        self.pager = pager
        self.layer = layer
        self.step: StepRouting | None = None

    def run(self, module: Any, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """[T, D]: the weighted sum of each token's experts. Raises ExpertUnavailable."""
        step = self.step
        assert step is not None, "a paged model runs inside PagedModel.step only"
        if step.pages_on_demand:
            return self._run_in_waves(module, step, hidden_TD, index_TK, weights_TK)
        for document in step.awaiting:
            assert document.lease is not None
            document.lease.wait(self.layer)
        slot_TK = self.pager.slots.slot_of_LE[self.layer][index_TK]
        return run_slots(module, hidden_TD, slot_TK, weights_TK)

    def _run_in_waves(
        self, module: Any, step: StepRouting, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor
    ) -> Tensor:
        """As many experts at a time as there are slots; each is read once, and each pair computed once."""
        wanted = sorted(set(index_TK.flatten().tolist()))
        slot_of_E = self.pager.slots.slot_of_LE[self.layer]
        if self.pager.hit_for_good(self.layer, wanted, step.meter):
            return run_slots(module, hidden_TD, slot_of_E[index_TK], weights_TK)
        outputs: PairOutputs | None = None
        waves = self.pager.demand(self.layer, wanted, usage=step.meter, lease=step.documents[0].lease)
        with closing(waves):  # type: ignore[type-var]  # a generator
            for wave in waves:
                if outputs is None and len(wave) == len(wanted):
                    return run_slots(module, hidden_TD, slot_of_E[index_TK], weights_TK)
                outputs = outputs or PairOutputs(module, hidden_TD, index_TK, weights_TK)
                outputs.add(wave, slot_of_E[list(wave)].tolist())
        assert outputs is not None, "every token has an expert"
        return outputs.total()


class PairOutputs:
    """The outputs of (token, expert) pairs, sorted by expert and computed a few experts at a time.

    They are added up in the same order however many calls of `add` it took.
    """

    def __init__(self, module: Any, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> None:
        """`index_TK` names experts by any integers: expert ids or slots."""
        self._module = module
        self._shape_TK = index_TK.shape
        ids_P, self._order_P = index_TK.flatten().sort(stable=True)
        self._row_step = 1 if hidden_TD.dtype == torch.float32 else HALF_PRECISION_ROWS
        self._hidden_PD = hidden_TD[pad(self._order_P // index_TK.shape[1], (0, self._row_step - 1))]
        self._weights_P = weights_TK.flatten()[self._order_P]
        self._out_PD = hidden_TD.new_empty(len(self._order_P), hidden_TD.shape[1])
        ids, counts = ids_P.unique_consecutive(return_counts=True)
        ranges = pairwise([0, *counts.cumsum(0).tolist()])
        self._range_of: dict[int, tuple[int, int]] = dict(zip(ids.tolist(), ranges, strict=True))

    def add(self, ids: Iterable[int], slots: Iterable[int]) -> None:
        """Computes the pairs of the experts `ids`, which are in these slots."""
        module = self._module
        for expert, slot in zip(ids, slots, strict=True):
            start, end = self._range_of[expert]
            num_rows = -(-(end - start) // self._row_step) * self._row_step  # the surplus is computed for nobody
            gate_up_N = torch.mm(self._hidden_PD[start : start + num_rows], module.gate_up_proj[slot].t())
            out_ND = torch.mm(module._apply_gate(gate_up_N), module.down_proj[slot].t())
            self._out_PD[start:end] = out_ND[: end - start]

    def add_all(self) -> None:
        """Computes every pair, where ids are slots."""
        self.add(self._range_of, self._range_of)

    def total(self) -> Tensor:
        """[T, D], after every pair was computed."""
        weighted_PD = torch.empty_like(
            self._out_PD, dtype=torch.promote_types(self._out_PD.dtype, self._weights_P.dtype)
        )
        weighted_PD[self._order_P] = self._out_PD * self._weights_P[:, None]
        return weighted_PD.view(*self._shape_TK, -1).sum(1).to(self._out_PD.dtype)


def run_slots(module: Any, hidden_TD: Tensor, slot_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """[T, D] from experts that are all in their slots. On a GPU it never waits for the host."""
    if hidden_TD.device.type != "cpu":
        output_TD: Tensor = grouped_mm_experts_forward(module, hidden_TD, slot_TK.long(), weights_TK)
        return output_TD
    if slot_TK.shape[0] == 1 and hidden_TD.dtype == torch.float32:
        return _run_one_token(module, hidden_TD[0], slot_TK[0].tolist(), weights_TK)
    expert_bytes = 3 * module.down_proj[0].nbytes
    if expert_bytes <= BATCHED_EXPERT_BYTES and slot_TK.numel() <= BATCHED_PAIRS:
        return _run_batched(module, hidden_TD, slot_TK, weights_TK)
    outputs = PairOutputs(module, hidden_TD, slot_TK, weights_TK)
    outputs.add_all()
    return outputs.total()


def _run_one_token(module: Any, hidden_D: Tensor, slots: list[int], weights_1K: Tensor) -> Tensor:
    """Multiplies with the weights where they lie: on one AVX-512 core half the time of copying them together."""
    gate_up, down = module.gate_up_proj, module.down_proj
    inner_K2F = hidden_D.new_empty(len(slots), gate_up.shape[1])
    for slot, inner in zip(slots, inner_K2F.unbind(), strict=True):
        torch.mv(gate_up[slot], hidden_D, out=inner)
    out_KD = hidden_D.new_empty(len(slots), len(hidden_D))
    for slot, inner, out in zip(slots, module._apply_gate(inner_K2F).unbind(), out_KD.unbind(), strict=True):
        torch.mv(down[slot], inner, out=out)
    return (weights_1K.to(out_KD.dtype) @ out_KD).to(hidden_D.dtype)


def _run_batched(module: Any, hidden_TD: Tensor, slot_TK: Tensor, weights_TK: Tensor) -> Tensor:
    slot_P = slot_TK.flatten()
    hidden_PD = hidden_TD.repeat_interleave(slot_TK.shape[1], 0)
    inner_PF = module._apply_gate(torch.bmm(module.gate_up_proj[slot_P], hidden_PD.unsqueeze(-1)).squeeze(-1))
    out_PD = torch.bmm(module.down_proj[slot_P], inner_PF.unsqueeze(-1)).squeeze(-1)
    weighted_TKD = (out_PD * weights_TK.flatten()[:, None]).view(*slot_TK.shape, -1)
    return weighted_TKD.sum(1).to(hidden_TD.dtype)


def experts_in_slots(module: Any, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """The function registered with transformers."""
    layer: LayerExperts = module.paging
    return layer.run(module, hidden_TD, index_TK, weights_TK)


ALL_EXPERTS_FUNCTIONS.register(NAME, experts_in_slots)


def attach(model: PreTrainedModel, family: Family, pager: ExpertPager) -> list[LayerExperts]:
    """Puts every sparse layer of `model` (without expert weights) on the pager's slots and its gate under the pools."""
    layers = []
    for index, block in moe_blocks(model):
        layer = LayerExperts(pager, index)
        experts = block.experts
        experts.paging = layer
        experts.num_experts = len(pager.slots.gate_up)  # what the kernels index is the slab
        # Plain attributes: the slab belongs to the pager and must not show up in the model's parameters.
        object.__setattr__(experts, "gate_up_proj", pager.slots.gate_up)
        object.__setattr__(experts, "down_proj", pager.slots.down)
        block.gate.register_forward_hook(_pool_hook(layer, family))
        layers.append(layer)
    model.set_experts_implementation(NAME)
    return layers


def _pool_hook(layer: LayerExperts, family: Family) -> Callable[[nn.Module, Any, tuple[Tensor, ...]], Any]:
    def restrict(gate: nn.Module, _: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        assert layer.step is not None, "a paged model runs inside PagedModel.step only"
        logits_TE = output[0]
        allowed_TE = layer.step.allowed(layer.layer, logits_TE)
        return None if allowed_TE is None else (logits_TE, *family.pick(gate, logits_TE, allowed_TE))

    return restrict
