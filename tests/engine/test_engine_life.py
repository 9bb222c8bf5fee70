"""How requests end other than well, and that nothing of them stays behind."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pager.engine import scheduler
from pager.engine.interface import EngineObserver, Failure, StreamEvent
from pager.engine.scheduler import Inbox
from pager.errors import (
    Cancelled,
    ChecksumMismatch,
    DeadlineExceeded,
    DuplicateRequest,
    ExpertUnavailable,
    InvalidRequest,
    NotReady,
    Overloaded,
    PagerError,
    PoolTooLarge,
    PoolTooSmall,
    PromptTooLong,
)
from pager.models.open_model import OpenModel
from pager.store.expert_source import PackedExperts
from pager.store.pack import pack
from pager.types import (
    Count,
    ExpertKey,
    ExpertPool,
    FinishReason,
    Full,
    Mass,
    PoolPolicy,
    PoolSource,
    Share,
    TokenChunk,
)
from tests.engine.conftest import Driver
from tests.support.waiting import until

pytestmark = pytest.mark.slow

CHECKPOINT = Path(__file__).parents[1] / "data" / "golden" / "ckpt_emo_tiny"
ALL_EXPERTS = ExpertPool((tuple(range(15)),) * 4)


@pytest.mark.parametrize("pool", [PoolPolicy(), PoolPolicy(Count(4))])
def test_cancellation_frees_kv_and_slots_before_the_next_step_and_leaves_the_others_alone(
    make_driver: Callable[..., Driver], random_prompt: Callable[[int, int], list[int]], pool: PoolPolicy
) -> None:
    driver = make_driver(40)
    # Long enough that it runs yet when the other is cancelled, however long that waits for reads meanwhile.
    undisturbed = driver.submit(random_prompt(1, 20), PoolPolicy(Count(3)), max_tokens=200)
    driver.finish()
    doomed = driver.submit(random_prompt(2, 20), pool, max_tokens=100)
    other = driver.submit(random_prompt(1, 20), PoolPolicy(Count(3)), max_tokens=200)
    for _ in range(5):
        driver.engine.step()
    assert driver.tokens(doomed)
    blocks = driver.engine.status().kv_blocks_used
    assert driver.engine.cancel(doomed, "t")
    assert driver.engine.cancel(doomed, "t"), "a second call finds it still"
    given = driver.tokens(doomed)
    driver.engine.step()
    assert isinstance(driver.failures[doomed], Cancelled)
    assert driver.tokens(doomed) == given
    assert driver.engine.status().kv_blocks_used == blocks - 8  # 119 tokens
    assert not driver.engine.cancel(doomed, "t")
    driver.finish()
    assert driver.tokens(other) == driver.tokens(undisturbed)
    driver.assert_nothing_held()


def test_waiting_requests_can_be_cancelled_by_their_tenant_only(
    make_driver: Callable[..., Driver], random_prompt: Callable[[int, int], list[int]]
) -> None:
    driver = make_driver(12)
    driver.submit(random_prompt(1, 20), PoolPolicy(Count(3)), max_tokens=20)
    waiting = driver.submit(random_prompt(2, 20), PoolPolicy(Count(3)), max_tokens=20, tenant="mine")
    driver.engine.step()
    assert driver.engine.status().waiting == 1
    assert not driver.engine.cancel(waiting, tenant="yours")
    assert driver.engine.cancel(waiting, tenant="mine")
    driver.finish()
    assert isinstance(driver.failures[waiting], Cancelled)
    assert waiting not in driver.chunks
    driver.assert_nothing_held()


@pytest.mark.slow
def test_a_deadline_ends_running_and_waiting_requests(
    make_driver: Callable[..., Driver], random_prompt: Callable[[int, int], list[int]]
) -> None:
    driver = make_driver(12)
    deadline = time.monotonic() + 2  # they have to be submitted before
    running = driver.submit(random_prompt(1, 20), PoolPolicy(Count(3)), max_tokens=200, deadline_s=deadline)
    waiting = driver.submit(random_prompt(2, 20), PoolPolicy(Count(3)), max_tokens=2, deadline_s=deadline)
    patient = driver.submit(random_prompt(3, 20), PoolPolicy(Count(3)), max_tokens=2, deadline_s=deadline + 3600)
    driver.engine.step()
    time.sleep(max(0.0, deadline - time.monotonic()) + 0.01)
    driver.finish()
    assert isinstance(driver.failures[running], DeadlineExceeded)
    assert isinstance(driver.failures[waiting], DeadlineExceeded)
    assert driver.usage(patient).finish_reason is FinishReason.LENGTH
    driver.assert_nothing_held()


@pytest.mark.parametrize("jump_s", [-86_400, 86_400])
def test_a_clock_that_is_set_moves_no_deadline(
    make_driver: Callable[..., Driver],
    random_prompt: Callable[[int, int], list[int]],
    monkeypatch: pytest.MonkeyPatch,
    jump_s: int,
) -> None:
    driver = make_driver(24)
    before = driver.submit(random_prompt(1, 20), PoolPolicy(Count(3)), max_tokens=8, deadline_s=time.monotonic() + 600)
    driver.engine.step()
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + jump_s)
    after = driver.submit(random_prompt(2, 20), PoolPolicy(Count(3)), max_tokens=8, deadline_s=time.monotonic() + 600)
    soon_s = time.monotonic() + 2
    soon = driver.submit(random_prompt(3, 20), PoolPolicy(Count(3)), max_tokens=8, deadline_s=soon_s)
    until(lambda: time.monotonic() > soon_s)
    driver.finish()
    assert [len(driver.tokens(each)) for each in (before, after)] == [8, 8]
    assert isinstance(driver.failures[soon], DeadlineExceeded)
    assert 0 <= driver.usage(before).time_to_first_token_s < 600
    driver.assert_nothing_held()


def test_a_request_that_fits_passes_one_that_does_not_but_only_so_often(
    make_driver: Callable[..., Driver], random_prompt: Callable[[int, int], list[int]]
) -> None:
    # The big one needs all slots; small ones come and go before it, two at a time.
    driver = make_driver(24, max_overtakes=3)
    small = PoolPolicy(Count(3))
    first = driver.submit(random_prompt(0, 8), small, max_tokens=200)
    driver.engine.step()
    big = driver.submit(random_prompt(1, 8), PoolPolicy(Count(6)), max_tokens=2)
    later = [driver.submit(random_prompt(seed, 8), small, max_tokens=6) for seed in range(2, 10)]
    driver.finish()
    order = driver.order_of_first_tokens
    assert order.index(first) == 0
    assert order.index(big) == 4, "three may pass it, the fourth may not"
    assert order[1:4] == later[:3]
    driver.assert_nothing_held()


def broken_copy(directory: Path, key: ExpertKey) -> Path:
    """A packed copy of the checkpoint with one byte of this expert flipped."""
    opened = OpenModel.open(CHECKPOINT, torch.float32)
    shape = opened.family.shape
    packed = directory / "packed"
    counts = opened.facts.experts_per_layer
    pack(CHECKPOINT, packed, pieces=opened.pieces, experts_per_layer=counts, shape=shape)
    source = OpenModel.open(packed, torch.float32).open_experts()
    assert isinstance(source, PackedExperts)
    offset = source.offset_of(key) + 1000
    source.close()
    with (packed / "experts.pack").open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
    return packed


def test_a_damaged_expert_fails_the_sequence_whose_pool_has_it_and_no_other(
    make_driver: Callable[..., Driver],
    random_prompt: Callable[[int, int], list[int]],
    random_pool: Callable[..., ExpertPool],
    tmp_path: Path,
) -> None:
    pools = [random_pool(seed) for seed in range(4)]
    broken = ExpertKey(1, next(iter(set(pools[2].experts[1]) - {e for n in (0, 1, 3) for e in pools[n].experts[1]})))
    answers = []
    for path in (CHECKPOINT, broken_copy(tmp_path, broken)):
        driver = make_driver(60, path=path)
        for number, pool in enumerate(pools):
            policy = PoolPolicy(Count(3), PoolSource.FIXED, pool)
            driver.submit(random_prompt(number, 10), policy, max_tokens=10, id=f"r{number}")
        driver.finish()
        answers.append([driver.tokens(f"r{number}") for number in range(4)])
        driver.assert_nothing_held()
    assert isinstance(driver.failures["r2"], ChecksumMismatch)
    assert driver.failures["r2"].key == broken
    assert list(driver.failures) == ["r2"]
    assert answers[1] == [answers[0][0], answers[0][1], [], answers[0][3]]


def test_an_expert_that_turns_out_damaged_while_decoding_fails_only_who_needs_it(
    make_driver: Callable[..., Driver], random_prompt: Callable[[int, int], list[int]], tmp_path: Path
) -> None:
    # Of these three, only the second wants this expert, for its fifth token, in a forward that all three share.
    answers = []
    for path in (CHECKPOINT, broken_copy(tmp_path, ExpertKey(2, 12))):
        driver = make_driver(30, path=path)
        for seed in range(3):
            driver.submit(random_prompt(seed, 2), max_tokens=6, id=f"r{seed}")
        driver.finish()
        answers.append([driver.tokens(f"r{seed}") for seed in range(3)])
        driver.assert_nothing_held()
    assert list(driver.failures) == ["r1"]
    assert isinstance(driver.failures["r1"], ExpertUnavailable)
    assert answers[1] == [answers[0][0], answers[0][1][:4], answers[0][2]]


@pytest.mark.parametrize(
    ("options", "error", "field"),
    [
        ({"prompt": []}, InvalidRequest, "prompt"),
        ({"prompt": [1, 256]}, InvalidRequest, "prompt"),
        ({"prompt": [-1]}, InvalidRequest, "prompt"),
        ({"prompt": [1] * 257}, PromptTooLong, "prompt"),
        ({"max_tokens": 254}, PromptTooLong, "sampling.max_tokens"),
        ({"max_tokens": 0}, InvalidRequest, "sampling.max_tokens"),
        ({"temperature": float("nan")}, InvalidRequest, "sampling.temperature"),
        ({"pool": PoolPolicy(Count(2))}, PoolTooSmall, "pool.size"),
        ({"pool": PoolPolicy(Share(0.1))}, PoolTooSmall, "pool.size"),
        ({"pool": PoolPolicy(Mass(0.9, cap=13))}, PoolTooLarge, "pool"),
        ({"pool": PoolPolicy(Full(), PoolSource.FIXED, ALL_EXPERTS)}, PoolTooLarge, "pool"),
        ({"pool": PoolPolicy(Full(), PoolSource.FIXED, ExpertPool(((15, 16, 17),) * 4))}, InvalidRequest, "pool.fixed"),
        ({"pool": PoolPolicy(Full(), PoolSource.FIXED, ExpertPool(((1, 2, 3),)))}, InvalidRequest, "pool.fixed"),
        ({"pool": PoolPolicy(Count(4), PoolSource.PREDICTION)}, InvalidRequest, "pool.source"),
        ({"deadline_s": 1.0}, DeadlineExceeded, "deadline"),
        ({"deadline_s": float("nan")}, DeadlineExceeded, "deadline"),
    ],
)
def test_what_can_not_be_served_is_refused_at_once_and_the_next_request_works(
    make_driver: Callable[..., Driver], options: dict[str, Any], error: type[PagerError], field: str
) -> None:
    driver = make_driver(48)
    with pytest.raises(error) as caught:
        driver.submit(**{"prompt": [1, 2, 3], **options})
    assert caught.value.field == field
    works = driver.submit([1, 2, 3], max_tokens=2)
    driver.finish()
    assert len(driver.tokens(works)) == 2
    driver.assert_nothing_held()


def test_a_request_beyond_kv_memory_is_refused(make_driver: Callable[..., Driver]) -> None:
    driver = make_driver(48, kv_memory="256KiB")  # the smallest that the planner allows: 256 tokens
    whole = driver.submit([1], max_tokens=255)
    driver.finish()
    assert len(driver.tokens(whole)) == 255
    driver.assert_nothing_held()


def test_ids_in_use_and_full_lines_are_refused_and_free_again_afterwards(make_driver: Callable[..., Driver]) -> None:
    driver = make_driver(max_running=1, max_waiting=1)
    driver.submit([1], max_tokens=2, id="a")
    with pytest.raises(DuplicateRequest, match="'a'"):
        driver.submit([1], max_tokens=2, id="a")
    assert not driver.engine.cancel("a", "another")
    driver.submit([1], max_tokens=2, id="b")
    with pytest.raises(Overloaded) as caught:
        driver.submit([1], max_tokens=2, id="c")
    assert caught.value.retry_after_s is not None
    driver.finish()
    driver.submit([1], max_tokens=2, id="a")
    driver.finish()
    assert len(driver.tokens("a")) == 4


def test_a_deadline_that_the_line_can_not_meet_is_refused_and_others_are_not(
    make_driver: Callable[..., Driver], random_prompt: Callable[[int, int], list[int]]
) -> None:
    driver = make_driver(max_running=1, max_waiting=100)
    for number in range(40):
        driver.submit(random_prompt(number, 8), max_tokens=8)
    driver.submit([1], max_tokens=1, deadline_s=time.monotonic() + 0.5)  # nobody has been admitted: nothing is known
    while driver.engine.status().waiting > 30:
        driver.engine.step()
    status = driver.engine.status()
    assert status.place_s is not None
    turn_s = status.waiting * status.place_s
    with pytest.raises(DeadlineExceeded, match="30 requests are in line"):
        driver.submit([1], max_tokens=1, deadline_s=time.monotonic() + 0.5 * turn_s)
    patient = driver.submit([1], max_tokens=1, deadline_s=time.monotonic() + 300)
    driver.finish()
    assert len(driver.tokens(patient)) == 1
    assert driver.engine.status().place_s is None, "what the line was like says nothing about the next one"
    driver.submit([1], max_tokens=1, deadline_s=time.monotonic() + 0.5)
    driver.finish()


def test_an_id_is_its_tenants_own(make_driver: Callable[..., Driver]) -> None:
    driver = make_driver()
    events: list[StreamEvent] = []
    driver.engine._sink = events.extend
    for tenant in ("mine", "yours"):
        driver.submit([1], max_tokens=2, id="a", tenant=tenant)
    assert driver.engine.cancel("a", "yours")
    driver.finish()
    assert [type(event) for event in events if event.tenant == "yours"] == [Failure]
    mine = [event for event in events if event.tenant == "mine"]
    assert [isinstance(event, TokenChunk) and event.usage is not None for event in mine] == [False, True]
    driver.assert_nothing_held()


def test_a_forward_that_breaks_is_run_for_each_alone_and_fails_those_that_it_breaks_for(
    make_driver: Callable[..., Driver], random_prompt: Callable[[int, int], list[int]]
) -> None:
    driver = make_driver(60)
    breaks_with: list[int] = []

    def hook(_module: object, _args: object, kwargs: dict[str, torch.Tensor]) -> None:
        if set(kwargs["input_ids"].flatten().tolist()).intersection(breaks_with):
            raise RuntimeError("this kernel is broken")

    driver.paged.model.register_forward_pre_hook(hook, with_kwargs=True)
    prompts = [random_prompt(seed, 8) for seed in range(2)]
    expected = [driver.submit(prompt, PoolPolicy(Count(3)), max_tokens=20) for prompt in prompts]
    driver.finish()
    healthy, breaking = map(driver.tokens, expected)
    number = next(number for number, token in enumerate(breaking) if token not in (*healthy, *prompts[0], *prompts[1]))
    breaks_with.append(breaking[number])
    ids = [driver.submit(prompt, PoolPolicy(Count(3)), max_tokens=20) for prompt in prompts]
    driver.finish()
    assert list(driver.failures) == [ids[1]]
    assert "kernel" not in str(driver.failures[ids[1]])
    assert repr(ids[1]) in str(driver.failures[ids[1]])
    assert [driver.tokens(each) for each in ids] == [healthy, breaking[: number + 1]]
    driver.assert_nothing_held()


def test_a_sequence_whose_logits_are_not_finite_fails_alone(
    make_driver: Callable[..., Driver], random_prompt: Callable[[int, int], list[int]]
) -> None:
    driver = make_driver(60)
    expected = driver.submit(random_prompt(1, 8), PoolPolicy(Count(3)), max_tokens=12)
    driver.finish()
    poisoned_token = 77
    with torch.no_grad():
        embedding = driver.paged.model.get_input_embeddings().weight
        kept = embedding[poisoned_token].clone()
        embedding[poisoned_token] = float("nan")
    poisoned = driver.submit([poisoned_token, 1, 2], PoolPolicy(Count(3)), max_tokens=12)
    healthy = driver.submit(random_prompt(1, 8), PoolPolicy(Count(3)), max_tokens=12)
    driver.finish()
    assert "finite" in str(driver.failures[poisoned])
    assert driver.tokens(healthy) == driver.tokens(expected)
    with torch.no_grad():
        embedding[poisoned_token] = kept
    # It gets the KV blocks that the poisoned request has left.
    after = driver.submit(random_prompt(1, 8), PoolPolicy(Count(3)), max_tokens=12)
    driver.finish()
    assert driver.tokens(after) == driver.tokens(expected)
    driver.assert_nothing_held()


@pytest.mark.slow
def test_nothing_is_left_after_two_hundred_requests_of_all_kinds(
    make_driver: Callable[..., Driver],
    random_prompt: Callable[[int, int], list[int]],
    random_pool: Callable[..., ExpertPool],
) -> None:
    driver = make_driver(36, max_running=6, max_waiting=300)
    chance = random.Random(0)
    ids = []
    for number in range(200):
        seed = chance.randrange(10**6)
        pool = chance.choice(
            [
                PoolPolicy(),
                PoolPolicy(Count(3)),
                PoolPolicy(Mass(0.5, cap=4)),
                PoolPolicy(Count(4), PoolSource.FIXED, random_pool(seed, 4)),
            ]
        )
        options: dict[str, object] = {"max_tokens": chance.randint(1, 12), "temperature": chance.choice([0.0, 1.0])}
        if number % 10 == 0:
            options["deadline_s"] = time.monotonic() + chance.random()
        if number % 3 == 0:
            options["predicted"] = random_pool(seed + 1, 4)
        with suppress(DeadlineExceeded):  # it may pass on the way
            ids.append(driver.submit(random_prompt(seed, chance.randint(1, 40)), pool, **options))
    while driver.engine.status().running + driver.engine.status().waiting:
        driver.engine.step()
        if chance.random() < 0.1:
            driver.engine.cancel(chance.choice(ids), "t")
    ended_well = {request_id for request_id in ids if request_id not in driver.failures}
    assert all(driver.usage(request_id) for request_id in ended_well)
    assert len(ended_well) > 100
    assert {type(error) for error in driver.failures.values()} <= {Cancelled, DeadlineExceeded}
    driver.assert_nothing_held()
    assert not driver.paged.pager.prefetch_pending(ALL_EXPERTS.keys())


def test_a_thread_serves_many_submitters_and_drains_before_it_stops(
    make_driver: Callable[..., Driver], random_prompt: Callable[[int, int], list[int]]
) -> None:
    driver = make_driver(48)
    threading.Thread(target=driver.engine.run, daemon=True).start()

    def submit_some(start: int) -> None:
        for seed in range(start, start + 4):
            driver.submit(random_prompt(seed, 10), PoolPolicy(Count(3)), max_tokens=8, id=f"r{seed}")

    submitters = [threading.Thread(target=submit_some, args=(start,)) for start in (0, 4, 8)]
    for thread in submitters:
        thread.start()
    for thread in submitters:
        thread.join()
    driver.engine.stop(drain_s=60)
    assert {len(driver.tokens(f"r{seed}")) for seed in range(12)} == {8}
    with pytest.raises(NotReady):
        driver.submit([1], max_tokens=1)
    driver.engine.stop()
    driver.assert_nothing_held()


def test_an_idle_engine_runs_the_prompts_that_come_one_after_the_other_in_one_forward(
    make_driver: Callable[..., Driver], random_prompt: Callable[[int, int], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each next one comes while the engine makes a pause, and nobody comes in the last."""
    tokens_of_steps: list[int] = []

    class Steps(EngineObserver):
        def stepped(self, seconds: float, forward_seconds: float, num_tokens: int) -> None:
            tokens_of_steps.append(num_tokens)

    driver, to_come, wait = make_driver(observer=Steps()), [2, 3, 4], Inbox.wait_for_news
    pool = PoolPolicy(Count(15), PoolSource.FIXED, ALL_EXPERTS)
    driver.submit(random_prompt(1, 20), pool, max_tokens=1)
    driver.finish()
    tokens_of_steps.clear()

    def come(_: object, *waits: float) -> None:
        if to_come:
            driver.submit(random_prompt(to_come.pop(), 20), pool, max_tokens=2)
        if waits:
            wait(driver.engine._inbox, None)

    monkeypatch.setattr(Inbox, "wait_for_news", come)
    monkeypatch.setattr(scheduler, "time", SimpleNamespace(sleep=come))
    driver.engine.start()
    until(lambda: sum(chunk.is_last for chunks in driver.chunks.values() for chunk in chunks) == 4, what="they end")
    driver.engine.stop()
    assert tokens_of_steps == [60, 3]
    driver.assert_nothing_held()


def test_stopping_without_patience_fails_what_is_in_flight(
    make_driver: Callable[..., Driver], random_prompt: Callable[[int, int], list[int]]
) -> None:
    """Some run and some wait: a forward is held up until the engine is to stop."""
    driver = make_driver(48)
    num_forwards, started = itertools.count(), threading.Event()

    def hold_up(*_: object) -> None:
        if next(num_forwards) == 6:
            started.set()
            while not driver.engine._inbox.is_halted:
                time.sleep(0.001)

    driver.paged.model.register_forward_hook(hold_up)
    threading.Thread(target=driver.engine.run, daemon=True).start()
    ids = [driver.submit(random_prompt(seed, 10), PoolPolicy(Count(3)), max_tokens=200) for seed in range(5)]
    assert started.wait(60)
    driver.engine.stop(drain_s=0)
    assert {type(driver.failures[each]) for each in ids} == {NotReady}
    driver.assert_nothing_held()


def test_a_sink_that_fails_does_not_stop_the_engine(
    make_driver: Callable[..., Driver], random_prompt: Callable[[int, int], list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    driver = make_driver()
    good_sink, fails = driver.engine._sink, [True]

    def sink(events: list[StreamEvent]) -> None:
        if fails.pop() if fails else False:
            raise OSError("the reader is gone")
        good_sink(events)

    driver.engine._sink = sink
    request_id = driver.submit(random_prompt(1, 5), max_tokens=6)
    driver.finish()
    assert len(driver.tokens(request_id)) == 5, "the first was lost"
    assert "1 events were lost" in caplog.text
    driver.assert_nothing_held()


class Recorder(EngineObserver):
    def __init__(self) -> None:
        self.facts: list[tuple[str, tuple[Any, ...]]] = []

    def __getattribute__(self, name: str) -> Any:
        if name in ("facts", "of"):
            return object.__getattribute__(self, name)
        return lambda *values: self.facts.append((name, values))

    def of(self, name: str) -> list[tuple[Any, ...]]:
        return [values for each, values in self.facts if each == name]


def test_the_observer_is_told_of_every_request_once(
    make_driver: Callable[..., Driver],
    random_prompt: Callable[[int, int], list[int]],
    random_pool: Callable[..., ExpertPool],
) -> None:
    recorder = Recorder()
    driver = make_driver(48, observer=recorder)
    driver.submit(random_prompt(1, 10), PoolPolicy(Count(3)), max_tokens=5, predicted=random_pool(1))
    cancelled = driver.submit(random_prompt(2, 10), max_tokens=50)
    driver.engine.step()
    driver.engine.cancel(cancelled, "t")
    driver.finish()
    ends = {outcome: rest for outcome, *rest in recorder.of("ended")}
    assert sorted(ends) == ["cancelled", "length"]
    assert len(recorder.of("queued")) == len(recorder.of("ended")) == 2
    accounts = [account for _, account, *_ in recorder.of("ended")]
    assert ends["cancelled"][1] is None
    _, usage, token_s = ends["length"]
    assert usage.account in accounts
    assert usage.pool is not None
    assert usage.predicted_recall is not None
    assert token_s > 0
    assert [account.prompt_tokens for account in accounts] == [10, 10], "both prompts ran in one forward"
    assert max(account.completion_tokens for account in accounts) == 5
    assert sum(number for _, _, number in recorder.of("stepped")) == sum(
        account.prompt_tokens + account.completion_tokens - bool(account.completion_tokens) for account in accounts
    )
    assert all(seconds >= forward >= 0 for seconds, forward, _ in recorder.of("stepped"))


def test_a_request_that_comes_during_a_forward_has_waited_since_then(
    make_driver: Callable[..., Driver], random_prompt: Callable[[int, int], list[int]]
) -> None:
    driver, late = make_driver(), list[str]()
    driver.submit(random_prompt(1, 10), PoolPolicy(Count(3)), max_tokens=5)
    driver.engine.step()

    def submit_once(*_: object) -> None:
        if not late:
            late.append(driver.submit(random_prompt(2, 10), PoolPolicy(Count(3)), max_tokens=2))

    driver.paged.model.register_forward_hook(submit_once)
    driver.finish()
    usage = driver.usage(late[0])
    assert 0 <= usage.queue_s < usage.time_to_first_token_s
