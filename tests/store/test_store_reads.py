"""Which reads are issued for which experts, counted on real files; and past the page cache."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import xxhash
from torch import Tensor

from benchmarks.page_cache import cached_bytes, drop
from pager.errors import ChecksumMismatch, ExpertReadError
from pager.store import reads as read_module
from pager.store.expert_source import Destination, ExpertSource
from pager.store.pack import record
from pager.store.reads import HOT_BYTES, LARGE_BYTES, MOST_BYTES, PAGE_BYTES, DataFile, Stretch, fill, raw_bytes
from pager.types import ExpertKey, ExpertShape
from tests.store.conftest import Model, Save
from tests.support.files import flip


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Offset and length of every read, as they are issued."""
    real, issued = os.preadv, []

    def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        issued.append((offset, sum(buffer.nbytes for buffer in buffers)))
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    return issued


@pytest.fixture
def whole_pages(model: Model) -> None:
    """Experts whose matrices are whole pages: fp32, 3 * 4 KiB each."""
    model.shape = ExpertShape(hidden=64, intermediate=16)
    generator = torch.Generator().manual_seed(1)
    for key in model.keys:
        for name, shape in zip(model.names(key), ((16, 64), (16, 64), (64, 16)), strict=True):
            model.tensors[name] = torch.randn(shape, generator=generator)


def page_aligned(like: Tensor) -> Tensor:
    """Zeros of the same kind that begin with a page."""
    memory = torch.zeros(like.nbytes + PAGE_BYTES, dtype=torch.uint8)
    start = -memory.data_ptr() % PAGE_BYTES
    return memory[start : start + like.nbytes].view(like.dtype).view(like.shape)


def go_direct(bypass: Callable[..., str | None], *args: object) -> None:
    """Skips the test on a file system that has no direct reads."""
    try:
        reason = bypass(*args) or ""
    except OSError as error:
        reason = f"its file system refuses it: {error}"
    if "file system" in reason:
        pytest.skip(reason)
    assert reason == ""


def destinations(model: Model, keys: list[ExpertKey], *, aligned: bool = False) -> list[Destination]:
    pairs = ((key, model.blank(torch.float32)) for key in keys)
    return [Destination(key, tuple(map(page_aligned, pair)) if aligned else pair) for key, pair in pairs]


def read_all(source: ExpertSource, model: Model, keys: list[ExpertKey], *, aligned: bool = False) -> list[Destination]:
    wanted = destinations(model, keys, aligned=aligned)
    assert source.read_all(wanted) == [model.shape.num_elements * 4] * len(keys)
    return wanted


def check(model: Model, found: list[Destination]) -> None:
    for key, (gate_up, down) in found:
        expected_gate_up, expected_down = model.expert(key)
        assert torch.equal(gate_up, expected_gate_up)
        assert torch.equal(down, expected_down)


def layer(number: int, *experts: int) -> list[ExpertKey]:
    return [ExpertKey(number, expert) for expert in experts]


def test_neighbours_in_a_pack_come_in_one_read_and_others_do_not(
    packed: Path, model: Model, reads: list[tuple[int, int]]
) -> None:
    source = model.open_experts(packed)
    reads.clear()
    found = read_all(source, model, [*layer(0, 3, 0, 1), *layer(2, 2)])
    check(model, found)
    places = [source.place_of(key) for key in (*layer(0, 0, 1, 3), *layer(2, 2))]
    assert reads == [
        (places[0].start, places[1].end - places[0].start),
        *((place.start, place.end - place.start) for place in places[2:]),
    ]
    assert places[0].is_followed_by(places[1])
    assert not places[1].is_followed_by(places[2])
    assert not places[1].is_followed_by(places[0])
    source.close()


@pytest.mark.parametrize("recorded", [False, True])
def test_neighbours_in_a_plain_checkpoint_come_in_one_read(
    save: Save, model: Model, reads: list[tuple[int, int]], recorded: bool
) -> None:
    path = save(model, 1)
    if recorded:
        record(path)
    source = model.open_experts(path)
    reads.clear()
    check(model, read_all(source, model, layer(0, 1, 2)))
    places = [source.place_of(key) for key in layer(0, 1, 2)]
    assert places[0].is_followed_by(places[1])
    assert reads == [(places[0].start, places[1].end - places[0].start)]
    source.close()


def test_an_expert_in_three_files_takes_three_reads(sharded: Path, model: Model, reads: list[tuple[int, int]]) -> None:
    source = model.open_experts(sharded)
    reads.clear()
    check(model, read_all(source, model, layer(2, 1)))
    assert len(reads) == 3
    source.close()


def test_of_neighbours_read_together_only_the_damaged_one_fails(packed: Path, model: Model) -> None:
    source = model.open_experts(packed)
    flip(packed / "experts.pack", source.place_of(ExpertKey(0, 1)).end - 1)
    wanted = destinations(model, layer(0, 0, 1, 2))
    first, damaged, last = source.read_all(wanted)
    assert isinstance(damaged, ChecksumMismatch)
    assert damaged.key == ExpertKey(0, 1)
    assert first == last == model.shape.num_elements * 4
    check(model, [wanted[0], wanted[2]])
    source.close()


def test_of_neighbours_read_together_only_the_one_that_is_cut_off_fails(packed: Path, model: Model) -> None:
    source = model.open_experts(packed)
    os.truncate(packed / "experts.pack", source.place_of(ExpertKey(2, 2)).start + 1)
    wanted = destinations(model, layer(2, 0, 1, 2))
    *whole, cut_off = source.read_all(wanted)
    assert isinstance(cut_off, ExpertReadError)
    assert cut_off.key == ExpertKey(2, 2)
    assert len(whole) == 2
    check(model, wanted[:2])
    source.close()


@pytest.fixture
def big_file(tmp_path: Path) -> Iterator[DataFile]:
    path = tmp_path / "big"
    path.write_bytes(os.urandom(HOT_BYTES) * 3)
    os.truncate(path, MOST_BYTES + HOT_BYTES)
    file = DataFile(path)
    yield file
    file.close()


def stretches(file: DataFile, *nbytes: int, checksum: str | None = None) -> list[Stretch]:
    found, offset = [], 0
    for number, count in enumerate(nbytes):
        memory = torch.zeros(count, dtype=torch.uint8)
        found.append(Stretch(ExpertKey(0, number), file, offset, count, checksum, (memory,)))
        offset += count
    return found


def test_what_is_checked_comes_in_pieces_that_the_processor_still_holds(
    big_file: DataFile, reads: list[tuple[int, int]]
) -> None:
    """Each piece is hashed before the next is read; what has no checksum comes in one."""
    long, short = int(1.5 * HOT_BYTES), HOT_BYTES // 4
    failures = fill(stretches(big_file, long, short, short, checksum="no such"), torch.uint8)
    assert [failure.stretch.key.expert for failure in failures] == [0, 1, 2]
    assert [count for _, count in reads] == [HOT_BYTES, HOT_BYTES // 2, 2 * short]
    reads.clear()
    unchecked = stretches(big_file, long, short, short)
    assert fill(unchecked, torch.uint8) == []
    assert reads == [(0, long + 2 * short)]
    assert raw_bytes(unchecked[2].tensors[0]) == big_file.read(short, long + short)


def test_no_read_is_longer_than_the_bound(big_file: DataFile, reads: list[tuple[int, int]]) -> None:
    assert fill(stretches(big_file, MOST_BYTES // 2, MOST_BYTES // 2, HOT_BYTES), torch.uint8) == []
    assert [count for _, count in reads] == [MOST_BYTES, HOT_BYTES]


# Past the page cache


@pytest.mark.usefixtures("whole_pages")
def test_a_direct_read_gives_the_same_bytes_in_one_read(
    save: Save, model: Model, tmp_path: Path, reads: list[tuple[int, int]]
) -> None:
    source = model.open_experts(model.pack(save(model, 1), tmp_path / "packed"))
    go_direct(source.bypass_page_cache, torch.float32)
    for keys, num_reads in ((layer(0, 0), 1), (layer(0, 1, 2, 3), 1), (layer(2, 0, 2), 2)):
        reads.clear()
        check(model, read_all(source, model, keys, aligned=True))
        assert len(reads) == num_reads
    check(model, read_all(source, model, layer(0, 0, 1)))  # memory that is not aligned: through the page cache
    source.close()


@pytest.mark.usefixtures("whole_pages")
def test_a_flipped_byte_is_caught_past_the_page_cache(save: Save, model: Model, tmp_path: Path) -> None:
    packed = model.pack(save(model, 1), tmp_path / "packed")
    source = model.open_experts(packed)
    go_direct(source.bypass_page_cache, torch.float32)
    flip(packed / "experts.pack", source.place_of(ExpertKey(0, 1)).start + 5000)
    wanted = destinations(model, layer(0, 0, 1, 2), aligned=True)
    results = source.read_all(wanted)
    assert isinstance(results[1], ChecksumMismatch)
    check(model, [wanted[0], wanted[2]])
    source.close()


@pytest.mark.usefixtures("whole_pages")
def test_the_page_cache_is_really_left_out(tmp_path: Path, model: Model, save: Save) -> None:
    packed = model.pack(save(model, 1), tmp_path / "packed") / "experts.pack"
    source = model.open_experts(packed.parent)
    go_direct(source.bypass_page_cache, torch.float32)
    try:
        drop([packed])
    except OSError as error:
        pytest.skip(f"nothing to leave out: {error}")
    before = cached_bytes(packed)
    check(model, read_all(source, model, model.keys, aligned=True))
    assert cached_bytes(packed) <= before
    check(model, read_all(source, model, model.keys))
    assert cached_bytes(packed) > before
    source.close()


def test_why_a_read_can_not_be_direct_is_said(packed: Path, save: Save, model: Model, tmp_path: Path) -> None:
    plain = model.open_experts(save(model, 1))
    assert "pack the model" in plain.bypass_page_cache(torch.float32)
    small = model.open_experts(packed)
    assert "not whole pages of 4096 bytes" in small.bypass_page_cache(torch.float32)
    assert "stored as torch.float32 and served as torch.bfloat16" in small.bypass_page_cache(torch.bfloat16)
    plain.close()
    small.close()


def test_a_file_system_that_refuses_says_so() -> None:
    file = DataFile(Path("/proc/self/status"))
    with pytest.raises(OSError, match="Invalid argument"):
        file.bypass_page_cache()
    assert file.read(5, 0) == b"Name:"
    file.close()


def test_a_refusal_at_the_read_falls_back_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a file system whose blocks are larger than a page."""
    content = bytes(range(256)) * (2 * PAGE_BYTES // 256)
    (tmp_path / "file").write_bytes(content)
    file = DataFile(tmp_path / "file")
    go_direct(file.bypass_page_cache)
    real = os.preadv

    def refuse(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if descriptor == file._direct_fd:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", refuse)
    found = page_aligned(torch.zeros(len(content), dtype=torch.uint8))
    with caplog.at_level(logging.WARNING):
        file.read_into([raw_bytes(found)], 0)
    assert bytes(raw_bytes(found)) == content
    assert not file.is_direct
    assert "refused a direct read" in caplog.text
    file.close()


def test_nothing_is_read_beside_what_was_asked_for(tmp_path: Path) -> None:
    (path := tmp_path / "file").write_bytes(os.urandom(8 << 20))
    try:
        drop([path])
    except OSError as error:
        pytest.skip(f"the file does not leave the page cache: {error}")
    original = DataFile(path)
    scattered = original.duplicate()
    scattered.expect_scattered_reads()
    # Two reads in a row, which the system would take for the beginning of all of it.
    nbytes, start = 4 * PAGE_BYTES, 1 << 20
    scattered.read(nbytes, start)
    scattered.read(nbytes, start + nbytes)
    assert 0 < cached_bytes(path) <= 2 * nbytes
    original.read(nbytes, 0)
    original.read(nbytes, nbytes)
    give_up_s = time.monotonic() + 60
    while cached_bytes(path) <= 4 * nbytes:  # what is read ahead comes in its own time
        assert time.monotonic() < give_up_s, "a file keeps its own hints"
        time.sleep(0.001)
    for file in (original, scattered):
        file.close()


@pytest.mark.parametrize("is_checked", [False, True])
def test_it_says_when_most_of_a_large_read_is_there(tmp_path: Path, is_checked: bool) -> None:
    nbytes = LARGE_BYTES + PAGE_BYTES
    (path := tmp_path / "file").write_bytes(content := os.urandom(2 * PAGE_BYTES + nbytes))
    file = DataFile(path)
    first, second = torch.zeros(2 * PAGE_BYTES, dtype=torch.uint8), torch.zeros(nbytes, dtype=torch.uint8)
    checksums = [xxhash.xxh3_128(part).hexdigest() for part in (content[: 2 * PAGE_BYTES], content[2 * PAGE_BYTES :])]
    stretches = [
        Stretch(ExpertKey(0, 0), file, 0, len(first), checksums[0] if is_checked else None, (first,)),
        Stretch(ExpertKey(0, 1), file, len(first), nbytes, checksums[1] if is_checked else None, (second,)),
    ]
    seen: list[bytes] = []
    assert fill(stretches, torch.uint8, lambda: seen.append(raw_bytes(second).tobytes())) == []
    assert raw_bytes(first).tobytes() + raw_bytes(second).tobytes() == content
    [early] = seen
    assert early[: nbytes // 2] == content[2 * PAGE_BYTES :][: nbytes // 2]
    assert early[-nbytes // 8 :] == bytes(nbytes // 8)
    file.close()


def test_a_duplicate_outlives_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path := tmp_path / "file").write_bytes(b"experts")

    def no_proc(file: DataFile, flags: int = 0) -> int:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    original = DataFile(path)
    twins = [original.duplicate()]
    monkeypatch.setattr(DataFile, "_open_again", no_proc)
    twins.append(original.duplicate())
    original.close()
    path.unlink()
    for twin in twins:
        twin.expect_scattered_reads()
        twin.will_need(0, 7)
        assert twin.read(7, 0) == b"experts"
        twin.close()


def test_a_long_read_is_asked_for_in_parts_and_counted_by_each(
    tmp_path: Path, reads: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_module, "MOST_BYTES_A_CALL", PAGE_BYTES)
    data = os.urandom(3 * PAGE_BYTES + 500)
    (tmp_path / "file").write_bytes(data)
    file = DataFile(tmp_path / "file")
    buffers = [bytearray(300), bytearray(0), bytearray(2 * PAGE_BYTES), bytearray(PAGE_BYTES + 100)]
    assert file.read_into([memoryview(buffer) for buffer in buffers], 100) == len(data) - 100
    assert b"".join(buffers) == data[100:]
    assert [nbytes for _, nbytes in reads] == [PAGE_BYTES, PAGE_BYTES, PAGE_BYTES, 400]
    assert file.bytes_read == len(data) - 100
    file.close()
