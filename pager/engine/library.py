"""`load_model`: a transformers model for use as a library. Pools travel with its cache."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from pager.cache.policy import DEFAULT_POLICY
from pager.engine.documents import DocumentRouting, StepRouting
from pager.engine.experts import NO_COPIES
from pager.engine.loading import PagedModel, load_paged_model
from pager.engine.widening import answer_drift
from pager.errors import ConfigError, InvalidRequest
from pager.planner import NUM_READERS, Budgets
from pager.routing.pool import parse_pool_size
from pager.types import DriftPolicy, Full, PoolPolicy

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_model(
    path: str | Path,
    *,
    device: str = "cpu",
    dtype: torch.dtype | str | None = None,
    expert_memory: str | int | float | None = None,
    host_memory: str | int | float | None = None,
    pool_size: str | int | None = None,
    drift: DriftPolicy | None = None,
    policy: str = DEFAULT_POLICY,
    num_readers: int = NUM_READERS,
) -> PreTrainedModel:
    """A transformers model whose routed experts live in at most `expert_memory` bytes of slots.

    `expert_memory` is bytes, "64MiB" or a share of all routed experts ("25%", 0.25); None lets the planner choose.
    Shared experts belong to the trunk and are outside of it. `dtype` None serves in bfloat16; "auto" in the dtype of
    the checkpoint.

    `pool_size` None is exact: the logits equal those of the unpaged model whatever the budget, up to rounding: what is
    resident decides in which order experts are added up. 32 (routed experts a
    layer), "12.5%" (of all experts, shared included) or "mass:0.9[:cap]" restricts each document to the pool that its
    first forward chooses, layer by layer, frozen for what follows with the same cache. A row without a past starts a
    document; padding (attention_mask) is left out.

    With `drift`, forwards with a past measure the router mass outside of their documents' pools, whether they run one
    token or several, and a pool may be widened, or its document become exact, between two of them.

    The model has one more attribute: `expert_paging` (a `PagedModel`: the pager with its statistics, the plan,
    `close()`). It stays as it was loaded: a forward after `half()` or `to(...)` has changed its dtype or device, and
    `save_pretrained`, which would write a checkpoint without experts, raise ConfigError. Copying it raises TypeError.
    `with load_model(...) as model` closes it at the end.

    Any number of threads may run the model, each with caches of its own; their forwards take turns.
    Raises CheckpointError, UnsupportedModel, BudgetError, ConfigError, PoolTooSmall, InvalidRequest.
    """
    policy_of_rows = PoolPolicy(size=parse_pool_size(pool_size), drift=drift)
    budgets = Budgets(expert_memory=expert_memory, host_memory=0 if host_memory is None else host_memory)
    paged = load_paged_model(path, device=device, dtype=dtype, budgets=budgets, policy=policy, num_readers=num_readers)
    try:
        paged.check_policy(policy_of_rows)
    except Exception:
        paged.close()
        raise
    model = paged.model
    forwards = LibraryForwards(paged, policy_of_rows)
    # The inner model, which every forward passes: `model(...)`, `model.generate(...)` and `model.model(...)`. Hooks
    # would not do: torch runs none of them after a forward that the keyboard interrupted.
    model.model.forward = forwards.around(model.model.forward)
    model.expert_paging = paged
    model.__class__ = _paged_class(model.__class__)
    return model


class PagedCausalLM:
    """What the class of a loaded model adds to that of transformers, whose name it keeps."""

    expert_paging: PagedModel

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Closes `expert_paging`: the model cannot run afterwards."""
        self.expert_paging.close()

    def save_pretrained(self, *_: Any, **__: Any) -> NoReturn:
        raise ConfigError(
            "a paged model has not all its experts in memory and can not be saved; copy "
            f"{self.expert_paging.path} instead"
        )

    def __reduce__(self) -> NoReturn:
        raise TypeError(NO_COPIES)


@cache
def _paged_class(kind: type[Any]) -> type[Any]:
    return type(kind.__name__, (PagedCausalLM, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


class LibraryForwards:
    """Gives every forward its documents: new ones for rows without a past, the cache's own for the rest.

    What a forward needs lives in its cache and on its thread's stack, so any number of threads may run the model.
    """

    def __init__(self, paged: PagedModel, policy: PoolPolicy) -> None:
        self._paged = paged
        self._policy = policy
        self._loaded_as = _trunk_kind(paged.model)
        self._is_exact = isinstance(policy.size, Full)
        self._exact = DocumentRouting(paged.facts, PoolPolicy(), device=paged.device)
        self._own_step: StepRouting | None = None  # as opposed to one that the caller opened; of the thread that steps

    def around(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """`forward` of the inner model, run in a step of the documents that its arguments name.

        Raises InvalidRequest for a cache that was filled without pools, ConfigError for a model that was moved or
        converted.
        """
        signature = inspect.signature(forward)

        @wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            found = _trunk_kind(self._paged.model)
            if found != self._loaded_as:
                raise _moved(self._loaded_as, found)
            around = self._paged.open_step
            if around is not None and around is not self._own_step:
                return forward(*args, **kwargs)  # the caller opened a step of its own
            if self._is_exact:
                with self._step([self._exact], prefill=True):
                    return forward(*args, **kwargs)
            return self._run_pooled(forward, dict(zip(signature.parameters, args, strict=False)) | kwargs)

        return run

    def _run_pooled(self, forward: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        inputs = kwargs.get("input_ids")
        if inputs is None:
            inputs = kwargs.get("inputs_embeds")
        if inputs is None:
            return forward(**kwargs)  # the model will say so
        num_rows, num_tokens = inputs.shape[:2]
        cache = kwargs.get("past_key_values")
        if cache is None and _uses_cache(self._paged.model, kwargs):
            cache = kwargs["past_key_values"] = DynamicCache(config=self._paged.model.config)
        num_past = int(cache.get_seq_length()) if cache is not None else 0
        valid_BT = _valid_tokens(kwargs.get("attention_mask"), num_rows, num_past + num_tokens)
        documents, has_past = self._documents(cache, num_rows, num_past, valid_BT)
        if cache is not None:
            carry_documents(cache, documents)
        rows = torch.arange(num_rows, device=inputs.device).repeat_interleave(num_tokens)
        valid = None if valid_BT is None else valid_BT[:, -num_tokens:].reshape(-1)
        measures = self._policy.drift is not None and all(has_past)
        with self._step(documents, rows=rows, valid=valid, prefill=not measures):
            output = forward(**kwargs)
        for document in dict.fromkeys(documents):
            answer_drift(document)
        return output

    @contextmanager
    def _step(self, documents: Sequence[DocumentRouting], **options: Any) -> Iterator[None]:
        with self._paged.step(documents, **options) as step:
            before, self._own_step = self._own_step, step
            try:
                yield
            finally:
                self._own_step = before

    def _documents(
        self, cache: Cache | None, num_rows: int, num_past: int, valid_BT: Tensor | None
    ) -> tuple[list[DocumentRouting], list[bool]]:
        """A document a row, and whether it has a past."""
        past = getattr(cache, "documents", None) if num_past else None
        if num_past and past is None:
            raise InvalidRequest(
                "this cache was filled without pools, so its rows have none; start with an empty cache, or load the "
                "model with pool_size=None",
                field="past_key_values",
            )
        if past is not None and len(past) != num_rows:
            raise InvalidRequest(
                f"the cache holds {len(past)} rows and the input {num_rows}; select or repeat the cache's rows first",
                field="past_key_values",
            )
        has_past = [bool(num_past)] * num_rows
        if num_past and valid_BT is not None:
            has_past = valid_BT[:, :num_past].any(1).tolist()
        documents = [past[row] if past and has_past[row] else self._new_document() for row in range(num_rows)]
        return documents, has_past

    def _new_document(self) -> DocumentRouting:
        return self._paged.document(self._policy)


class DocumentCache:
    """What a transformers cache becomes when documents travel with it: whatever happens to its rows happens to them."""

    documents: Sequence[DocumentRouting]

    def reorder_cache(self, beam_idx: Tensor) -> Any:
        self.documents = [self.documents[row] for row in beam_idx.tolist()]
        return super().reorder_cache(beam_idx)  # type: ignore[misc]

    def batch_select_indices(self, indices: Tensor) -> Any:
        self.documents = [self.documents[row] for row in torch.arange(len(self.documents))[indices.cpu()].tolist()]
        return super().batch_select_indices(indices)  # type: ignore[misc]

    def batch_repeat_interleave(self, repeats: int) -> Any:
        self.documents = [document for document in self.documents for _ in range(repeats)]
        return super().batch_repeat_interleave(repeats)  # type: ignore[misc]

    def reset(self) -> Any:
        self.documents = []
        return super().reset()  # type: ignore[misc]


_document_caches: dict[type[Cache], type[Cache]] = {}


def carry_documents(cache: Cache, documents: Sequence[DocumentRouting]) -> None:
    """Makes `documents` (one a row) travel with `cache`, whatever kind of cache transformers chose."""
    if not isinstance(cache, DocumentCache):
        kind = type(cache)
        if kind not in _document_caches:
            _document_caches[kind] = type(f"Document{kind.__name__}", (DocumentCache, kind), {})
        cache.__class__ = _document_caches[kind]
    cache.documents = list(documents)


def _trunk_kind(model: PreTrainedModel) -> tuple[torch.dtype, torch.device]:
    weight = model.get_input_embeddings().weight
    return weight.dtype, weight.device


def _moved(loaded: tuple[torch.dtype, torch.device], found: tuple[torch.dtype, torch.device]) -> ConfigError:
    return ConfigError(
        f"the model was made {_named(found)} after it was loaded as {_named(loaded)}, and its experts were not; load "
        "it as you want it: load_model(..., dtype=..., device=...)"
    )


def _named(kind: tuple[torch.dtype, torch.device]) -> str:
    return f"{str(kind[0]).removeprefix('torch.')} on {kind[1]}"


def _uses_cache(model: PreTrainedModel, kwargs: dict[str, Any]) -> bool:
    use_cache = kwargs.get("use_cache")
    return bool(model.config.use_cache if use_cache is None else use_cache) and not model.training


def _valid_tokens(mask: Any, num_rows: int, num_tokens: int) -> Tensor | None:
    """[B, past + new] bool from a 2-D attention mask. Raises InvalidRequest for one that can't tell padding."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[0] != num_rows or mask.shape[1] < num_tokens:
        raise InvalidRequest(
            f"with pools the attention mask must be 2-D, [{num_rows}, {num_tokens}], to tell padding from text; "
            "generating with a static cache makes another, so use the default one",
            field="attention_mask",
        )
    return mask[:, :num_tokens].bool()
