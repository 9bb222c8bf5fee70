"""The source that experts are read from: the seam between the disk tier and the cache.

An expert is a record: its parameters one after the other (`ExpertShape`). A plain checkpoint stores it in pieces, which
are read straight into their places where they are the record's own bytes, and are converted on the way where not.
"""

from __future__ import annotations

import math
import mmap
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
import xxhash
from torch import Tensor

from pager.errors import CheckpointError, ChecksumMismatch, ExpertReadError, ExpertUnavailable
from pager.reading import one_line
from pager.store.checkpoint import Checkpoint
from pager.store.pack_format import PACK_NAME, all_keys, read_pack_header
from pager.store.reads import PAGE_BYTES, DataFile, FailedRead, FileRange, Stretch, fill, raw_bytes
from pager.store.safetensors import PLAIN_FLOATS, TensorSpec
from pager.types import ExpertKey, ExpertShape


class Row(NamedTuple):
    """One expert's part of a stored tensor that holds those of all experts of a layer side by side."""

    name: str
    row: int


@dataclass(frozen=True, slots=True)
class Made:
    """One parameter that is made of what is stored, by operations that are thread-safe."""

    pieces: tuple[str | Row, ...]
    make: Callable[[Sequence[Tensor]], Tensor]
    decodes: bool = False  # the pieces are quantised, and what they are scaled by


@dataclass(frozen=True, slots=True)
class AsBytes:
    """One part of a record of bytes: the bytes of stored tensors or rows, one after the other, of whatever dtype."""

    pieces: tuple[str | Row, ...]


ExpertPieces = Callable[[ExpertKey], Sequence[tuple[str | Row, ...] | Made | AsBytes]]
"""For each parameter of an expert, the stored tensors or rows that lie in it one after the other, or what makes it."""


class Destination(NamedTuple):
    """The destination of an expert's bytes: a tensor for each parameter, CPU, contiguous, of any dtype in floating
    point.

    The bytes go straight into tensors of the stored dtype, and into others through a buffer of STAGING_BYTES.
    """

    key: ExpertKey
    tensors: tuple[Tensor, ...]


InPlace = tuple[tuple[Tensor, ...], ...]
"""An expert in a file that is mapped: the pieces of each parameter in order, one as a rule."""


class SideBySide(NamedTuple):
    """A layer's experts in a file that is mapped, where they lie at equal distances: a tensor of all experts for each
    parameter, and the number of each expert in these.
    """

    parameters: tuple[Tensor, ...]
    number_of_E: Tensor


class ExpertSource(Protocol):
    """The experts of one checkpoint, to be read by key. Knows no slots or budgets. Thread-safe."""

    shape: ExpertShape
    stored_dtype: torch.dtype
    stored_bytes: int
    """Of one expert: what is read for it."""

    @property
    def bytes_read(self) -> int:
        """About how many bytes were read so far; it grows in the middle of a read, too."""
        ...

    def read(self, key: ExpertKey, *tensors: Tensor) -> int:
        """Fills one destination; returns the bytes read. Raises what `read_all` returns."""
        ...

    def read_all(
        self, destinations: Sequence[Destination], on_most: Callable[[], None] | None = None
    ) -> list[int | ExpertUnavailable]:
        """Fills all destinations; returns for each the bytes read, or an error, and then its tensors are undefined.

        Neighbours in a file come in one read. `on_most` may be called when most is read. The error is an
        ExpertReadError, or a ChecksumMismatch where the bytes' checksum is known. A key that the model doesn't have is
        a KeyError, tensors of another shape a ValueError.
        """
        ...

    def in_place(self, keys: Sequence[ExpertKey]) -> dict[ExpertKey, InPlace]:
        """Returns the parameters of those of `keys`, experts of one layer, that the page cache has, for reading only.

        Without those that are not stored as `stored_dtype` and `shape` say, and without those that do not match their
        checksums, which are checked when they are first found there. See `DataFile.mapped` for how long they are valid.
        """
        ...

    def in_page_cache(self, keys: Sequence[ExpertKey]) -> list[ExpertKey]:
        """Returns those of `keys`, experts of one layer, that `in_place` would find, if their checksums are right."""
        ...

    def layer_in_place(self, layer: int) -> SideBySide | None:
        """Returns all experts of the layer where `in_place` would find each of them and they lie at equal distances."""
        ...

    def place_of(self, key: ExpertKey) -> FileRange: ...

    def bypass_page_cache(self, dtype: torch.dtype) -> str:
        """Lets reads into whole pages of memory in `dtype` bypass the page cache from now on.

        Returns why they do not; an empty string when they do.
        """
        ...

    def keys_per_layer(self) -> tuple[int, ...]:
        """Returns the number of experts of each layer, shared ones included; 0 for a dense layer."""
        ...

    def close(self) -> None:
        """Closes the descriptors. To be called only when no read is running."""
        ...


def open_experts(
    checkpoint: Checkpoint, pieces: ExpertPieces, experts_per_layer: Sequence[int], shape: ExpertShape
) -> ExpertSource:
    """Opens the experts of a plain or packed checkpoint, checked against what the model's config calls for.

    The source outlives `checkpoint`. Raises CheckpointError.
    """
    if checkpoint.pack is None:
        return CheckpointExperts(checkpoint, pieces, experts_per_layer, shape)
    found = (checkpoint.pack.experts_per_layer, checkpoint.pack.shape)
    expected = (tuple(experts_per_layer), shape)
    if found != expected:
        raise CheckpointError(
            f"{checkpoint.path / PACK_NAME} holds {found} and its config calls for {expected}; pack it again"
        )
    return PackedExperts(checkpoint.path / PACK_NAME)


class _StoredExperts:
    """The common part of plain and packed files: an expert is a few stretches of bytes."""

    shape: ExpertShape
    stored_dtype: torch.dtype
    stored_bytes: int
    is_staged: bool = False  # what is read passes through memory of its own, an expert at a time
    _experts_per_layer: tuple[int, ...]

    def __init__(self) -> None:
        self._found_in_place: dict[ExpertKey, InPlace] = {}  # empty where checksums were wrong
        self._layers: dict[int, _StoredLayer] = {}

    def read(self, key: ExpertKey, *tensors: Tensor) -> int:
        (result,) = self.read_all([Destination(key, tensors)])
        if isinstance(result, ExpertUnavailable):
            raise result
        return result

    def read_all(
        self, destinations: Sequence[Destination], on_most: Callable[[], None] | None = None
    ) -> list[int | ExpertUnavailable]:
        parts = [[each] for each in destinations] if self.is_staged else [destinations]
        return [
            result for part in parts for result in self._read_together(part, on_most if part is parts[-1] else None)
        ]

    def _read_together(
        self, destinations: Sequence[Destination], on_most: Callable[[], None] | None
    ) -> list[int | ExpertUnavailable]:
        plans = [self._plan(_checked(self.shape, each)) for each in destinations]
        errors: dict[ExpertKey, ExpertUnavailable] = {}
        for dtype in dict.fromkeys(dtype for plan in plans for dtype, _ in plan.stretches):
            alike = [stretch for plan in plans for stored, stretch in plan.stretches if stored == dtype]
            for failure in fill(alike, dtype, on_most):
                errors.setdefault(failure.stretch.key, _error(failure))
        results: list[int | ExpertUnavailable] = []
        for each, plan in zip(destinations, plans, strict=True):
            if each.key not in errors:
                try:
                    for finish in plan.finish:
                        finish()
                except Exception as error:  # what makes an expert checks values in ways of its own
                    errors[each.key] = _unmakeable(each.key, plan, error)
            results.append(errors.get(each.key, sum(stretch.nbytes for _, stretch in plan.stretches)))
        return results

    def in_place(self, keys: Sequence[ExpertKey]) -> dict[ExpertKey, InPlace]:
        known, there = self._found_in_place, self.in_page_cache(keys)
        for key in there:
            if key not in known:
                known[key] = self._intact(self._layer(key.layer).spans[key])
        return {key: known[key] for key in there if known[key]}

    def in_page_cache(self, keys: Sequence[ExpertKey]) -> list[ExpertKey]:
        if not keys:
            return []
        try:
            there, patched = self._layer(keys[0].layer).there(keys)
        except OSError:  # a read will say so
            there, patched = [], []
        known = self._found_in_place
        if patched or len(there) < len(keys):
            for key in {*keys}.difference(there).union(patched):  # what comes back from the disk is checked again
                known.pop(key, None)
        return [key for key in there if known.get(key, True)]

    def layer_in_place(self, layer: int) -> SideBySide | None:
        stored, now_s = self._layer(layer), time.monotonic()
        if stored.even is None:
            return None
        try:
            stored.check_files()
            if now_s >= stored.side_by_side_until_s:
                stored.side_by_side, keys = None, list(stored.spans)
                if len(self.in_place(keys)) == len(keys):
                    with torch.inference_mode(False):
                        stored.side_by_side = stored.even.side_by_side(self.shape.shapes, self.stored_dtype)
                stored.side_by_side_until_s = now_s + SEEN_S
        except OSError:  # a read will say so
            return None
        return stored.side_by_side

    def _intact(self, spans: Sequence[Span]) -> InPlace:
        """Returns an expert's parameters in the page cache; nothing where they do not match their checksums."""
        parts = [span.file.mapped(span.offset, span.nbytes) for span in spans]
        is_intact = all(span.is_intact(part) for span, part in zip(spans, parts, strict=True))
        return self._parameters(spans, parts) if is_intact else ()

    def _layer(self, number: int) -> _StoredLayer:
        if number not in self._layers:
            keys = (ExpertKey(number, expert) for expert in range(self._experts_per_layer[number]))
            spans = {key: self._spans(key) for key in keys}
            sizes = [math.prod(shape) * self.stored_dtype.itemsize for shape in self.shape.shapes]
            stretches = _stretches([span for each in spans.values() for span in each])
            self._layers[number] = _StoredLayer(spans, stretches, _Even.of(spans, sizes))
        return self._layers[number]

    def close(self) -> None:
        self._found_in_place.clear()
        self._layers.clear()

    def _parameters(self, spans: Sequence[Span], parts: Sequence[Tensor]) -> InPlace:
        """Returns an expert's parameters in its bytes: the parts of each, or one part for all."""
        shapes, dtype = self.shape.shapes, self.stored_dtype
        with torch.inference_mode(False):
            if len(parts) < len(shapes):
                split = parts[0].split([math.prod(shape) * dtype.itemsize for shape in shapes])
                return tuple((part.view(dtype).view(shape),) for part, shape in zip(split, shapes, strict=True))
            return tuple(
                tuple(
                    part.view(dtype).view(-1, *shape[1:])
                    for span, part in zip(spans, parts, strict=True)
                    if span.parameter == number
                )
                for number, shape in enumerate(shapes)
            )

    def keys_per_layer(self) -> tuple[int, ...]:
        return self._experts_per_layer

    @abstractmethod
    def _plan(self, destination: Destination) -> ReadPlan: ...

    @abstractmethod
    def _spans(self, key: ExpertKey) -> Sequence[Span]:
        """Returns where each parameter's bytes are, in order, or those of all; nothing where they are not those of a
        record.
        """


class Span(NamedTuple):
    """Bytes of a file that are a parameter's, or some of them, or all of an expert's: pieces side by side, with their
    checksums.
    """

    file: DataFile
    offset: int
    pieces: tuple[tuple[int, str | None], ...]
    parameter: int = 0

    @property
    def nbytes(self) -> int:
        return sum(nbytes for nbytes, _ in self.pieces)

    def is_followed_by(self, other: Span) -> bool:
        """Tells whether `other` begins where this ends."""
        return self.file is other.file and self.offset + self.nbytes == other.offset

    def is_intact(self, data: Tensor) -> bool:
        """Tells whether `data`, the bytes of the span, match the checksums of its pieces, where these are known."""
        parts = data.split([nbytes for nbytes, _ in self.pieces])
        return all(
            checksum is None or xxhash.xxh3_128_hexdigest(raw_bytes(part)) == checksum
            for part, (_, checksum) in zip(parts, self.pieces, strict=True)
        )


ASKED_AT_ONCE_BYTES = 1 << 26
"""Up to this much the system is asked once which pages of a layer's experts it has, and not for each expert."""

_Stretches = Mapping[DataFile, tuple[int, int]]
"""The first byte of each file, and the one behind the last."""


FEW_PAGES = 64
"""The pages that an expert or layer may lack and still be computed in the page cache: this many, or one in this many if
that is more, but never over an eighth. A system short of memory drops single pages, mostly of experts that are also in
slots, and reading those back costs little beside reading experts into slots.
"""

SEEN_S = 0.1
"""For so long the page cache is taken to have what it was seen to have. What it drops meanwhile is read by the fault of
whoever touches it: slow, not wrong."""


class _Even(NamedTuple):
    """Experts at equal distances in one file: where each parameter of the first one begins, and the distance to that of
    the next. `experts` are in the order in which they lie there.
    """

    file: DataFile
    places: Sequence[tuple[int, int]]
    experts: Sequence[int]

    @staticmethod
    def of(spans: Mapping[ExpertKey, Sequence[Span]], sizes: Sequence[int]) -> _Even | None:
        """Returns how experts with parameters of these sizes lie, or None where that is not at equal distances."""
        files = {span.file for each in spans.values() for span in each}
        starts = {key.expert: starts for key, each in spans.items() if (starts := _starts(each, sizes))}
        if len(files) != 1 or len(starts) < len(spans):
            return None
        experts = sorted(starts, key=lambda expert: starts[expert][0])
        places = []
        for number, size in enumerate(sizes):
            ordered = [starts[expert][number] for expert in experts]
            distances = {later - earlier for earlier, later in pairwise(ordered)} or {size}
            if len(distances) > 1 or min(distances) < size:
                return None
            places.append((ordered[0], distances.pop()))
        return _Even(files.pop(), places, experts)

    def side_by_side(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> SideBySide:
        number_of_E = torch.empty(len(self.experts), dtype=torch.int32)
        number_of_E[list(self.experts)] = torch.arange(len(self.experts), dtype=torch.int32)
        parameters = []
        for (start, distance), shape in zip(self.places, shapes, strict=True):
            nbytes = distance * (len(self.experts) - 1) + math.prod(shape) * dtype.itemsize
            flat = self.file.mapped(start, nbytes).view(dtype)
            strides = torch.empty(shape, device="meta").stride()
            parameters.append(flat.as_strided((len(self.experts), *shape), (distance // dtype.itemsize, *strides)))
        return SideBySide(tuple(parameters), number_of_E)


def _starts(spans: Sequence[Span], sizes: Sequence[int]) -> Sequence[int]:
    """Returns where each parameter of an expert begins; nothing where one of them is in several pieces."""
    if len(spans) == 1 < len(sizes) and spans[0].nbytes == sum(sizes):
        return list(accumulate(sizes[:-1], initial=spans[0].offset))
    return [span.offset for span in spans] if [span.nbytes for span in spans] == [*sizes] else ()


@dataclass(slots=True)
class _StoredLayer:
    """The places of a layer's experts: the spans of each, the stretches of files that have all of them, and how they
    lie where they do so evenly. Mutable: keeps until when the page cache is taken to have which.
    """

    spans: Mapping[ExpertKey, Sequence[Span]]
    stretches: _Stretches
    even: _Even | None
    side_by_side: SideBySide | None = None
    side_by_side_until_s: float = 0.0
    _seen_until_s: dict[ExpertKey, float] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(end - start for start, end in self.stretches.values())

    def check_files(self) -> None:
        """Checks that the files are as long as they were. Raises OSError where one is shorter."""
        for file in self.stretches:
            file.check_length()

    def there(self, keys: Sequence[ExpertKey]) -> tuple[list[ExpertKey], list[ExpertKey]]:
        """Returns those of `keys` that the page cache has, or had SEEN_S ago, and those of the layer that it had just
        now but for a few pages, which have been read. Raises OSError.
        """
        self.check_files()
        seen_until_s, now_s = self._seen_until_s, time.monotonic()
        unseen = [key for key in keys if seen_until_s.get(key, 0.0) <= now_s]
        patched: list[ExpertKey] = []
        if unseen and self.nbytes <= ASKED_AT_ONCE_BYTES:
            looks = [(list(self.spans), self.stretches)]
        else:
            looks = [([key], _stretches(self.spans[key])) for key in unseen]
        for some, stretches in looks:
            whole, holed = self._look(some, stretches)
            seen_until_s.update(dict.fromkeys((*whole, *holed), now_s + SEEN_S))
            patched += holed
        return [key for key in keys if seen_until_s.get(key, 0.0) >= now_s], patched

    def _look(self, keys: Sequence[ExpertKey], stretches: _Stretches) -> tuple[list[ExpertKey], list[ExpertKey]]:
        """Returns those of `keys` that the page cache has, and those that lack some pages where these are few, by one
        look at each of `stretches`; and has the latter read.
        """
        pages = {file: file.cached_pages(start, end) for file, (start, end) in stretches.items()}
        starts = {file: start - start % mmap.PAGESIZE for file, (start, _) in stretches.items()}
        if any(each is None for each in pages.values()):
            return [], []

        def is_there(span: Span) -> bool:
            found, start = pages[span.file], starts[span.file]
            first, end = span.offset - start, span.offset + span.nbytes - start
            return found is not None and 0 not in found[first // mmap.PAGESIZE : -(-end // mmap.PAGESIZE)]

        stored = [key for key in keys if self.spans[key]]
        if not any(found is not None and 0 in found for found in pages.values()):
            return stored, []
        whole = [key for key in stored if all(is_there(span) for span in self.spans[key])]
        if any(found is not None and found.count(0) > _few_of(len(found)) for found in pages.values()):
            return whole, []
        holes = [
            FileRange(number, starts[file] + first * mmap.PAGESIZE, starts[file] + end * mmap.PAGESIZE)
            for number, (file, found) in enumerate(pages.items())
            for first, end in _holes(found or b"")
        ]
        are_read = _read_into_page_cache(list(pages), holes)
        return whole, [key for key in stored if key not in {*whole}] if are_read else []


def _few_of(num_pages: int) -> int:
    return max(num_pages // FEW_PAGES, min(num_pages // 8, FEW_PAGES))


def _holes(pages: bytes) -> Iterator[tuple[int, int]]:
    """Yields where each run of pages that are not there begins and ends."""
    end = 0
    while (first := pages.find(0, end)) >= 0:
        end = first + 1
        while pages[end : end + 1] == b"\0":
            end += 1
        yield first, end


def _read_into_page_cache(files: Sequence[DataFile], ranges: Sequence[FileRange]) -> bool:
    """Returns whether that worked: where the disk has an error, a fault would end the process, and a read fails one
    request.
    """
    try:
        for number, start, end in ranges:
            files[number].will_need(start, end - start)  # all at once
        for number, start, end in ranges:
            files[number].read(min(end, files[number].size) - start, start)
    except OSError:
        return False
    return True


def _stretches(spans: Iterable[Span]) -> _Stretches:
    found: dict[DataFile, tuple[int, int]] = {}
    for span in spans:
        start, end = found.get(span.file, (span.offset, span.offset))
        found[span.file] = min(start, span.offset), max(end, span.offset + span.nbytes)
    return found


class ReadPlan(NamedTuple):
    """The reads for one expert, with the dtype that it is stored in, and what to do once they are done."""

    stretches: Sequence[tuple[torch.dtype, Stretch]]
    finish: Sequence[Callable[[], object]] = ()


@dataclass(frozen=True, slots=True)
class StoredPiece:
    """Bytes of one stored tensor. `shape` is without the dimension that `row` is of. A row alone has no checksum."""

    spec: TensorSpec
    row: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.shape if self.row is None else self.spec.shape[1:]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.spec.dtype.itemsize

    @property
    def offset(self) -> int:
        return self.spec.offset + (self.row or 0) * self.nbytes

    @property
    def checksum(self) -> str | None:
        return self.spec.checksum if self.row is None else None


@dataclass(frozen=True, slots=True)
class StoredParameter:
    """The pieces of one parameter, and what makes it of them; None where their bytes are its own."""

    pieces: tuple[StoredPiece, ...]
    make: Callable[[Sequence[Tensor]], Tensor] | None = None
    decodes: bool = False
    is_bytes: bool = False  # of a record of bytes, whatever dtypes the pieces have


class CheckpointExperts(_StoredExperts):
    """The experts of a plain checkpoint. Whole tensors are checked at every read if checksums were recorded."""

    def __init__(
        self, checkpoint: Checkpoint, pieces: ExpertPieces, experts_per_layer: Sequence[int], shape: ExpertShape
    ) -> None:
        """Opens descriptors of its own, so `checkpoint` may be closed. Raises CheckpointError."""
        super().__init__()
        self.shape = shape
        self._experts_per_layer = tuple(experts_per_layer)
        self._stored = find_experts(checkpoint, pieces, self._experts_per_layer, shape)
        first = next(iter(self._stored.values()))
        dtypes = {piece.spec.dtype for stored in self._stored.values() for piece in pieces_of(stored)}
        # Where some are in another float than the rest: what holds them all.
        is_plain = dtypes <= PLAIN_FLOATS
        self.stored_dtype = reduce(torch.promote_types, dtypes) if is_plain else first[0].pieces[0].spec.dtype
        if first[0].is_bytes:
            self.stored_dtype = torch.uint8
        self.stored_bytes = sum(piece.nbytes for piece in pieces_of(first))
        self.is_staged = any(parameter.make for stored in self._stored.values() for parameter in stored)
        used = sorted({piece.spec.file for stored in self._stored.values() for piece in pieces_of(stored)})
        self._files = {name: checkpoint.duplicate_file(name) for name in used}
        for file in self._files.values():
            file.expect_scattered_reads()
        self._file_numbers = {name: number for number, name in enumerate(used)}

    @property
    def bytes_read(self) -> int:
        return sum(file.bytes_read for file in self._files.values())

    def place_of(self, key: ExpertKey) -> FileRange:
        """The range of its pieces in the file that the first of them is in."""
        pieces = sorted(pieces_of(self._stored[key]), key=lambda piece: (piece.spec.file, piece.offset))
        file = pieces[0].spec.file
        last = max(piece.offset + piece.nbytes for piece in pieces if piece.spec.file == file)
        return FileRange(self._file_numbers[file], pieces[0].offset, last)

    def bypass_page_cache(self, dtype: torch.dtype) -> str:
        return "tensors of a safetensors file begin anywhere in a page; pack the model"

    def close(self) -> None:
        super().close()
        for file in self._files.values():
            file.close()

    def _plan(self, destination: Destination) -> ReadPlan:
        key, tensors = destination
        stretches: list[tuple[torch.dtype, Stretch]] = []
        finish: list[Callable[[], object]] = []
        for parameter, out in zip(self._stored[key], tensors, strict=True):
            if parameter.make is None:
                parts = out.split([piece.shape[0] for piece in parameter.pieces])
            else:
                parts = tuple(torch.empty(piece.shape, dtype=piece.spec.dtype) for piece in parameter.pieces)
                finish.append(partial(_convert, parameter.make, parts, out))
            for piece, part in zip(parameter.pieces, parts, strict=True):
                part = part.view(piece.spec.dtype) if parameter.is_bytes else part
                file = self._files[piece.spec.file]
                stretch = Stretch(key, file, piece.offset, piece.nbytes, piece.checksum, (part,))
                stretches.append((piece.spec.dtype, stretch))
        return ReadPlan(stretches, finish)

    def _spans(self, key: ExpertKey) -> Sequence[Span]:
        spans: list[Span] = []
        for number, parameter in enumerate(self._stored[key]):
            num_before = len(spans)
            for piece in parameter.pieces:
                itself = Span(self._files[piece.spec.file], piece.offset, ((piece.nbytes, piece.checksum),), number)
                is_as_stored = parameter.make is None and piece.spec.dtype == self.stored_dtype
                if not is_as_stored or piece.offset % self.stored_dtype.itemsize:
                    return ()
                if len(spans) > num_before and spans[-1].is_followed_by(itself):
                    itself = itself._replace(offset=spans[-1].offset, pieces=(*spans.pop().pieces, *itself.pieces))
                spans.append(itself)
            if parameter.is_bytes and len(spans) > num_before + 1:
                return ()
        return spans


def _convert(make: Callable[[Sequence[Tensor]], Tensor], pieces: Sequence[Tensor], out: Tensor) -> None:
    out.copy_(make(pieces))


class PackedExperts(_StoredExperts):
    """The experts of a pack: one extent each, its checksum verified every time."""

    def __init__(self, pack_path: str | Path) -> None:
        """Opens the pack. Raises CheckpointError."""
        super().__init__()
        path = Path(pack_path)
        try:
            self._file = DataFile(path)
        except OSError as error:
            raise CheckpointError(f"cannot open {path}: {error.strerror or error}; pack the model again") from error
        self._file.expect_scattered_reads()
        try:
            header, self._data_start = read_pack_header(self._file)
        except BaseException:
            self._file.close()
            raise
        self.shape = header.shape
        self.stored_dtype = header.dtype
        self.stored_bytes = header.shape.num_elements * header.dtype.itemsize
        self._experts_per_layer = header.experts_per_layer
        self._extents = header.extents

    @property
    def bytes_read(self) -> int:
        return self._file.bytes_read

    def place_of(self, key: ExpertKey) -> FileRange:
        start = self.offset_of(key)
        return FileRange(0, start, start + self._extents[key].nbytes)

    def bypass_page_cache(self, dtype: torch.dtype) -> str:
        if dtype != self.stored_dtype:
            return f"experts stored as {self.stored_dtype} and served as {dtype} are converted; pack them as {dtype}"
        if any(math.prod(part) * dtype.itemsize % PAGE_BYTES for part in self.shape.shapes):
            return f"the matrices of these experts are not whole pages of {PAGE_BYTES} bytes"
        try:
            self._file.bypass_page_cache()
        except OSError as error:
            return f"its file system refuses it ({error.strerror or error})"
        return ""

    def offset_of(self, key: ExpertKey) -> int:
        """Returns the byte of the file at which the expert begins."""
        return self._data_start + self._extents[key].offset

    def close(self) -> None:
        super().close()
        self._file.close()

    def _plan(self, destination: Destination) -> ReadPlan:
        key, extent = destination.key, self._extents[destination.key]
        stretch = Stretch(key, self._file, self.offset_of(key), extent.nbytes, extent.checksum, destination.tensors)
        return ReadPlan([(self.stored_dtype, stretch)])

    def _spans(self, key: ExpertKey) -> Sequence[Span]:
        extent, offset = self._extents[key], self.offset_of(key)
        is_aligned = offset % self.stored_dtype.itemsize == 0
        return [Span(self._file, offset, ((extent.nbytes, extent.checksum),))] if is_aligned else ()


def find_experts(
    checkpoint: Checkpoint, pieces: ExpertPieces, experts_per_layer: Sequence[int], shape: ExpertShape
) -> Mapping[ExpertKey, tuple[StoredParameter, ...]]:
    """Returns where each expert's parameters are stored, in layer order.

    Raises CheckpointError unless all are there, in the given shapes and, where nothing decodes them, in floating point,
    those that are read as they are in one dtype.
    """
    wanted = {key: tuple(pieces(key)) for key in all_keys(experts_per_layer)}
    if not wanted:
        raise CheckpointError(f"{checkpoint.path} has no layer with experts; there is nothing to page")
    names = [
        piece if isinstance(piece, str) else piece.name
        for parameters in wanted.values()
        for parameter in parameters
        for piece in (parameter if isinstance(parameter, tuple) else parameter.pieces)
    ]
    missing = [name for name in names if name not in checkpoint.specs]
    if missing:
        raise CheckpointError(
            f"{checkpoint.path} lacks {len(missing)} of {len(names)} expert tensors, first {missing[0]!r}; "
            "is the checkpoint complete, and of the family that its config names?"
        )
    found = {
        key: tuple(
            _stored(checkpoint, parameter, expected, experts_per_layer[key.layer])
            for parameter, expected in zip(parameters, shape.shapes, strict=True)
        )
        for key, parameters in wanted.items()
    }
    _check_made(wanted, found, shape)
    parameters = [each for stored in found.values() for each in stored]
    plain = [each for each in parameters if not each.decodes and not each.is_bytes]
    for spec in (piece.spec for each in plain for piece in each.pieces):
        if spec.dtype not in PLAIN_FLOATS:
            raise CheckpointError(f"tensor {spec.name!r} is stored as {spec.dtype}; experts must be in floating point")
    return found


def pieces_of(stored: Iterable[StoredParameter]) -> Iterable[StoredPiece]:
    """The pieces of all parameters, in order."""
    return (piece for parameter in stored for piece in parameter.pieces)


def _stored(
    checkpoint: Checkpoint,
    parameter: tuple[str | Row, ...] | Made | AsBytes,
    expected: tuple[int, ...],
    num_experts: int,
) -> StoredParameter:
    """Finds what a parameter is stored as. Raises CheckpointError for shapes that do not make the expected one."""
    if not isinstance(parameter, Made):
        names = parameter.pieces if isinstance(parameter, AsBytes) else parameter
        found = []
        for piece in names:
            name = piece if isinstance(piece, str) else piece.name
            itemsize = checkpoint.specs[name].dtype.itemsize if isinstance(parameter, AsBytes) else 1
            part = (expected[0] // len(names), *expected[1:-1], *(each // itemsize for each in expected[1:][-1:]))
            shape = part if piece is name else (num_experts, *part)
            found.append(StoredPiece(checkpoint.require(name, shape), None if isinstance(piece, str) else piece.row))
        return StoredParameter(tuple(found), is_bytes=isinstance(parameter, AsBytes))
    pieces = tuple(
        StoredPiece(checkpoint.specs[piece])
        if isinstance(piece, str)
        else StoredPiece(checkpoint.specs[piece.name], piece.row)
        for piece in parameter.pieces
    )
    return StoredParameter(pieces, parameter.make, parameter.decodes)


def _check_made(
    wanted: Mapping[ExpertKey, tuple[tuple[str | Row, ...] | Made | AsBytes, ...]],
    found: Mapping[ExpertKey, tuple[StoredParameter, ...]],
    shape: ExpertShape,
) -> None:
    """Tries what makes parameters: once for each layer and kind of stored pieces. Raises CheckpointError."""
    tried: set[object] = set()
    for key, parameters in wanted.items():
        for number, (parameter, stored) in enumerate(zip(parameters, found[key], strict=True)):
            like = (key.layer, number, tuple((piece.shape, piece.spec.dtype) for piece in stored.pieces))
            if isinstance(parameter, Made) and like not in tried:
                _try_to_make(parameter, stored.pieces, shape.shapes[number])
                tried.add(like)


def _try_to_make(parameter: Made, pieces: Sequence[StoredPiece], expected: tuple[int, ...]) -> None:
    name = pieces[0].spec.name
    try:
        like = [torch.empty(piece.shape, dtype=piece.spec.dtype, device="meta") for piece in pieces]
        made = parameter.make(like)
    except Exception as error:  # the operations are those of a family, and check their inputs in their own ways
        raise CheckpointError(
            f"no parameter of an expert can be made of tensor {name!r}, shape {pieces[0].spec.shape}: {one_line(error)}"
        ) from error
    if tuple(made.shape) != expected:
        raise CheckpointError(
            f"tensor {name!r} has shape {pieces[0].spec.shape}, which makes an expert's parameter of shape "
            f"{tuple(made.shape)}; its config calls for {expected}"
        )


def _checked(shape: ExpertShape, destination: Destination) -> Destination:
    found = tuple(tuple(tensor.shape) for tensor in destination.tensors)
    if found != shape.shapes:
        raise ValueError(f"the parameters of an expert must have shapes {shape.shapes}, not {found}")
    return destination


def _unmakeable(key: ExpertKey, plan: ReadPlan, error: Exception) -> ExpertReadError:
    _, first = plan.stretches[0]
    made = ExpertReadError(
        f"expert {key.expert} of layer {key.layer} cannot be made of what is stored: {one_line(error)}",
        key,
        f"byte {first.offset} of {first.file.path}",
    )
    made.__cause__ = error
    return made


def _error(failure: FailedRead) -> ExpertUnavailable:
    (layer, expert), stretch = failure.stretch.key, failure.stretch
    where = f"byte {stretch.offset} of {stretch.file.path}"
    if failure.error is None:
        return ChecksumMismatch(
            f"expert {expert} of layer {layer} does not match its checksum; see what else is damaged with "
            "`expert-pager verify`",
            stretch.key,
            where,
        )
    reason = failure.error.strerror or type(failure.error).__name__
    error = ExpertReadError(f"cannot read expert {expert} of layer {layer}: {reason}", stretch.key, where)
    error.__cause__ = failure.error
    return error
