"""Slices: standalone checkpoints that hold only the experts of one pool, and their way back into the whole model.

A smaller gate picks as the whole one does within a pool: in every family here the experts outside of a pool take no
part in the softmax, so that leaving out their rows is the same as masking their logits (EMO rule 17), with or without
renormalisation after top-k.
Legend: L layers, E experts of a layer (all of them, shared ones last).
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from pager.errors import CheckpointError, InvalidRequest, UnsupportedModel
from pager.memory import format_bytes
from pager.models.formats import quantisation_of
from pager.models.open_model import OpenModel
from pager.pools.pick import check_pool
from pager.reading import shown
from pager.store.appearing import appearing, check_absent, sync
from pager.store.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint
from pager.store.pack import Progress, side_files
from pager.store.reads import raw_bytes
from pager.store.safetensors import TensorSpec, layout
from pager.types import ExpertPool, RoutingFacts

SLICE_FIELD = "expert_slice"
"""The field of a slice's config.json that says what it was cut from; `save_pretrained` keeps it."""

CARD_NAME, WHOLE_CARD_NAME = "README.md", "README.whole.md"
_COUNT_FIELDS = {
    "emo": "num_experts", "olmoe": "num_experts", "mixtral": "num_local_experts", "qwen3_moe": "num_experts",
    "qwen2_moe": "num_experts", "flex_olmo": "num_experts",
}  # fmt: skip
"""By model type, the field of a config that counts the experts of a layer. Only these families' gates can be cut."""

_IN_FLOATS = "what was trained goes back into plain floats only: cut, train and merge a checkpoint of those"
_EXPERT = re.compile(r"(.*\blayers\.(\d+)\.(?:mlp|block_sparse_moe)\.experts\.)(\d+)(\..+)")
_STACKED = re.compile(r".*\blayers\.(\d+)\.(?:mlp|block_sparse_moe)\.experts\.\w+")
_GATE = re.compile(r".*\blayers\.(\d+)\.(?:mlp|block_sparse_moe)\.gate\.weight")
_QUANTISED_GATE = re.compile(r".*\blayers\.\d+\.(?:mlp|block_sparse_moe)\.gate\.(?!weight$)\w+")


@dataclass(frozen=True, slots=True)
class SliceRecord:
    """The origin of a slice: the whole model's fingerprint, and by layer the whole's ids of the slice's experts."""

    fingerprint: str
    experts: tuple[tuple[int, ...], ...]
    chosen_by: str

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> SliceRecord:
        """Reads the record of an open slice. Raises CheckpointError for any other checkpoint."""
        found = checkpoint.config.get(SLICE_FIELD)
        if found is None:
            raise CheckpointError(
                f"{checkpoint.path} is not a slice: its config.json has no {SLICE_FIELD!r}; give a folder that "
                "`expert-pager slice` made, or that such a model was saved to after training"
            )
        try:
            record = cls(
                str(found["fingerprint"]), tuple(map(tuple, found["experts"])), str(found.get("chosen_by", ""))
            )
            is_sound = all(list(layer) == sorted(set(layer)) for layer in record.experts) and all(
                type(expert) is int and expert >= 0 for layer in record.experts for expert in layer
            )
        except (KeyError, TypeError, AttributeError):
            is_sound = False
        if not is_sound:
            raise CheckpointError(
                f"{checkpoint.path / 'config.json'} has a damaged {SLICE_FIELD!r}: {shown(found)}; take it from the "
                "slice as it was made"
            )
        return record

    @property
    def as_config(self) -> dict[str, Any]:
        """The value of the config's field."""
        return {"fingerprint": self.fingerprint, "experts": self.experts, "chosen_by": self.chosen_by}

    def place_of(self, name: str) -> Place | None:
        """Returns where a tensor of the whole is in the slice; None where it belongs to an expert left out."""
        if match := _EXPERT.fullmatch(name):
            before, layer, expert, after = match.groups()
            kept = self._layer(int(layer))
            if int(expert) not in kept:
                return None
            return Place(f"{before}{kept.index(int(expert))}{after}", "expert")
        for kind, pattern in (("gate", _GATE), ("expert", _STACKED)):
            if match := pattern.fullmatch(name):
                return Place(name, kind, self._layer(int(match.group(1))))
        return Place(name, "other")

    def _layer(self, layer: int) -> tuple[int, ...]:
        return self.experts[layer] if layer < len(self.experts) else ()


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor's name and kind in the slice and, of a gate or stacked experts, its rows in the whole."""

    name: str
    kind: str  # "expert", "gate" or "other"
    rows: tuple[int, ...] | None = None

    def shape_of(self, whole: TensorSpec) -> tuple[int, ...]:
        return whole.shape if self.rows is None else (len(self.rows), *whole.shape[1:])

    def stretches(self, whole: TensorSpec) -> list[tuple[int, int]]:
        """The ranges of the whole's elements that are in the slice."""
        if self.rows is None:
            return [(0, math.prod(whole.shape))]
        length = math.prod(whole.shape[1:])
        return [(row * length, (row + 1) * length) for row in self.rows]


# --- cutting ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Slice:
    """The result of writing a slice."""

    record: SliceRecord
    num_experts: int
    num_left_out: int
    nbytes: int


def cut(
    model: OpenModel,
    pool: ExpertPool,
    out_dir: str | Path,
    *,
    chosen_by: str,
    expert_dtype: torch.dtype | None = None,
    packed_as: str | None = None,
    progress: Progress | None = None,
) -> Slice:
    """Writes the experts of `pool`, the shared ones and the trunk as a checkpoint. It appears whole or not at all.

    Its experts are stored as `expert_dtype` (None: as in `model`). Holds a bounded buffer, never a tensor. `chosen_by`
    goes into the model card, and so does `packed_as`, what the slice's experts will be packed as. Raises
    UnsupportedModel for a family whose gate cannot be cut, and for quantised gates, InvalidRequest and PoolTooSmall for
    a pool that this model's config cannot hold, CheckpointError for a bad or packed source, ConfigError if `out_dir`
    exists, InsufficientDisk.
    """
    out, checkpoint = Path(out_dir), model.checkpoint
    check_absent(out)
    check_can_be_cut(model)
    experts = kept_experts(pool, model.facts)
    config = _cut_config(checkpoint.config, tuple(map(len, experts)))
    model.check()
    record = SliceRecord(checkpoint.fingerprint, experts, chosen_by)
    sources: dict[str, tuple[TensorSpec, Place]] = {}
    for spec in checkpoint.specs.values():
        if place := record.place_of(spec.name):
            sources[place.name] = (spec, place)
    header, specs = layout(
        SINGLE_NAME,
        (
            (name, place.shape_of(spec), expert_dtype if expert_dtype and place.kind == "expert" else spec.dtype)
            for name, (spec, place) in sources.items()
        ),
    )
    copied = [path for path in side_files(checkpoint.path) if not path.name.startswith("README")]
    nbytes = len(header) + sum(spec.nbytes for spec in specs)
    num_kept = sum(map(len, experts))
    made = Slice(record, num_kept, sum(model.facts.experts_per_layer) - num_kept, nbytes)
    with appearing(out, nbytes + sum(path.stat().st_size for path in copied), "slicing") as partial:
        for path in copied:
            shutil.copyfile(path, partial / path.name)
        if (card := checkpoint.path / CARD_NAME).is_file():
            shutil.copyfile(card, partial / WHOLE_CARD_NAME)
        (partial / "config.json").write_text(json.dumps({**config, SLICE_FIELD: record.as_config}, indent=2) + "\n")
        (partial / CARD_NAME).write_text(_card(model, pool, made, packed_as))
        with (partial / SINGLE_NAME).open("wb") as stream:
            stream.write(header)
            _write(checkpoint, sources, specs, stream, progress)
            sync(stream)
    return made


def check_can_be_cut(model: OpenModel) -> None:
    """Raises UnsupportedModel for gates that cannot be cut, CheckpointError for a packed model or a GGUF file."""
    checkpoint = model.checkpoint
    checkpoint.require_folder("cut a slice of it")
    config = checkpoint.config
    if config.get("model_type") not in _COUNT_FIELDS:
        families = ", ".join(sorted(_COUNT_FIELDS))
        raise UnsupportedModel(
            f"the gate of model type {shown(config.get('model_type'))} cannot be cut; those of {families} can"
        )
    if config.get("always_active_experts") or any(config.get("always_active_experts_per_layer") or ()):
        raise UnsupportedModel("a gate with always-active experts cannot be cut, as no pools are defined for it")
    if checkpoint.is_packed:
        raise CheckpointError(f"{checkpoint.path} is packed; slice the checkpoint that it was made from")
    if quantised := next(filter(_QUANTISED_GATE.fullmatch, checkpoint.specs), None):
        raise UnsupportedModel(
            f"the gates of {checkpoint.path} are quantised (tensor {quantised!r}), and only gates in plain floats can "
            "be cut; slice a checkpoint of this model that has such gates"
        )


def kept_experts(pool: ExpertPool, facts: RoutingFacts) -> tuple[tuple[int, ...], ...]:
    """Returns by layer the pool's experts and behind them the shared ones. Raises InvalidRequest, PoolTooSmall."""
    check_pool(pool, facts)
    layers = zip(pool.experts, facts.routed_per_layer, facts.experts_per_layer, strict=True)
    return tuple((*routed, *range(num_routed, num_experts)) for routed, num_routed, num_experts in layers)


def _cut_config(config: Mapping[str, Any], counts_L: Sequence[int]) -> dict[str, Any]:
    """Returns the config of a model with so many experts a layer. Raises InvalidRequest."""
    model_type: str = config["model_type"]
    field = _COUNT_FIELDS[model_type]
    different = sorted({count for count in counts_L if count})
    numbers = ("num_experts", "num_local_experts", "num_experts_per_layer")  # some configs use another family's name
    rest = {name: value for name, value in config.items() if name not in numbers}
    if len(different) == 1 and not config.get("num_experts_per_layer"):
        return {**rest, field: different[0]}
    if model_type == "emo":
        return {**rest, field: different[-1], "num_experts_per_layer": list(counts_L)}
    uniform = sum(counts_L) // sum(count > 0 for count in counts_L)
    raise InvalidRequest(
        f"the pool has {different[0]} to {different[-1]} experts a layer, and a config of model type {model_type!r} "
        f"has one number for all layers; choose a pool of {uniform} experts in every layer, the largest that takes no "
        "more memory",
        field="pool.size",
    )


def _write(
    checkpoint: Checkpoint,
    sources: Mapping[str, tuple[TensorSpec, Place]],
    specs: Sequence[TensorSpec],
    stream: BinaryIO,
    progress: Progress | None,
) -> None:
    done, total = 0, sum(spec.nbytes for spec in specs)
    for spec in specs:
        source, place = sources[spec.name]
        for _, piece in _within(checkpoint.pieces(source.name), place.stretches(source)):
            stream.write(raw_bytes(piece.to(spec.dtype)))
        done += spec.nbytes
        if progress is not None:
            progress(done, total)


def _within(pieces: Iterable[Tensor], stretches: Sequence[tuple[int, int]]) -> Iterator[tuple[int, Tensor]]:
    """Yields the elements of a tensor that lie in these ranges, in order, each part with the place of its first one."""
    start = 0
    for piece in pieces:
        end = start + piece.numel()
        for low, high in stretches:
            first, last = max(low, start), min(high, end)
            if first < last:
                yield first, piece[first - start : last - start]
        start = end


def _card(model: OpenModel, pool: ExpertPool, made: Slice, packed_as: str | None) -> str:
    """The model card: what was kept, of which model, chosen by what."""
    facts, record, whole = model.facts, made.record, model.checkpoint.path
    name = whole.resolve().name
    mass = "" if pool.covered_mass is None else f", which held {pool.covered_mass:.1%} of the gates' probability there"
    layers = zip(pool.experts, facts.shared_per_layer, facts.experts_per_layer, strict=True)
    rows = [
        f"| {layer} | {len(routed)} + {num_shared} of {num_experts} | {' '.join(map(str, routed))} |"
        for layer, (routed, num_shared, num_experts) in enumerate(layers)
        if num_experts
    ]
    native = " after `import pager`" if model.family.model_type == "emo" else ""
    use = f"""- loads in plain transformers{native}, and in expert-pager as any checkpoint

After training, `expert-pager slice --merge SLICE --into MODEL OUT` puts it back into a copy of {name}."""
    if packed_as is not None:
        use = f"- experts in {packed_as}, packed for expert-pager; plain transformers does not load them\n"
    elif model.quantised is not None:
        use = f"""- quantised as {name} is ({model.quantised.words}): loads in expert-pager as any checkpoint, and \
in plain transformers where {name} does

To train a slice and merge it back, cut it from a checkpoint of this model in plain floats."""
    return f"""---
library_name: transformers
tags: [mixture-of-experts, expert-slice]
---

# A slice of {name}

{made.num_experts} of the {made.num_experts + made.num_left_out} experts of {name} (model type \
`{model.family.model_type}`), with their rows of the gates, the shared experts and everything else unchanged: \
{format_bytes(made.nbytes)} of weights. It gives the logits that the whole model gives within this pool, and knows \
nothing of what the other experts knew.

- cut from: {name}, fingerprint `{record.fingerprint}`
- chosen by: {record.chosen_by}{mass}
{use}

`config.json` has the kept experts under `{SLICE_FIELD}`.

| layer | kept, routed + shared | routed experts of {name} |
|---|---|---|
{chr(10).join(rows)}
"""


# --- merging ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Merged:
    """The numbers of experts, gates and other tensors of the whole that have changed; `others` by name."""

    num_experts: int
    num_gates: int
    others: tuple[str, ...]


def merge(
    slice_dir: str | Path, whole_dir: str | Path, out_dir: str | Path, progress: Progress | None = None
) -> Merged:
    """Writes a copy of the whole model in which the slice's tensors, trained since, take the place of its own.

    An element that the whole's equals in the slice's precision stays as the whole has it, and so does every tensor
    and row that the slice does not hold, to the bit. `out_dir` appears whole or not at all. Raises CheckpointError for
    a slice of another model or with other tensors, ConfigError if `out_dir` exists, InsufficientDisk.
    """
    out = Path(out_dir)
    check_absent(out)
    with Checkpoint.open(slice_dir) as part, Checkpoint.open(whole_dir) as whole:
        for checkpoint in (part, whole):
            if checkpoint.is_packed:
                raise CheckpointError(f"{checkpoint.path} is packed; give the checkpoint that it was made from")
        pairs = _pairs(part, whole)
        weights = list(whole.file_nbytes)
        copied = [whole.path / name for name in (*weights, "config.json", INDEX_NAME)] + list(side_files(whole.path))
        copied = [path for path in copied if path.is_file()]
        with appearing(out, sum(path.stat().st_size for path in copied), "merging") as partial:
            for path in copied:
                shutil.copyfile(path, partial / path.name)
            changed = _write_changes(part, whole, pairs, partial, progress)
            for name in weights:
                with (partial / name).open("rb+") as stream:
                    sync(stream)
    experts = set[tuple[int, int]]()
    for name, rows in changed.items():
        if match := _EXPERT.fullmatch(name):
            experts.add((int(match.group(2)), int(match.group(3))))
        elif match := _STACKED.fullmatch(name):
            experts.update((int(match.group(1)), row) for row in rows)
    gates = [name for name in changed if _GATE.fullmatch(name)]
    others = tuple(name for name in changed if not any(kind.fullmatch(name) for kind in (_EXPERT, _STACKED, _GATE)))
    return Merged(len(experts), len(gates), others)


def _pairs(part: Checkpoint, whole: Checkpoint) -> list[tuple[TensorSpec, Place]]:
    """Pairs tensors of the whole with their places in the slice. Raises CheckpointError where they do not match."""
    record = SliceRecord.of(part)
    if record.fingerprint != whole.fingerprint:
        raise CheckpointError(
            f"{part.path} was cut from the model with fingerprint {record.fingerprint}, and {whole.path} has "
            f"{whole.fingerprint}; give the model that it was cut from"
        )
    pairs = []
    for spec in whole.specs.values():
        place = record.place_of(spec.name)
        if place is None:
            continue
        if place.name in part.specs:
            part.require(place.name, place.shape_of(spec))
            pairs.append((spec, place))
        elif place.kind != "other":  # of the others, a tied head is often not saved
            raise CheckpointError(
                f"{part.path} lacks {place.name!r}, which its {SLICE_FIELD!r} calls for"
                + (f"; {whole.path} is quantised, and {_IN_FLOATS}" if quantisation_of(whole) else "")
            )
    if strange := part.specs.keys() - {place.name for _, place in pairs}:
        raise CheckpointError(
            f"{part.path} holds {len(strange)} tensors that are not of {whole.path}, first {min(strange)!r}; save it "
            "as transformers does by default, with adapters merged into their weights"
        )
    return pairs


def _write_changes(
    part: Checkpoint,
    whole: Checkpoint,
    pairs: Sequence[tuple[TensorSpec, Place]],
    partial: Path,
    progress: Progress | None,
) -> dict[str, set[int]]:
    """Writes what differs over the copies in `partial`; returns the names of the tensors that do, with the rows."""
    changed = {}
    done, total = 0, sum(spec.nbytes for spec, _ in pairs)
    for spec, place in pairs:
        with (partial / spec.file).open("rb+") as stream:
            if rows := _write_differences(part, whole, (spec, place), stream):
                changed[spec.name] = rows
        done += spec.nbytes
        if progress is not None:
            progress(done, total)
    return changed


def _write_differences(
    part: Checkpoint, whole: Checkpoint, pair: tuple[TensorSpec, Place], stream: BinaryIO
) -> set[int]:
    """Writes the elements that differ, and returns the rows of the whole's tensor that they are in."""
    spec, place = pair
    changed, row_length = set[int](), max(1, math.prod(spec.shape[1:]))
    ours = _within(whole.pieces(spec.name), place.stretches(spec))
    for start, old, new in _side_by_side(ours, part.pieces(place.name)):
        is_same = old.to(new.dtype) == new
        if not bool(is_same.all()):
            merged = torch.where(is_same, old, new.to(old.dtype))
            os.pwrite(stream.fileno(), raw_bytes(merged), spec.offset + start * spec.dtype.itemsize)
            places = (~is_same).nonzero().flatten() + start
            changed.update((places // row_length).unique().tolist())
    return changed


def _side_by_side(left: Iterator[tuple[int, Tensor]], right: Iterator[Tensor]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yields equally long parts of two streams of the same elements, with the place of the first in the left one."""
    start, ours, theirs = 0, torch.empty(0), torch.empty(0)
    while True:
        if not ours.numel():
            following = next(left, None)
            if following is None:
                return
            start, ours = following
        if not theirs.numel():
            theirs = next(right)
        count = min(ours.numel(), theirs.numel())
        yield start, ours[:count], theirs[:count]
        start, ours, theirs = start + count, ours[count:], theirs[count:]
