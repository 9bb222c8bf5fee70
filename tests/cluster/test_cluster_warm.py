"""A worker that starts again pages in what it held before it says ready; a file that it cannot use changes nothing."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pager.cluster.actors import load_engine
from pager.cluster.tokens import WorkerLink
from pager.cluster.worker import WarmFile, Worker
from pager.config import ModelConfig, ServiceConfig, WorkerConfig
from pager.errors import PagerError
from pager.types import ExpertPool, GenerateRequest, PoolPolicy, PoolSource, RoutingFacts, SamplingParams, Usage

CHECKPOINT = Path(__file__).parents[1] / "data" / "golden" / "ckpt_emo_tiny"
FACTS = RoutingFacts((4, 3), (1, 1), (2, 2))


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Worker]]:
    """A worker of index 3 in this process, on a real model with slots for half of its experts."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    sizes = WorkerConfig(
        device="cpu", expert_memory="50%", host_memory=0, kv_memory="1MiB", num_threads=1, state=str(tmp_path / "state")
    )
    config = ServiceConfig(model=ModelConfig(path=str(CHECKPOINT), dtype="float32"), workers=sizes)
    started: list[Worker] = []

    def start() -> Worker:
        started.append(Worker(3, config, "127.0.0.1", load_engine))
        ready = started[-1].load()
        assert not isinstance(ready, PagerError), ready
        return started[-1]

    yield start
    for worker in started:
        worker.close()


def ask(worker: Worker) -> Usage:
    """Runs a prompt on a pool of three experts a layer."""
    ready = worker.ready()
    assert ready is not None
    facts = ready.model.facts
    pool = ExpertPool(tuple(tuple(range(min(3, routed))) for routed in facts.routed_per_layer))
    policy = PoolPolicy(source=PoolSource.FIXED, fixed=pool)
    request = GenerateRequest("r", "t", tuple(range(5, 15)), SamplingParams(max_tokens=3, ignore_eos=True), policy)

    async def answer() -> Usage:
        link = WorkerLink(ready.address, ready.token, buffer_chunks=64, on_load=lambda load: None)
        await link.attach()
        try:
            chunks = [chunk async for chunk in link.generate(request)]
        finally:
            await link.close()
        assert chunks[-1].usage is not None
        return chunks[-1].usage

    return asyncio.run(answer())


@pytest.mark.slow
def test_what_was_held_is_there_again_before_the_first_request(start: Callable[[], Worker], tmp_path: Path) -> None:
    first = start()
    assert ask(first).experts_missed > 0
    first.close()
    saved = json.loads((tmp_path / "state" / "worker-3.json").read_text())
    assert all({0, 1, 2} >= set(layer) for layer in saved["experts"])
    second = start()
    usage = ask(second)
    assert (usage.experts_missed, usage.bytes_from_disk) == (0, 0)
    assert usage.experts_hit > 0
    second.close()

    path = tmp_path / "state" / "worker-3.json"
    path.write_text(json.dumps(saved | {"fingerprint": "another"}))
    assert ask(start()).experts_missed > 0


def test_more_than_there_is_room_for_is_some_of_each_layer(start: Callable[[], Worker], tmp_path: Path) -> None:
    first = start()
    ask(first)
    ready = first.ready()
    assert ready is not None
    first.close()
    everything = [list(range(routed)) for routed in ready.model.facts.routed_per_layer]
    file = WarmFile(tmp_path / "state", "worker-3", ready.model.fingerprint, ready.model.facts)
    file.save(everything)
    second = start()
    assert second._loaded is not None
    held = second._loaded.resident()
    assert sum(map(len, held)) == ready.model.num_slots
    assert all(held_layer for held_layer, layer in zip(held, everything, strict=True) if layer)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is ignored"),
        ("{", "is ignored"),
        ("[]", "it is not a file of version 1"),
        ('{"version": 2}', "it is not a file of version 1"),
        ('{"version": 1, "fingerprint": "other"}', "of another model"),
        ('{"version": 1, "fingerprint": "f", "experts": [[1]]}', "does not have 2 layers"),
        ('{"version": 1, "fingerprint": "f", "experts": [[1], [9]]}', "layer 1 has 2 routed experts"),
        ('{"version": 1, "fingerprint": "f", "experts": [[1], ["0"]]}', "layer 1 has 2 routed experts"),
        ('{"version": 1, "fingerprint": "f", "experts": [[1], [true]]}', "layer 1 has 2 routed experts"),
    ],
)
def test_a_file_that_is_bad_or_of_another_model_is_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str, why: str
) -> None:
    (tmp_path / "w.json").write_text(text)
    with caplog.at_level(logging.WARNING):
        assert WarmFile(tmp_path, "w", "f", FACTS).read() is None
    assert why in caplog.text


def test_what_is_saved_is_read_and_nothing_held_is_not_saved(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = WarmFile(tmp_path / "new", "w", "f", FACTS)
    assert file.read() is None
    file.save([[2, 0], []])
    file.save([[], []])
    assert WarmFile(tmp_path / "new", "w", "f", FACTS).read() == [[2, 0], []]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["w.json"]
    assert not [record for record in caplog.records if record.name == "pager.cluster.worker"]
    (tmp_path / "file").write_text("")
    WarmFile(tmp_path / "file", "w", "f", FACTS).save([[1], [1]])
    assert "could not be saved" in caplog.text
    (tmp_path / "folder" / "w.json").mkdir(parents=True)
    WarmFile(tmp_path / "folder", "w", "f", FACTS).save([[1], [1]])
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["w.json"], "no part of a file is left"
