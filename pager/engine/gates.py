"""Gates under pools: the experts that a token may pick are restricted where its gate picks.

A gate that is one matrix and a known way of picking becomes a `PooledGate`, which chooses once, within the pool. Any
other gate runs unchanged, and a `GateMask` masks its intermediate values: its logits, and the input of its top-k.
Whether that restricts it, and changes nothing else, is tried with the model's own weights when it is loaded.

Legend: T tokens, E experts of a layer, K experts a token picks, D hidden.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, logsigmoid
from torch.overrides import TorchFunctionMode
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from pager.models.families import ExpertLayer, Family, Pick
from pager.reading import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pager.engine.experts import LayerExperts

NAME = "expert_pager_picks"
NO_COPIES = "a paged model cannot be copied or pickled: its experts are in a cache that it owns; load it once more"
TRIED_TOKENS = 24

Restrict = Callable[[Tensor], Tensor | None]
"""Maps gate logits [T, E], whose softmax is the mass of experts, to the experts each token may pick: None for all."""


class PooledGate:
    """A gate that picks in a known way: it computes the same logits, and chooses once, within the step's pools.

    The original gate would first choose among all experts, needlessly.
    """

    weight: Tensor
    paging: LayerExperts
    pooled_pick: Pick

    def __reduce__(self) -> NoReturn:
        raise TypeError(NO_COPIES)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns logits [T, E], weights [T, K], indices [T, K] for [..., D], as transformers' gates do."""
        layer = self.paging
        logits_TE = linear(hidden_states.reshape(-1, self.weight.shape[1]), self.weight)
        return logits_TE, *self.pooled_pick(self, logits_TE, layer.step.allowed(layer.layer, logits_TE))


class MaskedBlock:
    """A block whose gate picks in an unknown way: while a step has pools, it runs under a `GateMask`."""

    paging: LayerExperts
    num_experts_masked: int
    num_picks_masked: int

    def __reduce__(self) -> NoReturn:
        raise TypeError(NO_COPIES)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        layer, trial = self.paging, _running.trial
        if trial is None and not layer.step.restricts:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        mask = GateMask(self.num_experts_masked, self._restrict, scores_by_sigmoid=layer.scores_by_sigmoid)
        with mask.running():
            output = super().forward(*args, **kwargs)  # type: ignore[misc]
        if trial is not None:
            layer.scores_by_sigmoid = mask.saw_sigmoid
            trial.masked += mask.saw_logits
        return output

    def _restrict(self, logits_TE: Tensor) -> Tensor | None:
        if _running.trial is None:
            return self.paging.step.allowed(self.paging.layer, logits_TE)
        allowed_E = _running.trial.allowed(self.num_experts_masked, self.num_picks_masked, logits_TE.device)
        return None if allowed_E is None else allowed_E[None]


class MaskedGate:
    """The module in such a block that has the gate's matrix: logits are looked for while it runs."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        mask = _running.mask
        if mask is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        mask.is_in_gate = True
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            mask.is_in_gate = False


_PRODUCTS = frozenset({linear, torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__})
_TOP_K = frozenset({torch.topk, Tensor.topk})
_SIGMOIDS = frozenset({torch.sigmoid, Tensor.sigmoid, nn.functional.sigmoid})


class GateMask(TorchFunctionMode):
    """Masks a gate's logits, and the input of any top-k over all experts, until the block reaches its experts.

    The second mask is for gates that add a bias to their scores before they pick: 0 and a bias may still win. The
    mass of a gate that scores by sigmoid is the share of a score in the sum of all.
    """

    def __init__(self, num_experts: int, restrict: Restrict, *, scores_by_sigmoid: bool) -> None:
        super().__init__()
        self.is_in_gate = self.saw_sigmoid = self.saw_logits = False
        self._num_experts = num_experts
        self._restrict = restrict
        self._scores_by_sigmoid = scores_by_sigmoid
        self._allowed_TE: Tensor | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        around, _running.mask = _running.mask, self
        try:
            with self:
                yield
        finally:
            _running.mask = around

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_wide = bool(args) and isinstance(args[0], Tensor) and args[0].shape[-1:] == (self._num_experts,)
        if is_wide and self._allowed_TE is not None and function in _TOP_K:
            args = (self._inside(args[0]), *args[1:])
        self.saw_sigmoid |= is_wide and self.saw_logits and function in _SIGMOIDS
        result = function(*args, **(kwargs or {}))
        is_looked_for = self.is_in_gate and not self.saw_logits and function in _PRODUCTS
        return self._masked(result) if is_looked_for and result.shape[-1] == self._num_experts else result

    def _masked(self, logits: Tensor) -> Tensor:
        self.saw_logits = True
        logits_TE = logits.reshape(-1, self._num_experts)
        self._allowed_TE = self._restrict(logsigmoid(logits_TE.float()) if self._scores_by_sigmoid else logits_TE)
        return logits if self._allowed_TE is None else logits.masked_fill(self._outside(logits), -torch.inf)

    def _inside(self, scores: Tensor) -> Tensor:
        """Returns scores of which every one inside of the pool is larger than all outside."""
        lowest = torch.finfo(scores.dtype).min if scores.dtype.is_floating_point else 0
        return scores.clamp_min(lowest).masked_fill(self._outside(scores), -torch.inf)

    def _outside(self, scores: Tensor) -> Tensor:
        assert self._allowed_TE is not None
        outside_TE = ~self._allowed_TE
        return outside_TE if len(outside_TE) == 1 else outside_TE.view(scores.shape)


@dataclass(slots=True)
class _Trial:
    """One forward in which picks are recorded. `masked` counts the blocks whose logits were found.

    `share` of each layer's experts is allowed, but no fewer than a token picks; None: no mask at all. `others`: as many
    experts, none of them the same where there are enough.
    """

    share: float | None
    others: bool = False
    masked: int = 0
    picks: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def allowed(self, num_experts: int, num_picks: int, device: torch.device) -> Tensor | None:
        """Returns [E] bools: experts spread over the layer, so that every group has some."""
        if self.share is None:
            return None
        count = max(num_picks, int(self.share * num_experts))
        allowed_E = torch.zeros(num_experts, dtype=torch.bool, device=device)
        allowed_E[torch.linspace(0, num_experts - 1, count, device=device).round().long()] = True
        return ~allowed_E if self.others and count + num_picks <= num_experts else allowed_E


class _Running(threading.local):
    mask: GateMask | None = None
    trial: _Trial | None = None


_running = _Running()


def unmasked() -> AbstractContextManager[object]:
    """Surrounds a block's experts: what they compute is not examined where the block runs under a mask."""
    return torch._C.DisableTorchFunction() if _running.mask is not None else nullcontext()


def put_under_pools(model: PreTrainedModel, family: Family, layers: Mapping[str, LayerExperts]) -> str | None:
    """Makes the gates of `model` pick within the pools of the step that runs; `layers` are by experts module.

    Returns why they cannot be restricted, if so: the model then runs with all its experts only.
    """
    if family.gates_are_known:
        for each in family.layers:
            assert each.gate is not None
            _become(model.get_submodule(each.gate), PooledGate, paging=layers[each.experts], pooled_pick=each.pick)
        return family.unpoolable
    for each in family.layers:
        block = model.get_submodule(each.experts.rpartition(".")[0])
        gates = _gates(block, each)
        if len(gates) != 1:
            return f"{len(gates)} modules beside {each.experts} have a matrix of its experts"
    for each in family.layers:
        block = model.get_submodule(each.experts.rpartition(".")[0])
        sizes = {"num_experts_masked": each.num_experts, "num_picks_masked": each.num_picks}
        _become(block, MaskedBlock, paging=layers[each.experts], **sizes)
        _become(_gates(block, each)[0], MaskedGate)
    model.set_experts_implementation(NAME)
    return _tried(model, family)


def _gates(block: nn.Module, layer: ExpertLayer) -> list[nn.Module]:
    return [
        child
        for name, child in block.named_children()
        if "expert" not in name and any(p.dim() == 2 and len(p) == layer.num_experts for p in child.parameters())
    ]


_kinds: dict[tuple[type[Any], type[nn.Module]], type[nn.Module]] = {}


def _become(module: nn.Module, role: type[Any], **attributes: Any) -> None:
    """Gives `module` a class that does what `role` does before its own."""
    kind = type(module)
    if (role, kind) not in _kinds:
        _kinds[role, kind] = type(f"{role.__name__}{kind.__name__}", (role, kind), {})
    module.__class__ = _kinds[role, kind]
    for name, value in attributes.items():
        object.__setattr__(module, name, value)


def _tried(model: PreTrainedModel, family: Family) -> str | None:
    """Returns why masks cannot restrict the gates; None where every layer's picks show that they can."""
    try:
        free, everything = (_run(model, _Trial(share)) for share in (None, 1.0))
        # finds what is picked although it is in neither pool
        pooled = [_run(model, _Trial(0.5, others)) for others in (False, True)]
    except Exception as error:  # a family's code fails in its own ways
        return f"its gates fail under a mask ({one_line(error)})"
    if free.masked < len(family.layers):
        return "the logits of its gates were not found"
    for each in family.layers:
        weights_TK, index_TK = free.picks[each.experts]
        if not all(map(torch.equal, everything.picks[each.experts], (weights_TK, index_TK))):
            return f"the gate of {each.experts} picks differently under a mask that allows all"
        if not all(_stays_inside(trial, each) for trial in pooled):
            return f"the gate of {each.experts} picks from outside of a pool"
    return None


def _stays_inside(trial: _Trial, layer: ExpertLayer) -> bool:
    weights_TK, index_TK = trial.picks[layer.experts]
    allowed_E = trial.allowed(layer.num_experts, layer.num_picks, index_TK.device)
    assert allowed_E is not None
    is_expert = bool(index_TK.max() < layer.num_experts)
    return is_expert and bool(allowed_E[index_TK].all()) and bool(weights_TK.isfinite().all())


@torch.no_grad()
def _run(model: PreTrainedModel, trial: _Trial) -> _Trial:
    """Runs a forward of random tokens through the trunk alone."""
    embeddings: Any = model.get_input_embeddings()
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(0, len(embeddings.weight), (1, TRIED_TOKENS), generator=generator)
    _running.trial = trial
    try:
        model(input_ids=token_ids.to(embeddings.weight.device), use_cache=False)
    finally:
        _running.trial = None
    return trial


def _keep_picks(module: Any, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Stands for the experts in a trial: records the picks and computes nothing. Registered with transformers."""
    assert _running.trial is not None
    _running.trial.picks[module.paging.name] = (weights_TK, index_TK)
    return torch.zeros_like(hidden_TD)


ALL_EXPERTS_FUNCTIONS.register(NAME, _keep_picks)
