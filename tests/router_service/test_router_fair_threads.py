from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import pytest

from router_service.prediction import FairThreads
from tests.support.waiting import eventually


@dataclass
class Jobs:
    """Jobs that note who runs and end when the test says so."""

    order: list[str] = field(default_factory=list)
    held: dict[str, threading.Event] = field(default_factory=dict)

    def job(self, name: str, *, held: bool = False) -> Callable[[], str]:
        event = self.held.setdefault(name, threading.Event())
        if not held:
            event.set()

        def work() -> str:
            self.order.append(name)
            assert event.wait(60)
            return name

        return work


@pytest.fixture
async def jobs() -> AsyncIterator[Jobs]:
    jobs = Jobs()
    yield jobs
    for event in jobs.held.values():
        event.set()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_tenants_take_turns_however_much_one_has_waiting(jobs: Jobs) -> None:
    threads = FairThreads(1, "test")
    first = asyncio.create_task(threads.run("a", jobs.job("a0", held=True)))
    await eventually(lambda: jobs.order)
    rest = [asyncio.create_task(threads.run("a", jobs.job(f"a{index}"))) for index in range(1, 4)]
    await settle()
    rest += [asyncio.create_task(threads.run(tenant, jobs.job(f"{tenant}0"))) for tenant in "bc"]
    await settle()
    jobs.held["a0"].set()
    assert await asyncio.gather(first, *rest) == ["a0", "a1", "a2", "a3", "b0", "c0"]
    assert jobs.order == ["a0", "a1", "b0", "c0", "a2", "a3"]
    threads.close()


async def test_no_tenant_has_all_threads(jobs: Jobs) -> None:
    threads = FairThreads(2, "test")
    long = [asyncio.create_task(threads.run("a", jobs.job(f"a{index}", held=True))) for index in range(4)]
    await eventually(lambda: jobs.order == ["a0"])
    assert await threads.run("b", jobs.job("b0")) == "b0"  # while all of the others still wait
    assert jobs.order == ["a0", "b0"]
    for event in jobs.held.values():
        event.set()
    assert await asyncio.gather(*long) == ["a0", "a1", "a2", "a3"]
    threads.close()


async def test_who_leaves_the_line_is_passed_over_and_what_raises_gives_its_thread_back(jobs: Jobs) -> None:
    def fails() -> None:
        raise ValueError("no")

    threads = FairThreads(1, "test")
    running = asyncio.create_task(threads.run("a", jobs.job("a0", held=True)))
    await eventually(lambda: jobs.order)
    leaving = [asyncio.create_task(threads.run("b", jobs.job(f"b{index}"))) for index in range(3)]
    failing = asyncio.create_task(threads.run("b", fails))
    last = asyncio.create_task(threads.run("c", jobs.job("c0")))
    await settle()
    for task in leaving:
        task.cancel()
    await asyncio.gather(*leaving, return_exceptions=True)
    running.cancel()  # its work goes on, and nobody else's begins beside it
    await settle()
    assert jobs.order == ["a0"]
    jobs.held["a0"].set()
    with pytest.raises(ValueError, match="no"):
        await failing
    assert await last == "c0"
    assert jobs.order == ["a0", "c0"]
    assert (threads._lines, threads._running.total()) == ({}, 0)
    threads.close()


async def test_a_turn_that_comes_as_its_owner_leaves_goes_to_the_next(jobs: Jobs) -> None:
    threads = FairThreads(1, "test")
    await threads._turn("a", asyncio.get_running_loop())
    leaving = asyncio.create_task(threads.run("b", jobs.job("b0")))
    last = asyncio.create_task(threads.run("c", jobs.job("c0")))
    await settle()
    threads._leave("a")
    leaving.cancel()  # it has its turn by now, and has not run yet
    with pytest.raises(asyncio.CancelledError):
        await leaving
    assert await last == "c0"
    assert jobs.order == ["c0"]
    threads.close()
