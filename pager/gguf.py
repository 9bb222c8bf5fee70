"""GGUF files: where their tensors lie, and what their metadata says of the model.

A GGUF file holds a whole model: its tensors, many of them in blocks of a few bits with their scales, and as metadata
the configuration and the tokenizer. The project parses the header itself, because positional reads need the offsets,
and so that a file from anywhere is bounded and checked before other readers, which trust what they find, get to see it.

Format, little-endian: "GGUF", version, number of tensors, number of fields; each field's name, type and value; each
tensor's name, sizes, the fastest first, type and offset; then the data, from the next multiple of the alignment on.
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pager.errors import CheckpointError, UnsupportedModel
from pager.reading import A_POINTER, LFS_POINTER, open_regular, reason_of, shown

SUFFIX = ".gguf"
MAX_HEADER_BYTES = 1 << 27
"""Several times what the largest vocabularies take."""
MAX_TENSORS = 1 << 16
MAX_FIELDS = 1 << 12
MAX_FILES = 1 << 10
MAX_TEXTS = 1 << 22
"""In one list: sixteen times the largest vocabularies."""
MAX_KEPT = 1 << 20
"""Elements of the lists of numbers that are kept; of longer ones, and of lists of texts, the length alone."""
PLAIN = ("F32", "F16", "BF16", "F64")
"""The kinds of tensors whose values stand for themselves."""

_MAX_DIMENSIONS = 4
_MAX_NAME_BYTES = 1 << 16
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True, slots=True)
class BlockTensor:
    """One tensor. `shape` counts elements, the fastest last; `block` is how many elements and bytes a block of its kind
    has.

    `offset` counts from the start of `file`.
    """

    name: str
    file: Path
    shape: tuple[int, ...]
    kind: str
    block: tuple[int, int]
    offset: int

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape in bytes, of blocks side by side."""
        return (*self.shape[:-1], self.shape[-1] // self.block[0] * self.block[1])

    @property
    def nbytes(self) -> int:
        return math.prod(self.stored_shape)


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A model in one GGUF file, or in several that belong together; `metadata` is that of the first."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, BlockTensor]

    @property
    def files(self) -> list[Path]:
        return sorted({tensor.file for tensor in self.tensors.values()} | {self.path})

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))


def is_gguf(path: str | Path) -> bool:
    return Path(path).suffix == SUFFIX and Path(path).is_file()


def read_gguf(path: Path) -> GgufFile:
    """Reads the header of a file and of those that are parts of the same model.

    Raises CheckpointError if one is missing, malformed or truncated, UnsupportedModel for a kind of tensor that is
    unknown and without the package that knows them.
    """
    metadata, tensors = _read_header(path)
    count = metadata.get("split.count", 1)
    if type(count) is not int or not 0 <= count <= MAX_FILES:
        raise _damaged(path, f"it is one of {shown(count)} files")
    if count > 1:
        part = _PART.fullmatch(path.name)
        if part is None:
            raise CheckpointError(
                f"{path} is one of {count} files of a model and is not named as such; give them names that end in "
                f"-00001-of-{count:05}{SUFFIX}"
            )
        parts = [path.with_name(f"{part['stem']}-{number:05}-of-{count:05}{SUFFIX}") for number in range(1, count + 1)]
        headers = [_read_header(each) for each in parts]
        path, metadata = parts[0], headers[0][0]
        named = [tensor.name for _, found in headers for tensor in found]
        if len(set(named)) < len(named):
            raise CheckpointError(f"{path} and its {count - 1} other files name a tensor twice; fetch them again")
        tensors = [tensor for _, found in headers for tensor in found]
    return GgufFile(path, metadata, {tensor.name: tensor for tensor in tensors})


# --- the header -------------------------------------------------------------------------------------------------------


class _Header:
    """The header of an open file, read from its start on; never past the end of the file or MAX_HEADER_BYTES."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.path = path
        self.size = os.fstat(file.fileno()).st_size
        self.place = 0
        self._file = file

    def take(self, nbytes: int) -> bytes:
        if nbytes > min(self.size, MAX_HEADER_BYTES) - self.place:
            raise _damaged(
                self.path, f"its header goes on for {nbytes} bytes at byte {self.place}, and it has {self.size} bytes"
            )
        found = self._file.read(nbytes)
        if len(found) != nbytes:
            raise _damaged(self.path, f"it ends at byte {self.place + len(found)}")
        self.place += nbytes
        return found

    def number(self, kind: str) -> Any:
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))[0]

    def text(self, max_bytes: int = MAX_HEADER_BYTES) -> str:
        length = self.number("Q")
        if length > max_bytes:
            raise _damaged(self.path, f"a text at byte {self.place} has {length} bytes")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            raise _damaged(self.path, f"the text that ends at byte {self.place} is not UTF-8") from None

    def value(self) -> Any:
        """A field's value: a number, a text, a list of numbers, or the length of a long list or of one of texts."""
        kind = self.number("I")
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise _damaged(self.path, f"the type of a field at byte {self.place} is {kind}")
        kind, count = self.number("I"), self.number("Q")
        if kind in _SCALARS:
            each = _SCALARS[kind]
            data = self.take(count * struct.calcsize(f"<{each}"))
            return list(struct.unpack(f"<{count}{each}", data)) if count <= MAX_KEPT else count
        if kind != _STRING:
            raise _damaged(self.path, f"it has a list of type {kind} at byte {self.place}")
        if count > MAX_TEXTS or count * 8 > self.size - self.place:
            raise _damaged(self.path, f"it has a list of {count} texts at byte {self.place} of {self.size}")
        for _ in range(count):
            self.take(self.number("Q"))
        return count


def _read_header(path: Path) -> tuple[dict[str, Any], list[BlockTensor]]:
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            header = _Header(path, file)
            metadata, num_tensors = _read_fields(header)
            tensors = [_read_tensor(header) for _ in range(num_tensors)]
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"cannot open {path}: {reason_of(error)}; fetch the file again") from error
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= 1 << 20:
        raise _damaged(path, f"its alignment is {shown(alignment)}")
    start = -(-header.place // alignment) * alignment
    placed = [
        BlockTensor(each.name, path, each.shape, each.kind, each.block, start + each.offset)
        for each in sorted(tensors, key=lambda each: (each.offset, each.nbytes))
    ]
    _check_places(header, placed, start)
    return metadata, placed


def _read_fields(header: _Header) -> tuple[dict[str, Any], int]:
    """The fields, and the number of tensors that follow."""
    magic = header.take(min(4, header.size))
    if magic != b"GGUF":
        if magic + header.take(max(0, min(len(LFS_POINTER), header.size) - len(magic))) == LFS_POINTER:
            raise CheckpointError(f"{header.path} is {A_POINTER}")
        raise CheckpointError(f"{header.path} is not a GGUF file: it begins with {magic!r}; fetch it again")
    version, num_tensors, num_fields = header.number("I"), header.number("Q"), header.number("Q")
    if version not in (2, 3):
        raise CheckpointError(f"{header.path} is a GGUF file of version {version}; only versions 2 and 3 are read here")
    if num_tensors > MAX_TENSORS or num_fields > MAX_FIELDS:
        raise _damaged(header.path, f"it announces {num_tensors} tensors and {num_fields} fields")
    metadata: dict[str, Any] = {}
    for _ in range(num_fields):
        name = header.text(_MAX_NAME_BYTES)
        if name in metadata:
            raise _damaged(header.path, f"the field {shown(name)} occurs twice")
        metadata[name] = header.value()
    return metadata, num_tensors


def _read_tensor(header: _Header) -> BlockTensor:
    """A tensor whose offset counts from the start of the data."""
    name, num_dimensions = header.text(_MAX_NAME_BYTES), header.number("I")
    if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
        raise _damaged(header.path, f"tensor {shown(name)} has {num_dimensions} dimensions")
    shape = tuple(reversed([header.number("Q") for _ in range(num_dimensions)]))
    kind, block = _kind(header.number("I"), f"tensor {shown(name)} in {header.path}")
    if shape[-1] % block[0]:
        raise _damaged(header.path, f"tensor {shown(name)} has rows of {shape[-1]}, and {kind} blocks of {block[0]}")
    return BlockTensor(name, header.path, shape, kind, block, header.number("Q"))


def _kind(number: int, what: str) -> tuple[str, tuple[int, int]]:
    """The name of a tensor's type, and the elements and bytes of its blocks."""
    try:
        import gguf
    except ImportError as error:
        raise UnsupportedModel(
            f"{what}: reading GGUF files takes the package gguf, which is not installed; install expert-pager[formats]"
        ) from error
    try:
        kind = gguf.GGMLQuantizationType(number)
        return kind.name, gguf.GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise UnsupportedModel(
            f"{what} is of type {number}, which the installed gguf package does not know; update it"
        ) from None


def _check_places(header: _Header, tensors: Sequence[BlockTensor], start: int) -> None:
    """Raises CheckpointError for tensors that overlap or lie outside of the file, and for one that is there twice."""
    end, names = start, set()
    for each in tensors:
        if each.name in names:
            raise _damaged(header.path, f"tensor {shown(each.name)} occurs twice")
        names.add(each.name)
        if each.offset < end:
            raise _damaged(
                header.path, f"tensor {shown(each.name)} begins at byte {each.offset}, before the one before it ends"
            )
        end = each.offset + each.nbytes
        if end > header.size:
            raise CheckpointError(
                f"{header.path} is truncated: tensor {shown(each.name)} ends at byte {end} and the file has "
                f"{header.size}; fetch it again"
            )


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path} is not a sound GGUF file: {why}; fetch it again")


# --- the configuration ------------------------------------------------------------------------------------------------


GPT_OSS = "gpt-oss"
_MODEL_TYPES = {"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe", "minimax-m2": "minimax_m2", GPT_OSS: "gpt_oss"}
"""The architectures with experts whose fields and tensors transformers maps by tables."""
_TOKENS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}
_SCORING = {1: "softmax", 2: "sigmoid"}
_WIDTHS = {
    "qwen2_moe": {"moe_intermediate_size": "ffn_gate_exps", "shared_expert_intermediate_size": "ffn_gate_shexp"},
    "qwen3_moe": {"moe_intermediate_size": "ffn_gate_exps"},
    "minimax_m2": {"intermediate_size": "ffn_gate_exps"},
    "gpt_oss": {"intermediate_size": "ffn_gate_exps"},
}
"""Sizes that transformers' tables leave out, or take from elsewhere, and the tensors whose rows they are."""
_YARN = {"rope_type": "yarn", "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
"""How gpt-oss scales positions, beside what its files say."""
_YARN_FIELDS = ("factor", "original_context_length")


def config_of(file: GgufFile) -> dict[str, Any]:
    """The fields of a `config.json` for the model in a file, by transformers' own tables.

    Raises UnsupportedModel for an architecture that is not read from GGUF files, CheckpointError for fields that no
    model of it has.
    """
    from transformers.integrations.gguf import GGUF_CONFIG_ARCHS, get_gguf_config

    architecture = file.architecture
    try:
        if architecture in GGUF_CONFIG_ARCHS:
            config: dict[str, Any] = get_gguf_config(dict(file.metadata), tuple(file.tensors))
        elif architecture in _MODEL_TYPES:
            config = _by_tables(file)
        else:
            known = ", ".join(sorted({*_MODEL_TYPES, *(name for name in GGUF_CONFIG_ARCHS if "moe" in name)}))
            raise UnsupportedModel(
                f"{file.path} holds a model of architecture {shown(architecture)}; of those with experts, only {known} "
                "are read from GGUF files. Fetch the checkpoint that it was made from"
            )
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        if isinstance(error, UnsupportedModel):
            raise
        raise _damaged(file.path, f"its metadata is not that of {architecture!r} ({error!r})") from error
    kinds = {tensor.kind for tensor in file.tensors.values()}
    # A file does not say what its model was trained in. Norms are in float32 always.
    is_half = kinds - {"F32"} == {"F16"}
    return {"dtype": "float16" if is_half else "float32" if kinds == {"F32"} else "bfloat16", **config}


def _by_tables(file: GgufFile) -> dict[str, Any]:
    from transformers.integrations import GGUF_CONFIG_DEFAULTS_MAPPING, GGUF_CONFIG_MAPPING

    metadata, architecture = file.metadata, file.architecture
    model_type = _MODEL_TYPES[architecture]
    scaling = metadata.get(f"{architecture}.rope.scaling.type", "none")
    if scaling not in ("none", "yarn" if architecture == GPT_OSS else "none"):
        raise UnsupportedModel(
            f"{file.path} wants its positions scaled ({shown(scaling)}), which is not read from GGUF files of "
            f"{architecture}; fetch the checkpoint that it was made from"
        )
    fields = {f"{architecture}.{name}": to for name, to in GGUF_CONFIG_MAPPING[model_type].items()}
    fields |= {f"tokenizer.ggml.{name}": to for name, to in _TOKENS.items()}
    found = {to: metadata[name] for name, to in fields.items() if to and name in metadata}
    config = {"model_type": model_type, **GGUF_CONFIG_DEFAULTS_MAPPING.get(model_type, {}), **found}
    config["tie_word_embeddings"] = "output.weight" not in file.tensors
    config.setdefault("vocab_size", metadata.get("tokenizer.ggml.tokens"))
    if "scoring_func" in config:
        config["scoring_func"] = _SCORING[config["scoring_func"]]
    for name, part in _WIDTHS[model_type].items():
        rows = {tensor.shape[-2] for tensor in file.tensors.values() if tensor.name.endswith(f".{part}.weight")}
        if len(rows) == 1:
            config[name] = rows.pop()
    if architecture == GPT_OSS:
        config["head_dim"] = metadata[f"{architecture}.attention.key_length"]
        config["sliding_window"] = metadata[f"{architecture}.attention.sliding_window"]
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}
        if scaling == "yarn":
            factor, context = (metadata[f"{architecture}.rope.scaling.{name}"] for name in _YARN_FIELDS)
            config["rope_parameters"] |= {**_YARN, "factor": factor, "original_max_position_embeddings": context}
    return config
