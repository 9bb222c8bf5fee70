"""Experts in 8 or 4 bits, as packs and slots hold them: bytes that torch's own kernels multiply with.

Legend: N output and K input features of a matrix, G groups of GROUP inputs that share a scale, S slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import xxhash
from torch import Tensor

from pager.errors import ConfigError, UnsupportedModel
from pager.store.safetensors import DTYPE_NAMES, DTYPES, PLAIN_FLOATS
from pager.types import ExpertShape

KINDS = ("int8", "int4")
MATRICES = ("gate_up_proj", "down_proj")
GROUP = 32
"""The inputs that share a scale and a zero in 4 bits. More of them save little: 64 are 4.5 bits a weight, these 5."""

_ROWS_OF_PACKER = 16  # torch packs 4-bit matrices in multiples of it
_TILES = 2  # an argument of the packer that has no effect on a CPU


@dataclass(frozen=True, slots=True)
class RecordFormat:
    """The format in which the experts of a pack are quantised. `scales` is also the dtype that they are multiplied in.

    In 8 bits each output has a scale, and weights are symmetric about zero. In 4 bits each group of inputs has a scale
    and the value of its middle, and the bytes lie as the packer of this processor lays them: `layout` tells two apart.
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
        each = "output" if self.kind == "int8" else f"{GROUP} inputs of an output"
        return f"{self.kind}, a scale in {str(self.scales).removeprefix('torch.')} for each {each}"

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
        if dtype != self.scales:
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
        make = quantise_int8 if self.kind == "int8" else quantise_int4
        return [part.contiguous().view(torch.uint8) for matrix in matrices for part in make(matrix, self.scales)]

    def views(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Slabs or single parts of bytes as what they hold."""
        held = torch.int8 if self.kind == "int8" else torch.uint8
        typed = {name: parts[name].view(held) for name in MATRICES}
        return typed | {scales_of(name): parts[scales_of(name)].view(self.scales) for name in MATRICES}

    def product(self, hidden_TK: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
        """[T, N]: `hidden_TK`, in the dtype of the scales, times one matrix.

        Above MOST_ROWS, and in float32, torch's kernel for 8 bits takes longer than a copy of the matrix and a product
        with that does.
        """
        if self.kind == "int4":
            return torch._weight_int4pack_mm_for_cpu(hidden_TK, weight, GROUP, scales)
        if len(hidden_TK) <= MOST_ROWS and hidden_TK.dtype != torch.float32:
            return torch._weight_int8pack_mm(hidden_TK, weight, scales)
        return torch.mm(hidden_TK, weight.to(hidden_TK.dtype).t()).mul_(scales)

    def matrices(self, parts: Mapping[str, Tensor]) -> list[Tensor]:
        """The matrices that an expert's parts, as bytes, stand for, in the dtype of the scales."""
        typed = self.views(parts)
        return [self._matrix(typed[name], typed[scales_of(name)]) for name in MATRICES]

    def _matrix(self, weight: Tensor, scales: Tensor) -> Tensor:
        if self.kind == "int8":
            return weight.to(self.scales) * scales[:, None]
        unit = torch.eye(2 * weight.shape[1], dtype=self.scales)
        return self.product(unit, weight, scales).t().contiguous()


MOST_ROWS = 16


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
