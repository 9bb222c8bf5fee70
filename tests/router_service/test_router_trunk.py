"""The process that runs the trunk: what it answers, when it starts and ends, and what prompts get in the meantime."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from expert_pager.v1 import expert_pager_pb2 as pb

import router_service.trunk
from pager.errors import CheckpointError, InvalidRequest, NotReady, PagerError
from pager.predict.fitted import PredictorFile
from pager.predict.trunk import TrunkPredictor
from pager.types import PoolSource
from router_service.trunk import TrunkOf, TrunkProcess
from tests.router_service.test_router_codebook import CODEBOOK, SHARED, generate, with_trunk
from tests.support.calls import failure
from tests.support.files import CHECKPOINT, EMO_TINY
from tests.support.waiting import eventually

PREDICTED = pb.PoolPolicy(count=3, source=pb.POOL_SOURCE_PREDICTION)


@asynccontextmanager
async def trunk_of(path: Path, *, has_file: bool = False, stays: bool = False) -> AsyncIterator[TrunkProcess]:
    process = TrunkProcess(TrunkOf(str(path), "cpu", "float32", has_file), stays=stays)
    try:
        yield process
    finally:
        await process.close()


def pid_of(trunk: TrunkProcess) -> int:
    assert trunk._process is not None
    return trunk._process.pid


@pytest.mark.usefixtures("new_process")
async def test_another_process_scores_as_this_one_does_and_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    file = PredictorFile.load(EMO_TINY)
    here = TrunkPredictor.load(EMO_TINY, dtype="float32", stand_ins=file.stand_ins)
    async with trunk_of(EMO_TINY, has_file=True) as trunk:
        assert (trunk.is_ready, trunk.fingerprint) == (False, "")
        await asyncio.gather(trunk.ready(), trunk.ready())
        assert (trunk.fingerprint, trunk.has_stand_ins) == (here.fingerprint, True)
        for ids in ([5], [1, 2, 3], list(range(300))):
            scores, expected = await asyncio.to_thread(trunk.scores, ids), here.scores(ids)
            assert (scores.source, scores.num_tokens) == ("trunk", len(ids))
            for mean_R, expected_R in zip(scores.mean_LR, expected.mean_LR, strict=True):
                np.testing.assert_allclose(mean_R, expected_R, atol=1e-6)
        with pytest.raises(InvalidRequest, match="token id 999999 is outside") as refused:
            trunk.scores([999_999])
        assert refused.value.field == "prompt"

        psutil.Process(pid_of(trunk)).kill()
        await eventually(lambda: not trunk.is_ready)
        with pytest.raises(NotReady):
            trunk.scores([5])
        trunk.wake()
        await trunk.ready()
        assert trunk.scores([5]).num_tokens == 1

        trunk.rest()
        assert trunk.is_ready, "it was used a moment ago"
        monkeypatch.setattr(router_service.trunk, "IDLE_S", 0.0)
        gone = pid_of(trunk)
        trunk.rest()
        assert not trunk.is_ready
        assert not psutil.pid_exists(gone)


@pytest.mark.usefixtures("new_process")
async def test_a_trunk_that_stays_does_not_rest_and_ends_with_its_router(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_service.trunk, "IDLE_S", 0.0)
    async with trunk_of(CHECKPOINT, stays=True) as trunk:
        await trunk.ready()
        trunk.rest()
        assert trunk.is_ready
        process = trunk._process
        assert process is not None
        assert process.stdin is not None
        process.terminate()  # as whoever ends a group of processes does, while the router drains
        assert trunk.scores([5]).num_tokens == 1
        process.stdin.close()  # as the end of the router does, however it ends
        assert process.wait(60) == 0


@pytest.mark.usefixtures("new_process")
async def test_a_trunk_that_cannot_be_loaded_says_why_and_is_not_tried_for_every_prompt(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with trunk_of(tmp_path) as trunk:
        with pytest.raises(CheckpointError, match=r"config\.json"):
            await trunk.ready()
        assert "prompts are scored without it" in caplog.text
        with pytest.raises(NotReady, match="cannot be loaded now"):
            await trunk.ready()
        trunk.wake()
        assert trunk._starting is None


class Starting:
    """A trunk that starts when the test says so, or fails to."""

    def __init__(self, error: PagerError | None = None) -> None:
        self.error = error
        self.is_up = asyncio.Event()
        self.num_woken = 0

    @property
    def is_ready(self) -> bool:
        return self.is_up.is_set()

    def wake(self) -> None:
        self.num_woken += 1

    async def ready(self) -> None:
        if self.error is not None:
            raise self.error
        await self.is_up.wait()

    def rest(self) -> None:
        pass


async def test_only_prompts_that_are_decided_by_the_trunk_wait_until_it_is_there(serve: Callable[..., Any]) -> None:
    trunk = Starting()
    async with serve(passes=replace(with_trunk(elsewhere="c"), trunk=trunk)) as service:
        _, request = await generate(service, b"i", pb.PoolPolicy(count=3, source=pb.POOL_SOURCE_PREFILL))
        assert (request.pool.source, request.predicted) == (PoolSource.PREFILL, None)
        assert trunk.num_woken == 1
        shared = asyncio.create_task(generate(service, b"a", SHARED))
        predicted = asyncio.create_task(generate(service, b"ab", PREDICTED))
        await eventually(lambda: trunk.num_woken == 3)
        assert not shared.done()
        assert not predicted.done()
        trunk.is_up.set()
        usage, _ = await shared
        assert usage.codeword == "", "by what the trunk saw"
        usage, _ = await predicted
        assert usage.pool.num_experts == 6  # 3 in each of the two sparse layers
        assert trunk.num_woken == 3


async def test_without_a_trunk_that_can_be_loaded_the_lexical_scores_judge_alone(serve: Callable[..., Any]) -> None:
    trunk = Starting(NotReady("the trunk cannot be loaded"))
    async with serve(passes=replace(with_trunk(elsewhere="c"), trunk=trunk)) as service:
        usage, _ = await generate(service, b"a", SHARED)
        assert usage.codeword == CODEBOOK.names[0]
        _, request = await generate(service, b"c", SHARED)
        assert (request.pool.source, request.predicted) == (PoolSource.PREFILL, None)
        refused = await failure(generate(service, b"a", PREDICTED))
        assert refused.code() is grpc.StatusCode.UNAVAILABLE
