"""Writes a checkpoint with random weights in the released EMO format, tensor by tensor, in a few MiB of memory.

python -m benchmarks.synthetic OUT --shape emo-1b14b --layers 2
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import numpy as np
import torch
import typer

from benchmarks.report import console
from benchmarks.shapes import SHAPES, Shape
from pager.cli.options import bytes_progress, print_error
from pager.errors import CheckpointError, ConfigError, InsufficientDisk, PagerError
from pager.memory import format_bytes, parse_bytes
from pager.store.checkpoint import INDEX_NAME, SINGLE_NAME
from pager.store.reads import raw_bytes
from pager.store.safetensors import layout

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
PIECE_ELEMENTS = 1 << 20
DEFAULT_SHARD_BYTES = 4 * 2**30

TensorShapes = dict[str, tuple[int, ...]]
Progress = Callable[[int, int], None]


def write_checkpoint(
    out: Path,
    shape: Shape,
    *,
    dtype: str = "bfloat16",
    seed: int = 0,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress = lambda done, total: None,
) -> None:
    """The directory appears whole or not at all, and is on the disk then (so that its pages can be dropped).

    The same arguments give the same bytes, however they are sharded. Raises ConfigError, InsufficientDisk.
    """
    if out.exists():
        raise ConfigError(f"{out} already exists; choose another directory or remove it")
    tensors, item = shape.tensors(), DTYPES[dtype].itemsize
    total = sum(map(_size, tensors.values())) * item
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    free = shutil.disk_usage(partial).free
    if free < total:
        partial.rmdir()
        raise InsufficientDisk(f"{out} needs {format_bytes(total)} and its disk has {format_bytes(free)} free")
    shards = list(_shards(tensors, shard_bytes // item))
    weight_map: dict[str, str] = {}
    done = 0
    for number, shard in enumerate(shards, start=1):
        name = SINGLE_NAME if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(shard, name)
        with (partial / name).open("wb") as stream:
            for nbytes in _write_shard(stream, name, shard, DTYPES[dtype], seed):
                done += nbytes
                progress(done, total)
            stream.flush()
            os.fsync(stream.fileno())
    _write_json(partial / "config.json", shape.config(dtype))
    if len(shards) > 1:
        _write_json(partial / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
    partial.rename(out)


def check_checkpoint(path: Path, shape: Shape, dtype: str = "bfloat16") -> None:
    """Raises CheckpointError where an earlier run left a checkpoint of another shape."""
    if json.loads((path / "config.json").read_text()) != shape.config(dtype):
        raise CheckpointError(f"{path} holds a checkpoint of another shape; remove it or choose another directory")


def _shards(tensors: TensorShapes, max_elements: int) -> Iterator[TensorShapes]:
    shard: TensorShapes = {}
    filled = 0
    for name, shape in tensors.items():
        if shard and filled + _size(shape) > max_elements:
            yield shard
            shard, filled = {}, 0
        shard[name] = shape
        filled += _size(shape)
    yield shard


def _write_shard(stream: BinaryIO, file: str, shard: TensorShapes, dtype: torch.dtype, seed: int) -> Iterator[int]:
    """Yields the bytes of each piece written."""
    header, specs = layout(file, ((name, shape, dtype) for name, shape in shard.items()))
    stream.write(header)
    for spec in specs:
        for values in _random_pieces(spec.name, spec.shape, seed):
            memory = raw_bytes(torch.from_numpy(values).to(dtype))
            stream.write(memory)
            yield memory.nbytes


def _random_pieces(name: str, shape: tuple[int, ...], seed: int) -> Iterator[np.ndarray]:
    """Uniform weights with the variance that keeps activations at their size, 1 / fan-in; ones for a norm.

    With it a random router is lively at any width, and its choices are as far apart as they get without training.
    """
    left = _size(shape)
    generator = np.random.Generator(np.random.SFC64([seed, zlib.crc32(name.encode())]))
    bound = np.float32(3**0.5 if "embed_tokens" in name else (3 / shape[-1]) ** 0.5)
    while left:
        count = min(left, PIECE_ELEMENTS)
        if len(shape) == 1:
            yield np.ones(count, np.float32)
        else:
            yield (generator.random(count, np.float32) * 2 - 1) * bound
        left -= count


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def main(
    out: Annotated[Path, typer.Argument(help="Directory to write; must not exist.")],
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "emo-1b14b",
    layers: Annotated[
        int | None, typer.Option(help="Keep so many layers, and as large a part of the vocabulary.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, or float32 as the public converter writes.")] = "bfloat16",
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.")] = 0,
    shard_size: Annotated[str, typer.Option(help="Largest safetensors file.")] = "4GiB",
) -> None:
    """Write a checkpoint with random weights in the released EMO format."""
    if shape not in SHAPES or dtype not in DTYPES:
        raise typer.BadParameter(f"shapes are {', '.join(SHAPES)}, dtypes {', '.join(DTYPES)}")
    chosen = SHAPES[shape].shortened(layers)
    try:
        with bytes_progress(f"writing {out.name}") as progress:
            shard_bytes = parse_bytes(shard_size)
            write_checkpoint(out, chosen, dtype=dtype, seed=seed, shard_bytes=shard_bytes, progress=progress)
    except PagerError as error:
        print_error(error.message)
        raise typer.Exit(1) from None
    nbytes = sum(path.stat().st_size for path in out.iterdir())
    console.print(f"wrote {out}: {chosen.num_layers} layers of {chosen.num_experts} experts, {format_bytes(nbytes)}")


if __name__ == "__main__":
    typer.run(main)
