"""The layout of `experts.pack`, and the records of quantised experts in it.

    magic, version, header length, xxh3_128 of the header | header JSON | zeros up to 4096 | extent | zeros | ...

An extent is the parameters of an expert one after the other, in one dtype: gate_up [2F, D] (gate rows first) and then
down [D, F] in version 1; in version 2 the header names them; in version 3 they are bytes, and the header names what
they are quantised to as well. Offsets in the header count from the end of the padded header, so that its length does
not depend on them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor
from torch.nn.functional import pad

from pager.errors import CheckpointError, ConfigError, UnsupportedModel
from pager.reading import parse_json
from pager.store.reads import DataFile
from pager.store.safetensors import DTYPE_NAMES, DTYPES, MAX_HEADER_BYTES, PLAIN_FLOATS
from pager.types import ExpertKey, ExpertShape

# --- quantised experts ------------------------------------------------------------------------------------------------
#
# Experts in 8 or 4 bits, as packs and slots hold them: bytes that torch's own kernels multiply with.
#
# Legend: N output and K input features of a matrix, G groups of GROUP inputs that share a scale, B blocks of BLOCK rows
# or columns, S slots.


KINDS = ("int8", "int4", "fp8")
MATRICES = ("gate_up_proj", "down_proj")
GROUP = 32
"""The inputs that share a scale and a zero in 4 bits. More of them save little: 64 are 4.5 bits a weight, these 5."""

_ROWS_OF_PACKER = 16  # torch packs 4-bit matrices in multiples of it
_TILES = 2  # an argument of the packer that has no effect on a CPU


@dataclass(frozen=True, slots=True)
class RecordFormat:
    """The format in which the experts of a pack are quantised. `scales` is also the dtype that they are multiplied in.

    In int8 each output has a scale, and weights are symmetric about zero. In int4 each group of inputs has a scale and
    the value of its middle, and the bytes lie as the packer of this processor lays them: `layout` tells two apart. In
    fp8 each block of BLOCK x BLOCK has a scale in float32, as published checkpoints have, and `scales` binds nothing.
    """

    kind: str
    scales: torch.dtype
    layout: str = ""
    processor: str = ""

    @classmethod
    def of(cls, kind: str, scales: torch.dtype) -> RecordFormat:
        """The format of this machine. Raises ConfigError for a kind that is none."""
        if kind not in KINDS:
            raise ConfigError(f"experts cannot be packed as {kind!r}; use {' or '.join(KINDS)}")
        if scales not in PLAIN_FLOATS or scales == torch.float64:
            raise ConfigError(f"experts cannot be multiplied in {scales}; use float32, bfloat16 or float16")
        own = (layout_here(), torch.backends.cpu.get_cpu_capability()) if kind == "int4" else ("", "")
        return cls(kind, scales, *own)

    @classmethod
    def decoded(cls, body: Mapping[str, Any]) -> RecordFormat:
        """Reads the format from a pack's header. Raises ValueError, KeyError or TypeError for anything else."""
        if body["kind"] not in KINDS:
            raise ValueError(f"experts of kind {body['kind']!r}")
        return cls(body["kind"], DTYPES[body["scales"]], str(body["layout"]), str(body["processor"]))

    def encoded(self) -> dict[str, str]:
        """Returns what the header of a pack has of it."""
        return {
            "kind": self.kind, "scales": DTYPE_NAMES[self.scales], "layout": self.layout, "processor": self.processor
        }  # fmt: skip

    def __str__(self) -> str:
        each = {"int8": "output", "int4": f"{GROUP} inputs of an output", "fp8": f"block of {BLOCK} x {BLOCK}"}
        return f"{self.kind}, a scale in {str(self.scale_dtype).removeprefix('torch.')} for each {each[self.kind]}"

    @property
    def scale_dtype(self) -> torch.dtype:
        return torch.float32 if self.kind == "fp8" else self.scales

    def check_machine(self, device: torch.device | str, dtype: torch.dtype) -> None:
        """Checks that this machine computes with these bytes in `dtype`. Raises UnsupportedModel, ConfigError."""
        if torch.device(device).type != "cpu":
            raise UnsupportedModel(
                f"experts packed as {self.kind} are computed on a CPU only so far; use device='cpu', or the checkpoint "
                "that they were packed from"
            )
        if self.layout not in ("", layout_here()):
            here = torch.backends.cpu.get_cpu_capability()
            raise UnsupportedModel(
                f"experts were packed as {self.kind} for processors with {self.processor} and this torch, with {here}, "
                "lays them out in another way; pack the model again on this machine"
            )
        if self.kind != "fp8" and dtype != self.scales:
            held, asked = (str(each).removeprefix("torch.") for each in (self.scales, dtype))
            raise ConfigError(
                f"experts packed as {self.kind} for {held} cannot be served as {asked}; use dtype {held}, or pack the "
                f"model again with --dtype {asked}"
            )

    def record(self, shape: ExpertShape) -> ExpertShape:
        """The bytes of an expert of `shape`: its matrices, and after each its scales. Raises UnsupportedModel."""
        if shape.parameters:
            names = ", ".join(name for name, _ in shape.named)
            raise UnsupportedModel(
                f"experts of {names} cannot be packed as {self.kind}: only those of gate, up and down matrices can; "
                "pack without --experts"
            )
        parts: dict[str, tuple[int, ...]] = {}
        for name, (num_outputs, num_inputs) in shape.named:
            if self.kind == "int8":
                parts[name] = (num_outputs, num_inputs)
                parts[scales_of(name)] = (num_outputs * self.scales.itemsize,)
                continue
            if self.kind == "fp8":
                parts[name] = (num_outputs, num_inputs)
                parts[scales_of(name)] = (num_blocks(num_outputs), num_blocks(num_inputs) * FP32)
                continue
            if num_outputs % _ROWS_OF_PACKER or num_inputs % GROUP:
                raise UnsupportedModel(
                    f"{name} of {num_outputs} x {num_inputs} cannot be packed as int4: that takes multiples of "
                    f"{_ROWS_OF_PACKER} x {GROUP}; pack with --experts int8"
                )
            parts[name] = (num_outputs, num_inputs // 2)
            parts[scales_of(name)] = (num_inputs // GROUP, num_outputs, 2 * self.scales.itemsize)
        return ExpertShape(shape.hidden, shape.intermediate, tuple(parts.items()))

    def quantised(self, matrices: Sequence[Tensor]) -> list[Tensor]:
        """The record's parts, as bytes, of an expert's matrices in float32."""
        make = {"int8": quantise_int8, "int4": quantise_int4, "fp8": quantise_fp8}[self.kind]
        return [part.contiguous().view(torch.uint8) for matrix in matrices for part in make(matrix, self.scale_dtype)]

    def views(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Slabs or single parts of bytes as what they hold."""
        held = torch.uint8 if self.kind == "int4" else torch.int8
        typed = {name: parts[name].view(held) for name in MATRICES}
        return typed | {scales_of(name): parts[scales_of(name)].view(self.scale_dtype) for name in MATRICES}

    def product(self, hidden_TK: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
        """[T, N]: `hidden_TK`, in the dtype of the scales, times one matrix.

        Above MOST_ROWS, and in float32, torch's kernel for int8 takes longer than a copy of the matrix and a product
        with that does; the one for int4 above MOST_INT4_ROWS. For fp8 it has none, and up to MOST_HALF_ROWS in half
        precision are multiplied with halves.
        """
        if self.kind == "int4":
            is_many = hidden_TK.dtype == torch.float32 or len(hidden_TK) > MOST_INT4_ROWS
            if is_many and len(weight) % _INT4_BLOCK == 0 and lies_in_blocks():
                return torch.cat([torch.mm(hidden_TK, block) for block in decoded_int4(weight, scales)], 1)
            return torch._weight_int4pack_mm_for_cpu(hidden_TK, weight, GROUP, scales)
        if self.kind == "fp8":
            is_half = hidden_TK.dtype != torch.float32 and weight.shape[1] <= MOST_HALF_INPUTS
            if is_half and len(hidden_TK) <= MOST_HALF_ROWS:
                return product_fp8(hidden_TK, weight, scales)
            return torch.mm(hidden_TK, decoded_fp8(weight, scales, hidden_TK.dtype).t())
        if len(hidden_TK) <= MOST_ROWS and hidden_TK.dtype != torch.float32:
            return torch._weight_int8pack_mm(hidden_TK, weight, scales)
        return torch.mm(hidden_TK, weight.to(hidden_TK.dtype).t()).mul_(scales)

    def scratch_bytes(self, size: int) -> int:
        """The most that a product takes beside a copy of its matrix, which has at most `size` rows and columns."""
        if self.kind == "int4":
            return 2 * size * size  # its steps, one a byte, before and after they lie side by side
        if self.kind != "fp8":
            return 0
        return size * (max(_FP8_ROWS * HALF, BLOCK * (HALF + FP32)) + 4 * MOST_HALF_ROWS * num_blocks(size) * FP32)

    def matrices(self, parts: Mapping[str, Tensor]) -> list[Tensor]:
        """The matrices that an expert's parts, as bytes, stand for, in the dtype of the scales."""
        typed = self.views(parts)
        return [self._matrix(typed[name], typed[scales_of(name)]) for name in MATRICES]

    def _matrix(self, weight: Tensor, scales: Tensor) -> Tensor:
        if self.kind == "fp8":
            return decoded_fp8(weight, scales, self.scales)
        if self.kind == "int8":
            return weight.to(self.scales) * scales[:, None]
        unit = torch.eye(2 * weight.shape[1], dtype=self.scales)
        return self.product(unit, weight, scales).t().contiguous()


MOST_ROWS = 16
MOST_INT4_ROWS = 112
_INT4_BLOCK = 64


def scales_of(matrix: str) -> str:
    return matrix.replace("proj", "scales")


def quantise_int8(weight_NK: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`(int8 [N, K], scales [N])`: each output's largest weight is 127 of its scale."""
    scales_N = (weight_NK.abs().amax(1) / 127).to(dtype)
    steps_N = scales_N.float().clamp_min(torch.finfo(torch.float32).tiny)
    return (weight_NK / steps_N[:, None]).round().clamp(-127, 127).to(torch.int8), scales_N


def quantise_int4(weight_NK: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`(packed, scales and middles [G, N, 2])`: each group's weights lie in 16 steps from its least to its greatest.

    A weight is its step, less 8, times its group's scale, plus its group's middle.
    """
    groups_NGK = weight_NK.unflatten(1, (-1, GROUP))
    least_NG, greatest_NG = groups_NGK.aminmax(dim=2)
    scales_NG = ((greatest_NG - least_NG) / 15).to(dtype)
    middles_NG = (least_NG + 8 * scales_NG.float()).to(dtype)
    size_NG = scales_NG.float().clamp_min(torch.finfo(torch.float32).tiny)
    steps_NGK = ((groups_NGK - middles_NG.float()[..., None]) / size_NG[..., None]).round() + 8
    packed = pack_int4(steps_NGK.clamp(0, 15).to(torch.int32).flatten(1))
    return packed, torch.stack([scales_NG, middles_NG], dim=2).transpose(0, 1).contiguous()


def pack_int4(steps_NK: Tensor) -> Tensor:
    """[N, K / 2] bytes of numbers from 0 to 15, as torch's kernel wants them on this processor."""
    return torch._convert_weight_to_int4pack_for_cpu(steps_NK, _TILES)


@cache
def layout_here() -> str:
    """Returns what tells this processor's layout of 4-bit matrices from others: a checksum of one of known numbers."""
    numbers = torch.arange(128 * 64, dtype=torch.int32).view(128, 64)
    known = (7 * numbers + numbers // 64) % 16  # no two rows that a layout may swap are alike
    return xxhash.xxh3_64(pack_int4(known).numpy().tobytes()).hexdigest()


def steps_int4(packed_NK: Tensor) -> Tensor:
    """[N / 64, K, 64] int8: the steps less 8 of a matrix that `lies_in_blocks`.

    A byte of an input has two steps: of an output of the block's first half, and of the one 32 outputs further on.
    """
    bytes_BKO = packed_NK.view(torch.int8).view(-1, 2 * packed_NK.shape[1], _INT4_BLOCK // 2) ^ -0x78  # both less 8
    return torch.cat([(bytes_BKO << 4) >> 4, bytes_BKO >> 4], 2)


def decoded_int4(packed_NK: Tensor, scales_GN2: Tensor) -> Tensor:
    """[N / 64, K, 64]: the weights that torch's kernel computes with, 64 outputs at a time; rounded once."""
    groups_BGKO = steps_int4(packed_NK).unflatten(1, (-1, GROUP)).to(scales_GN2.dtype)
    ends_BG1O2 = scales_GN2.unflatten(1, (-1, 1, _INT4_BLOCK)).transpose(0, 1)
    scales, middles = (ends.contiguous() for ends in ends_BG1O2.unbind(-1))
    return torch.addcmul(middles, groups_BGKO, scales, out=groups_BGKO).flatten(1, 2)


@cache
def lies_in_blocks() -> bool:
    """Tells whether `steps_int4` knows this processor's layout of 4-bit matrices: that of AVX-512."""
    steps_NK = torch.randint(0, 16, (2 * _INT4_BLOCK, 64), generator=torch.Generator().manual_seed(0))
    found_BKO = steps_int4(pack_int4(steps_NK.int()))
    return found_BKO.transpose(1, 2).flatten(0, 1).equal((steps_NK - 8).to(torch.int8))


# FP8, e4m3: a sign, 4 bits of exponent and 3 of fraction. torch converts such numbers one by one, 28 times as slowly as
# their bits are put where a float16 has them, which is then 1/256 of the value, also of the smallest ones.


BLOCK = 128
FP32, HALF = 4, 2
MOST_HALF_INPUTS = 2**15
"""The most inputs whose products with halves, each 1.75 at most, add up within the range of a float16."""

MOST_HALF_ROWS = 4
"""A product of rows with halves is one of each row; from five on, decoding to the rows' dtype takes no longer."""

_FP8_ROWS = 4 * BLOCK  # decoded at a time: they stay in the processor's cache until they are multiplied
_FP8_LARGEST, _HALF_FP8 = 448.0, 2.0**8
_HALF_BITS = -0x4080  # of an int16: a float16's sign, lower 4 bits of exponent and upper 3 of fraction


def num_blocks(size: int) -> int:
    return -(-size // BLOCK)


def quantise_fp8(weight_NK: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`(float8_e4m3fn [N, K], scales [B, B])`: each block's largest weight is 448, the largest number, of its scale."""
    num_outputs, num_inputs = weight_NK.shape
    whole = pad(weight_NK.abs(), (0, -num_inputs % BLOCK, 0, -num_outputs % BLOCK))
    scales_BB = (whole.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK)).amax((1, 3)) / _FP8_LARGEST).to(dtype)
    sizes_BB = scales_BB.float().clamp_min(torch.finfo(torch.float32).tiny)
    sizes_NK = _over_columns(sizes_BB, num_inputs).repeat_interleave(BLOCK, 0)[:num_outputs]
    return (weight_NK / sizes_NK).clamp(-_FP8_LARGEST, _FP8_LARGEST).to(torch.float8_e4m3fn), scales_BB


def decoded_fp8(weight_NK: Tensor, scales_BB: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, K]: the numbers of these bytes, given as int8, times their blocks' scales; rounded once, to `dtype`."""
    decoded_NK = torch.empty(weight_NK.shape, dtype=dtype)
    columns_BK = _over_columns(scales_BB * _HALF_FP8, weight_NK.shape[1])
    bits = torch.empty(BLOCK, weight_NK.shape[1], dtype=torch.int16)
    for rows, scales_K, out in zip(weight_NK.split(BLOCK), columns_BK, decoded_NK.split(BLOCK), strict=True):
        if dtype == torch.float32:
            out.copy_(_halves(rows, bits)).mul_(scales_K)
        else:
            out.copy_(_halves(rows, bits).float().mul_(scales_K))
    return decoded_NK


def product_fp8(hidden_TK: Tensor, weight_NK: Tensor, scales_BB: Tensor) -> Tensor:
    """[T, N]: a few rows in half precision times a matrix of these bytes.

    The scales go into the rows, once for each block of outputs, and what that makes of a row is brought to at most 1: a
    float16 then holds it with more digits than bfloat16 does, and the products' sums as well.
    """
    num_outputs, num_inputs = weight_NK.shape
    rows_TBK = hidden_TK.float()[:, None] * _over_columns(scales_BB * _HALF_FP8, num_inputs)
    sizes_TB1 = rows_TBK.abs().amax(2, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny)
    rows = [blocks.unbind() for blocks in (rows_TBK / sizes_TB1).half()]
    out_TN = torch.empty(len(hidden_TK), num_outputs, dtype=torch.float16)
    outs = [out_N.split(BLOCK) for out_N in out_TN]
    bits = torch.empty(min(_FP8_ROWS, num_outputs), num_inputs, dtype=torch.int16)
    block = 0
    for some in weight_NK.split(_FP8_ROWS):
        for halves in _halves(some, bits).split(BLOCK):
            for row, out in zip(rows, outs, strict=True):
                torch.mv(halves, row[block], out=out[block])
            block += 1
    sizes_TN = sizes_TB1.expand(-1, -1, BLOCK).flatten(1)[:, :num_outputs]
    return out_TN.float().mul_(sizes_TN).to(hidden_TK.dtype)


def _halves(bytes_NK: Tensor, bits: Tensor) -> Tensor:
    """1/256 of the numbers of these bytes, in the memory of `bits`. A byte that is no number reads as 480 / 256."""
    bits = bits[: len(bytes_NK)]
    bits.copy_(bytes_NK).mul_(1 << 7).bitwise_and_(_HALF_BITS)
    return bits.view(torch.float16)


def _over_columns(scales_BB: Tensor, num_inputs: int) -> Tensor:
    """[B, K]: each column's scale, for each block of rows."""
    return scales_BB.repeat_interleave(BLOCK, 1)[:, :num_inputs]


# --- the layout -------------------------------------------------------------------------------------------------------


PACK_NAME = "experts.pack"
TRUNK_NAME = "trunk.safetensors"
ALIGNMENT = 4096

_MAGIC = b"EXPRPACK"
_VERSIONS = (1, 2, 3)
_PREFIX = struct.Struct("<8sIQ16s")
_NO_CHECKSUM = "0" * 32


@dataclass(frozen=True, slots=True)
class Extent:
    """The place of one expert's bytes, counted from the end of the padded header, and their xxh3_128 in hex."""

    offset: int
    nbytes: int
    checksum: str


@dataclass(frozen=True, slots=True)
class PackHeader:
    """The content of a pack. `trunk_checksums` covers every tensor of the trunk file beside it."""

    source_fingerprint: str
    experts_per_layer: tuple[int, ...]
    shape: ExpertShape
    dtype: torch.dtype
    extents: Mapping[ExpertKey, Extent]
    trunk_checksums: Mapping[str, str]
    record: RecordFormat | None = None
    """What quantised experts are in; `shape` is then that of their bytes, and `dtype` uint8."""

    @classmethod
    def plan(
        cls,
        source_fingerprint: str,
        experts_per_layer: tuple[int, ...],
        shape: ExpertShape,
        form: torch.dtype | RecordFormat,
        trunk_names: Iterable[str],
    ) -> PackHeader:
        """Makes the header of a pack yet to be written: everything but the checksums, and as long as the final one.

        `shape` is the model's. Raises UnsupportedModel for experts that cannot be quantised to `form`.
        """
        record = form if isinstance(form, RecordFormat) else None
        dtype = torch.uint8 if isinstance(form, RecordFormat) else form
        shape = record.record(shape) if record else shape
        places = _places(experts_per_layer, shape.num_elements * dtype.itemsize)
        extents = {key: Extent(offset, nbytes, _NO_CHECKSUM) for key, (offset, nbytes) in places.items()}
        trunk = dict.fromkeys(trunk_names, _NO_CHECKSUM)
        return cls(source_fingerprint, experts_per_layer, shape, dtype, extents, trunk, record)

    def with_checksums(self, extents: Mapping[ExpertKey, str], trunk: Mapping[str, str]) -> PackHeader:
        filled = {key: dataclasses.replace(extent, checksum=extents[key]) for key, extent in self.extents.items()}
        return dataclasses.replace(
            self, extents=filled, trunk_checksums={name: trunk[name] for name in self.trunk_checksums}
        )

    @property
    def fingerprint(self) -> str:
        """The packed model's id, made of its source's id and what its experts are held as."""
        held = DTYPE_NAMES[self.dtype] if self.record is None else str(self.record)
        return hashlib.sha256(f"{self.source_fingerprint}/{held}".encode()).hexdigest()[:32]

    @property
    def extents_nbytes(self) -> int:
        return sum(align(extent.nbytes) for extent in self.extents.values())

    def encode(self) -> bytes:
        """Encodes the header as it is stored, padded."""
        body = {
            "source_fingerprint": self.source_fingerprint,
            "experts_per_layer": self.experts_per_layer,
            "hidden": self.shape.hidden,
            "intermediate": self.shape.intermediate,
            "dtype": DTYPE_NAMES[self.dtype],
            **({"parameters": self.shape.parameters} if self.shape.parameters else {}),
            **({"record": self.record.encoded()} if self.record else {}),
            "extents": [[*key, extent.offset, extent.nbytes, extent.checksum] for key, extent in self.extents.items()],
            "trunk": dict(self.trunk_checksums),
        }
        encoded = json.dumps(body, separators=(",", ":")).encode()
        version = 3 if self.record else 2 if self.shape.parameters else 1
        prefix = _PREFIX.pack(_MAGIC, version, len(encoded), xxhash.xxh3_128_digest(encoded))
        return (prefix + encoded).ljust(align(_PREFIX.size + len(encoded)), b"\0")


def align(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def all_keys(experts_per_layer: Iterable[int]) -> Iterator[ExpertKey]:
    """Lists every expert in layer order."""
    return (ExpertKey(layer, expert) for layer, count in enumerate(experts_per_layer) for expert in range(count))


def _places(experts_per_layer: Iterable[int], nbytes: int) -> dict[ExpertKey, tuple[int, int]]:
    """The offset and length of each expert's extent."""
    return {key: (index * align(nbytes), nbytes) for index, key in enumerate(all_keys(experts_per_layer))}


def read_pack_header(file: DataFile) -> tuple[PackHeader, int]:
    """Reads the header and finds the byte at which the extents begin. Raises CheckpointError if the file is damaged or
    truncated.
    """
    try:
        magic, version, length, digest = _PREFIX.unpack(file.read(_PREFIX.size, 0))
        if magic != _MAGIC:
            raise _damaged(file.path, "it does not begin as a pack does")
        if version not in _VERSIONS:
            known = ", ".join(map(str, _VERSIONS))
            raise CheckpointError(f"{file.path} is a pack of version {version}; this release reads version {known}")
        if length > MAX_HEADER_BYTES or _PREFIX.size + length > file.size:
            raise _damaged(file.path, f"its {file.size} bytes cannot hold its header of {length}")
        encoded = file.read(length, _PREFIX.size)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"cannot read the header of {file.path}: {error}") from error
    if xxhash.xxh3_128_digest(encoded) != digest:
        raise _damaged(file.path, "its header does not match its checksum")
    try:
        header = _decode(encoded)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(file.path, f"its header can't be understood ({error!r})") from error
    data_start = align(_PREFIX.size + length)
    _check_extents(file, header, data_start)
    return header, data_start


def _decode(encoded: bytes) -> PackHeader:
    """Decodes a header. Raises ValueError, KeyError, TypeError or AttributeError for anything else."""
    body = parse_json(encoded)
    experts_per_layer, extents = tuple(body["experts_per_layer"]), body["extents"]
    parameters = tuple((str(name), tuple(part)) for name, part in body.get("parameters", ()))
    sizes = (size for _, part in parameters for size in part)
    numbers = (
        *sizes,
        *experts_per_layer,
        body["hidden"],
        body["intermediate"],
        *(part for row in extents for part in row[:4]),
    )
    if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        raise ValueError("a size or an offset is not a whole number")
    if len(extents) != sum(experts_per_layer):
        raise ValueError(f"{len(extents)} extents for {sum(experts_per_layer)} experts")
    return PackHeader(
        source_fingerprint=str(body["source_fingerprint"]),
        experts_per_layer=experts_per_layer,
        shape=ExpertShape(body["hidden"], body["intermediate"], parameters),
        dtype=DTYPES[body["dtype"]],
        extents={ExpertKey(layer, expert): Extent(*rest) for layer, expert, *rest in extents},
        trunk_checksums={str(name): str(checksum) for name, checksum in body["trunk"].items()},
        record=RecordFormat.decoded(body["record"]) if "record" in body else None,
    )


def _check_extents(file: DataFile, header: PackHeader, data_start: int) -> None:
    where = {key: (extent.offset, extent.nbytes) for key, extent in header.extents.items()}
    if where != _places(header.experts_per_layer, header.shape.num_elements * header.dtype.itemsize):
        raise _damaged(file.path, "its extents are not those of its experts")
    expected = data_start + header.extents_nbytes
    if file.size < expected:
        raise CheckpointError(
            f"{file.path} is truncated: it should have {expected} bytes and has {file.size}; pack it again"
        )


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path} is not a sound expert pack: {why}; pack the model again")
