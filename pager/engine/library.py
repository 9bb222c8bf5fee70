"""`load_model`: a transformers model for use as a library. Pools travel with its cache."""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from difflib import get_close_matches
from functools import cache, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self

import torch
from torch import Tensor
from transformers import Cache

from pager.cache.index import DEFAULT_POLICY
from pager.cache.pager import CacheOptions
from pager.engine.gates import NO_COPIES
from pager.engine.paged_model import PagedModel, load_paged_model
from pager.errors import ConfigError, InvalidRequest
from pager.memory import DEFAULT_KV_SEQUENCES, NUM_READERS, Budgets, format_bytes, resolve_device
from pager.pools.drift import answer_drift, parse_drift
from pager.pools.pick import largest_counts, parse_pool_size
from pager.pools.step import RequestRouting, StepRouting
from pager.store.hub import local_folder
from pager.types import Bytes, Count, Counts, DriftPolicy, Full, PoolPolicy, PoolSize, RoutingFacts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


def load_model(  # noqa: PLR0913 - its keywords are the library's interface
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    expert_memory: str | int | float | None = None,
    host_memory: str | int | float | None = None,
    pool_size: str | int | float | None = None,
    drift: DriftPolicy | str | float | None = None,
    policy: str = DEFAULT_POLICY,
    num_readers: int = NUM_READERS,
    **of_transformers: Any,
) -> PreTrainedModel:
    """Loads a transformers model whose routed experts live in at most `expert_memory` bytes of slots.

    `path` is a folder, or a name on the hub with or without a revision: "ORGANISATION/NAME@REVISION". `expert_memory`
    is bytes, "64MiB" or a share of all routed experts ("25%", 0.25); None lets the planner choose. Shared experts
    belong to the trunk and are not included. `dtype` None or "auto" is the checkpoint's, as in transformers; a float32
    checkpoint takes half the memory with "bfloat16". `device` "auto" is a GPU where there is one. For any other option
    of `from_pretrained`, a ConfigError says what to use instead.

    `pool_size` None is exact: the logits equal those of the unpaged model whatever the budget, up to rounding, because
    the order in which experts are added up depends on which are loaded. 32 (routed experts a layer), "12.5%" or 0.125
    (of all experts, shared included), "16,24,32" (a number for each layer), "64MiB" (shared out evenly over the layers)
    or "mass:0.9[:cap]" restricts each document to the pool that its first forward chooses, layer by layer, frozen for
    later forwards with the same cache. A row without a past starts a document; padding (attention_mask) is left out.

    With `drift` ("0.3", "0.3:exact", "0.3:widen:32" or a DriftPolicy), forwards with a past measure the gate mass
    outside of their documents' pools, whether they run one token or several, and a pool may be widened, or its document
    become exact, between two of them.

    The model has one more attribute: `expert_paging` (a `PagedModel`: the pager with its statistics, the plan,
    `close()`). It stays as it was loaded: a forward after `half()` or `to(...)` has changed its dtype or device, and
    `save_pretrained`, which would write a checkpoint without experts, raise ConfigError. Copying it raises TypeError.
    `with load_model(...) as model` closes it at the end.

    Any number of threads may run the model, each with caches of its own; their forwards take turns. Raises
    CheckpointError (an OSError); UnsupportedModel, BudgetError, ConfigError, PoolTooSmall, InvalidRequest
    (ValueErrors).
    """
    _refuse_options(of_transformers)
    drift = drift if isinstance(drift, DriftPolicy) else parse_drift(drift)
    wanted = PoolPolicy(parse_pool_size(pool_size), drift=drift)
    paged = load_paged_model(
        local_folder(path),
        device=resolve_device(device),
        dtype="auto" if dtype is None else dtype,
        budgets=Budgets(
            expert_memory=expert_memory,
            host_memory=0 if host_memory is None else host_memory,
            max_running=DEFAULT_KV_SEQUENCES,
        ),
        cache=CacheOptions(policy=policy, num_readers=num_readers),
    )
    try:
        forwards = LibraryForwards(paged, _policy_of_rows(paged, wanted))
    except Exception:
        paged.close()
        raise
    model = paged.model
    # The inner model, through which every forward goes: `model(...)`, `model.generate(...)` and `model.model(...)`.
    # Hooks are not enough: torch runs none of them after a forward that a keyboard interrupt ended.
    model.model.forward = forwards.around(model.model.forward)
    model.expert_paging = paged
    model.document_forwards = forwards
    model.__class__ = _paged_class(model.__class__)
    return model


_EXPERT_PARAMETERS = ("gate_up_proj", "down_proj")


class PagedCausalLM:
    """The additions of a loaded model's class to the class of transformers, whose name it keeps."""

    expert_paging: PagedModel
    document_forwards: LibraryForwards

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Closes `expert_paging`: the model cannot run afterwards."""
        self.expert_paging.close()

    @property
    def peft_config(self) -> dict[str, Any]:
        """The adapters that PEFT has put into the model."""
        try:
            return self.__dict__["_peft_config"]  # type: ignore[no-any-return]
        except KeyError:
            raise AttributeError("this model has no adapters") from None

    @peft_config.setter
    def peft_config(self, adapters: dict[str, Any]) -> None:
        """Raises ConfigError for an adapter of experts: PEFT finds no such parameters here and would ignore it."""
        for name, adapter in adapters.items():
            targets = getattr(adapter, "target_parameters", None) or ()
            paged = [target for target in targets if target.rpartition(".")[2] in _EXPERT_PARAMETERS]
            if paged:
                raise ConfigError(
                    f"adapter {name!r} is for {', '.join(paged)}, and a paged model's experts take no adapters; merge "
                    "it into the whole model with transformers, and load the result"
                )
        self.__dict__["_peft_config"] = adapters

    @peft_config.deleter
    def peft_config(self) -> None:
        self.__dict__.pop("_peft_config", None)

    def generate(self, *args: Any, **options: Any) -> Any:
        """Generates as transformers does. Raises ConfigError for what would choose other pools than the prompt does."""
        given = dict(zip(("inputs", "generation_config"), args, strict=False)) | options
        chosen = given.get("generation_config") or self.generation_config  # type: ignore[attr-defined]
        for name, why in _NOT_WITH_POOLS.items():
            if options.get(name, getattr(chosen, name, None)) and not self.document_forwards.is_exact:
                raise ConfigError(f"{name} has no place beside pool_size: {why}; leave one of them out")
        prompts = (given.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))
        prompt = next((each for each in prompts if each is not None), None)
        with self.document_forwards.generating(None if prompt is None else int(prompt.shape[1])):
            return super().generate(*args, **options)  # type: ignore[misc]

    def set_experts_implementation(self, *_: Any, **__: Any) -> NoReturn:
        raise ConfigError(f"a paged model has one experts implementation: {_ANSWERS['experts_implementation']}")

    def save_pretrained(self, *_: Any, **__: Any) -> NoReturn:
        raise ConfigError(
            "a paged model has not all its experts in memory and cannot be saved; copy "
            f"{self.expert_paging.path} instead"
        )

    def __reduce__(self) -> NoReturn:
        raise TypeError(NO_COPIES)


_NOT_WITH_POOLS = {
    "prefill_chunk_size": "a pool is chosen by the first forward, which has to see the whole prompt",
    "assistant_early_exit": "a pool is chosen layer by layer, and the draft runs some of them only",
}
_ONE_DEVICE = "a paged model is on one device: give device='cuda', or device='auto' for a GPU where there is one"
_LESS_MEMORY = "what does not fit is paged: give expert_memory, the most that routed experts may take ('25%', '8GiB')"
_NO_QUANTIZATION = (
    "weights are served as float32, bfloat16 or float16 (dtype), experts as they were packed (`expert-pager pack "
    "--experts int8`); for less memory, lower expert_memory"
)
_LOCAL = "a checkpoint is a folder on this machine; fetch it first, with huggingface_hub.snapshot_download"
_ANSWERS = {
    "torch_dtype": "it is called dtype here, as in transformers 5",
    "device_map": _ONE_DEVICE,
    "tp_plan": _ONE_DEVICE,
    "max_memory": _LESS_MEMORY,
    "offload_folder": _LESS_MEMORY,
    "quantization_config": _NO_QUANTIZATION,
    "load_in_8bit": _NO_QUANTIZATION,
    "load_in_4bit": _NO_QUANTIZATION,
    "trust_remote_code": "code from a checkpoint is never run; the family has to be a supported one",
    "attn_implementation": "call set_attn_implementation(...) on the returned model",
    "experts_implementation": "its experts are computed where they are paged to",
    "low_cpu_mem_usage": "it never takes more memory than its plan (expert_paging.plan), so leave it out",
    "use_safetensors": "it reads no other format, so leave it out",
    **dict.fromkeys(("revision", "token", "cache_dir", "force_download", "local_files_only", "subfolder"), _LOCAL),
}


def _refuse_options(options: Mapping[str, object]) -> None:
    """Raises ConfigError for an option of transformers, TypeError for an unknown one."""
    for name in options:
        if name in _ANSWERS:
            raise ConfigError(f"load_model has no option {name}: {_ANSWERS[name]}")
        near = get_close_matches(name, inspect.signature(load_model).parameters, 1)
        raise TypeError(
            f"load_model() got an unexpected keyword argument {name!r}"
            + (f"; did you mean {near[0]!r}?" if near else "")
        )


def _policy_of_rows(paged: PagedModel, wanted: PoolPolicy) -> PoolPolicy:
    """Returns `wanted` with bytes shared out over the layers, which a prefill that chooses layer by layer cannot do.

    Logs a warning for a pool that the slots do not hold. Raises InvalidRequest, PoolTooSmall, UnsupportedModel.
    """
    facts = paged.facts
    _check_in_model(wanted.size, facts)
    if isinstance(wanted.size, Bytes):
        wanted = replace(wanted, size=Counts(largest_counts(wanted.size, facts)))
    paged.check_policy(wanted)
    if isinstance(wanted.size, Full):
        return wanted
    needed, num_slots = sum(largest_counts(wanted.size, facts)), paged.pager.num_slots
    if needed > num_slots:
        log.warning(
            "a pool may have %d experts in all layers and expert_memory holds %d, so experts of one pool are paged in "
            "again with every token; give expert_memory=%d or more, or a smaller pool_size",
            needed,
            num_slots,
            needed * facts.expert_bytes,
        )
    return wanted


def _check_in_model(size: PoolSize, facts: RoutingFacts) -> None:
    """Raises InvalidRequest for a pool of more experts than there are, which would restrict nothing."""
    routed_L = facts.routed_per_layer
    largest, all_bytes = max(routed_L, default=0), sum(routed_L) * facts.expert_bytes
    match size:
        case Count(asked) if asked > largest:
            beyond = f"{asked} routed experts a layer, and no layer of this model has more than {largest}"
        case Counts(asked_L) if any(asked > routed for asked, routed in zip(asked_L, routed_L, strict=False)):
            beyond = f"{_listed(asked_L)} routed experts, and the layers of this model have {_listed(routed_L)}"
        case Bytes(total) if total > all_bytes:
            beyond = f"{format_bytes(total)}, and all routed experts of this model have {all_bytes} bytes"
        case _:
            return
    raise InvalidRequest(
        f"the pool would have {beyond}; ask for fewer, or leave pool_size out for all of them", field="pool.size"
    )


def _listed(counts: Sequence[int]) -> str:
    return ",".join(map(str, counts))


@cache
def _paged_class(kind: type[Any]) -> type[Any]:
    return type(kind.__name__, (PagedCausalLM, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


class _Prompt(threading.local):
    """The number of tokens of the prompt that this thread answers; None without one, or where it is not known."""

    num_tokens: int | None = None


class LibraryForwards:
    """Gives every forward its documents: new ones for rows without a past, the cache's own for the others.

    The state of a forward is in its cache and on its thread's stack, so any number of threads may run the model.
    """

    def __init__(self, paged: PagedModel, policy: PoolPolicy) -> None:
        self._paged = paged
        self._policy = policy
        self._loaded_as = _trunk_kind(paged.model)
        self._context_tokens = int(paged.config.max_position_embeddings)
        self._has_warned = False
        self.is_exact = isinstance(policy.size, Full)
        self._prompt = _Prompt()
        self._exact = RequestRouting(paged.facts, PoolPolicy(), device=paged.device)
        # the step that it opened itself, as opposed to the caller's; of the thread that steps
        self._own_step: StepRouting | None = None

    def around(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Runs `forward` of the inner model in a step of the documents that its arguments name.

        Raises InvalidRequest for a cache that was filled without pools, ConfigError for a model that was moved or
        converted.
        """
        signature = inspect.signature(forward)

        @wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            kwargs = dict(zip(signature.parameters, args, strict=False)) | kwargs
            found = _trunk_kind(self._paged.model)
            if found != self._loaded_as:
                raise _moved(self._loaded_as, found)
            around = self._paged.open_step
            if around is not None and around is not self._own_step:
                return forward(**kwargs)  # the caller opened a step of its own
            inputs = kwargs.get("input_ids")
            if inputs is None:
                inputs = kwargs.get("inputs_embeds")
            if inputs is None:
                return forward(**kwargs)  # the model reports the error
            if inputs.shape[1] > self._context_tokens:
                self._warn_of_length(inputs.shape[1])
            if self.is_exact:
                with self._step([self._exact], prefill=True):
                    return forward(**kwargs)
            return self._run_pooled(forward, kwargs, inputs)

        return run

    def _warn_of_length(self, num_tokens: int) -> None:
        if not self._has_warned:
            self._has_warned = True
            log.warning(
                "a prompt of %d tokens is longer than this model's context of %d: tokens past that may make no "
                "sense, and the plan has no memory for them",
                num_tokens,
                self._context_tokens,
            )

    @contextmanager
    def generating(self, num_tokens: int | None) -> Iterator[None]:
        """Around an answer of this thread to a prompt of so many tokens; None: not known."""
        before, self._prompt.num_tokens = self._prompt.num_tokens, num_tokens
        try:
            yield
        finally:
            self._prompt.num_tokens = before

    def _run_pooled(self, forward: Callable[..., Any], kwargs: dict[str, Any], inputs: Tensor) -> Any:
        num_rows, num_tokens = inputs.shape[:2]
        cache = kwargs.get("past_key_values")
        num_past = int(cache.get_seq_length()) if cache is not None else 0
        valid_BT = _valid_tokens(kwargs.get("attention_mask"), num_rows, num_past + num_tokens)
        in_prompt = self._prompt.num_tokens
        if not num_past and in_prompt is not None and in_prompt < num_tokens:
            # An assistant's first candidates come with the prompt, and choose no experts.
            shape, device = (num_rows, num_tokens), inputs.device
            valid_BT = torch.ones(shape, dtype=torch.bool, device=device) if valid_BT is None else valid_BT.clone()
            valid_BT[:, in_prompt:] = False
        documents, has_past = self._documents(cache, num_rows, num_past, valid_BT)
        if cache is not None:
            carry_documents(cache, documents)
        rows = torch.arange(num_rows, device=inputs.device).repeat_interleave(num_tokens)
        valid = None if valid_BT is None else valid_BT[:, -num_tokens:].reshape(-1)
        measures = self._policy.drift is not None and all(has_past)
        with self._step(documents, rows=rows, valid=valid, prefill=not measures):
            output = forward(**kwargs)
        if cache is None and (made := _cache_of(output)) is not None:  # a cache that the model makes for itself
            carry_documents(made, documents)
        for document in dict.fromkeys(documents):
            answer_drift(document)
        return output

    @contextmanager
    def _step(self, documents: Sequence[RequestRouting], **options: Any) -> Iterator[None]:
        with self._paged.step(documents, **options) as step:
            before, self._own_step = self._own_step, step
            try:
                yield
            finally:
                self._own_step = before

    def _documents(
        self, cache: Cache | None, num_rows: int, num_past: int, valid_BT: Tensor | None
    ) -> tuple[list[RequestRouting], list[bool]]:
        """Returns a document for each row, and whether it has a past."""
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

    def _new_document(self) -> RequestRouting:
        return self._paged.routing(self._policy)


class DocumentCache:
    """The class of a transformers cache that carries documents: operations on its rows apply to the documents too."""

    documents: Sequence[RequestRouting]

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


def carry_documents(cache: Cache, documents: Sequence[RequestRouting]) -> None:
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


def _cache_of(output: Any) -> Cache | None:
    """Returns the cache that a forward returned, as a field of its output or in a tuple."""
    values = output if isinstance(output, tuple) else output.values()
    return next((value for value in values if isinstance(value, Cache)), None)


def _valid_tokens(mask: Any, num_rows: int, num_tokens: int) -> Tensor | None:
    """Returns [B, past + new] bools from a 2-D attention mask. Raises InvalidRequest for one that cannot tell
    padding.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[0] != num_rows or mask.shape[1] < num_tokens:
        raise InvalidRequest(
            f"with pools the attention mask must be 2-D, [{num_rows}, {num_tokens}], to tell padding from text; "
            "generating with a static cache makes another, so use the default one",
            field="attention_mask",
        )
    return mask[:, :num_tokens].bool()
