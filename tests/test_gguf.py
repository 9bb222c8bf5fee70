"""Headers of GGUF files that nobody would write: each is refused by a sentence, before it costs anything."""

from __future__ import annotations

import struct
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pager.errors import CheckpointError, PagerError, UnsupportedModel
from pager.gguf import config_of, is_gguf, read_gguf

F32, Q8_0, UNKNOWN = 0, 8, 200
TEXT, LIST, U8, U32 = 8, 9, 0, 4


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def field(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def listed(kind: int, count: int, values: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + values


def tensor(name: str = "t", sizes: tuple[int, ...] = (64, 2), kind: int = F32, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


ARCHITECTURE = field("general.architecture", TEXT, text("qwen3moe"))


def file_of(
    *tensors: bytes, fields: tuple[bytes, ...] = (ARCHITECTURE,), counts: tuple[int, int] | None = None,
    version: int = 3, num_bytes: int = 512,
) -> bytes:  # fmt: skip
    num_tensors, num_fields = counts or (len(tensors), len(fields))
    header = b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_fields) + b"".join(fields) + b"".join(tensors)
    return header + bytes(-len(header) % 32) + bytes(num_bytes)


def test_a_sound_file(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    fields = (ARCHITECTURE, field("n", U32, struct.pack("<I", 7)), field("few", LIST, listed(U8, 3, b"abc")))
    many = field("many", LIST, listed(TEXT, 2, text("a") + text("bc")))
    path.write_bytes(
        file_of(
            tensor("first"), tensor("second", (64, 3, 2), Q8_0, 512), fields=(*fields, many), num_bytes=512 + 12 * 34
        )
    )
    found = read_gguf(path)
    assert is_gguf(path)
    assert found.metadata == {"general.architecture": "qwen3moe", "n": 7, "few": [97, 98, 99], "many": 2}
    first, second = found.tensors.values()
    assert (first.shape, first.nbytes, first.kind) == ((2, 64), 512, "F32")
    assert (second.shape, second.stored_shape, second.nbytes) == ((2, 3, 64), (2, 3, 68), 2 * 3 * 68)
    assert second.offset - first.offset == 512
    assert first.offset % 32 == 0


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "begins with b''"),
        (b"PK\x03\x04 something", "not a GGUF file: it begins with b'PK"),
        (b"GGUF\x03", "its header goes on for 4 bytes at byte 4, and it has 5 bytes"),
        (file_of(version=1), "of version 1; only versions 2 and 3"),
        (file_of(version=3 << 24), "of version 50331648"),  # written on a big-endian machine
        (file_of(counts=(2**63, 1)), "announces 9223372036854775808 tensors"),
        (file_of(counts=(0, 2**63)), "announces 0 tensors and 9223372036854775808 fields"),
        (file_of(counts=(40, 1)), "goes on for|dimensions|type"),
        (file_of(fields=(struct.pack("<Q", 2**62),)), "a text at byte 32 has 4611686018427387904 bytes"),
        (file_of(fields=(field("a", TEXT, struct.pack("<Q", 2**62)),)), "a text at byte 45 has 4611686018427387904"),
        (file_of(fields=(field("a", TEXT, struct.pack("<Q", 1) + b"\xff"),)), "is not UTF-8"),
        (file_of(fields=(field("a", 99, b""),)), "the type of a field at byte .* is 99"),
        (file_of(fields=(field("a", LIST, listed(U8, 2**62)),)), "goes on for 4611686018427387904 bytes"),
        (file_of(fields=(field("a", LIST, listed(TEXT, 2**60)),)), "a list of 1152921504606846976 texts"),
        (file_of(fields=(field("a", LIST, listed(LIST, 1, listed(U8, 0))),)), "a list of type 9"),
        (file_of(fields=(ARCHITECTURE, ARCHITECTURE)), "'general.architecture' occurs twice"),
        (file_of(fields=(field("general.alignment", U32, bytes(4)),)), "its alignment is 0"),
        (file_of(fields=(field("general.alignment", TEXT, text("x")),)), "its alignment is 'x'"),
        (file_of(fields=(field("split.count", U32, b"\xff" * 4),)), "it is one of 4294967295 files"),
        (file_of(fields=(field("split.count", U32, struct.pack("<I", 3)),)), "one of 3 files .* not named as such"),
        (file_of(tensor(), tensor(offset=512), num_bytes=1024), "tensor 't' occurs twice"),
        (file_of(tensor(), tensor("u", offset=256)), "'u' begins at byte .*, before the one before it ends"),
        (file_of(tensor(sizes=())), "has 0 dimensions"),
        (file_of(tensor(sizes=(1,) * 9)), "has 9 dimensions"),
        (file_of(tensor(sizes=(2**63, 2**63, 2**63))), "is truncated: tensor 't' ends at byte"),
        (file_of(tensor(offset=2**63)), "is truncated: tensor 't' ends at byte 9223372036854776"),
        (file_of(tensor(), num_bytes=511), "is truncated: tensor 't' ends at byte"),
        (file_of(tensor(sizes=(33, 2), kind=Q8_0)), r"has rows of 33, and Q8_0 blocks of 32"),
    ],
)
def test_what_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        read_gguf(path)


def test_a_kind_of_tensor_that_is_not_known(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(file_of(tensor(kind=UNKNOWN)))
    with pytest.raises(UnsupportedModel, match=r"tensor 't' in .* is of type 200, which the installed gguf package"):
        read_gguf(path)


def test_no_file_and_no_regular_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot open .*none\.gguf"):
        read_gguf(tmp_path / "none.gguf")
    (tmp_path / "folder.gguf").mkdir()
    assert not is_gguf(tmp_path / "folder.gguf")
    with pytest.raises(CheckpointError, match=r"it is a folder|directory"):
        read_gguf(tmp_path / "folder.gguf")


SOUND = file_of(
    tensor("blk.0.ffn_gate_exps.weight", (32, 4, 2), Q8_0), tensor("output.weight", (32, 2), F32, 288),
    fields=(
        ARCHITECTURE, field("qwen3moe.expert_count", U32, struct.pack("<I", 2)),
        field("tokenizer.ggml.tokens", LIST, listed(TEXT, 3, text("a") * 3)),
        field("tokenizer.ggml.token_type", LIST, listed(U32, 3, bytes(12))),
    ),
    num_bytes=1024,
)  # fmt: skip
NUMBERS = st.sampled_from([0, 1, 2**8 - 1, 2**16, 2**31, 2**32 - 1, 2**48, 2**63, 2**64 - 1])


def overwritten(at: int, value: bytes) -> bytes:
    return SOUND[:at] + value + SOUND[at + len(value) :]


CHANGES: st.SearchStrategy[bytes] = st.one_of(
    st.builds(lambda end: SOUND[:end], st.integers(0, len(SOUND))),
    st.builds(overwritten, st.integers(0, len(SOUND) - 1024), st.binary(min_size=1, max_size=8)),
    st.builds(
        lambda at, number: overwritten(at, struct.pack("<Q", number)), st.integers(0, len(SOUND) - 1024), NUMBERS
    ),
    st.binary(max_size=256).map(lambda data: b"GGUF" + data),
)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=CHANGES)
def test_any_change_is_read_or_refused_at_little_cost(tmp_path: Path, data: bytes) -> None:
    """Neither another exception than the project's own, nor memory or time that the file's size does not explain."""
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    said = []
    tracemalloc.start()
    started_s = time.process_time()
    try:
        try:
            config_of(read_gguf(path))
        except PagerError as error:
            said.append(str(error))
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert all(each.strip() and "\n" not in each for each in said)
    assert peak_bytes < 4 << 20
    assert time.process_time() - started_s < 5


def test_the_sound_file_that_is_changed_is_sound(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(SOUND)
    assert config_of(read_gguf(path))["num_experts"] == 2
