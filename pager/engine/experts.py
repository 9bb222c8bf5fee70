"""The experts function: transformers' models call it with expert ids, it finds their slots and has a kernel run there.

Legend: T tokens, K experts a token, E experts of a layer, D hidden.
"""

from __future__ import annotations

import threading
from contextlib import closing
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from pager.cache.pager import ExpertPager
from pager.engine.documents import StepRouting
from pager.engine.kernels import PairOutputs, run_slots
from pager.engine.trunk import moe_blocks
from pager.errors import ConfigError
from pager.models.families import Family

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "expert_pager_slots"
NO_COPIES = "a paged model can not be copied or pickled: its experts are in a cache that it owns; load it once more"


class OpenStep(threading.local):
    """The step in which the calling thread runs a model, shared by all layers of that model; None between steps."""

    routing: StepRouting | None = None


class LayerExperts:
    """Stands behind one layer's experts module: from expert ids to slots to outputs."""

    def __init__(self, pager: ExpertPager, layer: int, open_step: OpenStep) -> None:
        self.pager = pager
        self.layer = layer
        self._slot_of_E = pager.slots.slot_of_LE[layer]
        self._open_step = open_step

    def __reduce__(self) -> NoReturn:
        raise TypeError(NO_COPIES)

    @property
    def step(self) -> StepRouting:
        """The step that the calling thread has open. Raises ConfigError outside of one."""
        step = self._open_step.routing
        if step is None:
            raise ConfigError(
                "a layer of a paged model cannot run by itself, as nothing says whose tokens it gets; call the model "
                "or its inner model (model.model), or open expert_paging.step(...) around the call"
            )
        return step

    def run(self, module: Any, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """[T, D]: the weighted sum of each token's experts. Raises ExpertUnavailable."""
        step = self.step
        if step.pages_on_demand:
            return self._run_in_waves(module, step, hidden_TD, index_TK, weights_TK)
        for document in step.awaiting:
            assert document.lease is not None
            document.lease.wait(self.layer)
        # Where a row's logits are not finite it picks from outside of its pool too: from no slot, and to no avail.
        slot_TK = self._slot_of_E.take(index_TK).clamp_min_(0)
        return run_slots(module, hidden_TD, slot_TK, weights_TK)

    def _run_in_waves(
        self, module: Any, step: StepRouting, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor
    ) -> Tensor:
        """As many experts at a time as there are slots; each is read once, and each pair computed once."""
        wanted = sorted(set(index_TK.flatten().tolist()))
        slot_of_E = self._slot_of_E
        if self.pager.hit_for_good(self.layer, wanted, step.meter):
            return run_slots(module, hidden_TD, slot_of_E.take(index_TK), weights_TK)
        outputs: PairOutputs | None = None
        waves = self.pager.demand(self.layer, wanted, usage=step.meter, lease=step.documents[0].lease)
        with closing(waves):  # type: ignore[type-var]  # a generator
            for wave in waves:
                if outputs is None and len(wave) == len(wanted):
                    return run_slots(module, hidden_TD, slot_of_E.take(index_TK), weights_TK)
                outputs = outputs or PairOutputs(module, hidden_TD, index_TK, weights_TK)
                outputs.add(wave, slot_of_E[list(wave)].tolist())
        assert outputs is not None, "every token has an expert"
        return outputs.total()


def experts_in_slots(module: Any, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """The function registered with transformers."""
    if torch.is_grad_enabled() and (hidden_TD.requires_grad or weights_TK.requires_grad):
        return _Forward.apply(module, hidden_TD, index_TK, weights_TK)  # type: ignore[no-untyped-call, no-any-return]
    layer: LayerExperts = module.paging
    return layer.run(module, hidden_TD, index_TK, weights_TK)


class _Forward(torch.autograd.Function):
    """Experts in a forward that autograd records, as one with an adapter's weights is; there is no way back.

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


def attach(model: PreTrainedModel, family: Family, pager: ExpertPager) -> OpenStep:
    """Puts every sparse layer of `model` (without expert weights) on the pager's slots and its gate under the pools.

    Returns what tells all of these layers which step a thread has open.
    """
    open_step = OpenStep()
    for index, block in moe_blocks(model):
        layer = LayerExperts(pager, index, open_step)
        experts = block.experts
        experts.paging = layer
        experts.num_experts = len(pager.slots.gate_up)  # what the kernels index is the slab
        # Plain attributes: the slab belongs to the pager and must not show up in the model's parameters.
        object.__setattr__(experts, "gate_up_proj", pager.slots.gate_up)
        object.__setattr__(experts, "down_proj", pager.slots.down)
        _put_under_pools(block.gate, layer, family)
    model.set_experts_implementation(NAME)
    return open_step


class PooledGate:
    """What a family's router becomes: the same logits, and one choice, within the pools of the step that runs.

    By itself a router would choose among all experts first, for nothing.
    """

    weight: Tensor
    paging: LayerExperts
    family: Family

    def __reduce__(self) -> NoReturn:
        raise TypeError(NO_COPIES)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[..., D] → logits [T, E], weights [T, K], indices [T, K], as transformers' routers return them."""
        layer = self.paging
        step = layer.step
        logits_TE = linear(hidden_states.reshape(-1, self.weight.shape[1]), self.weight)
        return logits_TE, *self.family.pick(self, logits_TE, step.allowed(layer.layer, logits_TE))


_pooled_gates: dict[type[nn.Module], type[nn.Module]] = {}


def _put_under_pools(gate: nn.Module, layer: LayerExperts, family: Family) -> None:
    kind = type(gate)
    if kind not in _pooled_gates:
        _pooled_gates[kind] = type(f"Pooled{kind.__name__}", (PooledGate, kind), {})
    gate.__class__ = _pooled_gates[kind]
    object.__setattr__(gate, "paging", layer)
    object.__setattr__(gate, "family", family)
