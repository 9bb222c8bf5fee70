"""Whatever goes wrong in what is done for one request fails that request alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers

from pager.engine import engine as engine_module
from pager.engine.interface import EngineObserver
from pager.engine.kv import BlockPool
from pager.engine.paged_model import PagedModel
from pager.engine.request import Request, record_spans
from pager.errors import Cancelled, PagerError
from pager.types import Count, DriftAction, DriftPolicy, ExpertPool, PoolPolicy
from tests.engine.conftest import Driver

pytestmark = pytest.mark.slow


WIDEN = DriftPolicy(0.3, DriftAction.WIDEN, window=4)
NEVER = DriftPolicy(0.999, window=4)  # measured as the others are; what is done about it depends on the room there is


def fail(*_: object, **__: object) -> Any:
    raise RuntimeError("something is broken")


def panic(*_: object, **__: object) -> Any:
    """A library in Rust that fails in a way its authors did not expect: no Exception."""
    normalizers.Replace(Regex("(a+)+$"), "x").normalize_str("a" * 40 + "!")


def end(*_: object, **__: object) -> Any:
    raise PagerError("it is not to be had")


class Broken:
    """A function that raises in its call with that number, and in all that follow unless it breaks only once."""

    def __init__(self, function: Callable[..., Any], number: int, raiser: Callable[..., Any], *, once: bool) -> None:
        self._function, self._left, self._raiser, self._once = function, number, raiser, once

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._left -= 1
        is_broken = self._left == 0 if self._once else self._left <= 0
        return self._raiser() if is_broken else self._function(*args, **kwargs)


@dataclass(frozen=True)
class Place:
    """A method of a request, or of its attribute `of`, and which call of it raises."""

    name: str
    number: int = 1
    of: str = ""

    def put(self, request: Request, raiser: Callable[..., Any], *, once: bool = False) -> None:
        """Breaks a request that has just been submitted. A lease and its routing it will have once it is admitted."""
        if self.of.partition(".")[0] not in ("lease", "routing"):
            self._break(request, raiser, once)
            return
        acquire = request.acquire

        def acquire_and_break(paged: PagedModel, blocks: BlockPool, *, may_fit: bool = True) -> bool:
            taken = acquire(paged, blocks, may_fit=may_fit)
            if taken:
                self._break(request, raiser, once)
            return taken

        request.acquire = acquire_and_break  # type: ignore[method-assign]

    def _break(self, request: Request, raiser: Callable[..., Any], once: bool) -> None:
        owner = reduce(getattr, filter(None, self.of.split(".")), request)
        setattr(owner, self.name, Broken(getattr(owner, self.name), self.number, raiser, once=once))


PLACES = {
    "admission": Place("acquire"),
    "prefetch": Place("prefetch"),
    "waiting for what was prefetched": Place("is_paged_in"),
    "chunking": Place("may_be_chunked"),
    "choice of a pool": Place("choose_layer", 3, "routing"),
    "binding of a pool": Place("bind", 2, "lease"),
    "end of the prefill": Place("shrink", 1, "lease"),
    "beginning of the answers": Place("fork"),
    "pool in a shared step": Place("in_pool", 9, "routing"),
    "row of a batch": Place("row_start", 2),
    "first number of the sampler": Place("next_uniform", 1, of="draw"),
    "fifth number of the sampler": Place("next_uniform", 5, of="draw"),
    "tokens that are counted": Place("catch_up", 5, of="draw.context"),
    "first token": Place("accept", 1),
    "fifth token": Place("accept", 5),
    "detokenizing": Place("feed", 5, of="_detokenizer"),
    "last of the text": Place("flush", 1, of="_detokenizer"),
    "stop strings": Place("feed", 4, of="_stops"),
    "answer to drift": Place("answer_drift", 3),
    "measuring of drift": Place("add", 1, "routing.monitor"),
    "look at drift": Place("look", 1, "routing.monitor"),
    "experts that were wanted": Place("wanted", 1, "routing.monitor"),
    "report of drift": Place("report", 1, "routing.monitor"),
    "widened lease": Place("become", 2, "lease"),
    "reservation to page in": Place("become", 1, "lease"),
    "usage": Place("usage"),
}
SHARED = ("pool in a shared step", "row of a batch", "fifth number of the sampler", "tokens that are counted")


@pytest.fixture
def submit_all(
    random_prompt: Callable[[int, int], list[int]], random_pool: Callable[..., ExpertPool]
) -> Callable[[Any], list[str]]:
    """Requests of every kind; the third, which the faults are put into, meets every place above."""

    def submit(driver: Any) -> list[str]:
        kinds: list[tuple[PoolPolicy, dict[str, Any]]] = [
            (PoolPolicy(Count(3)), {}),
            (PoolPolicy(), {"temperature": 1.0, "seed": 2}),
            (
                PoolPolicy(Count(3), drift=WIDEN),
                {
                    "temperature": 1.0,
                    "seed": 3,
                    "stop": ("never",),
                    "predicted": random_pool(3),
                    "repetition_penalty": 1.05,
                    "logprobs": 2,
                },
            ),
            (PoolPolicy(Count(3), drift=NEVER), {"temperature": 0.8, "seed": 4, "top_p": 0.9}),
            (PoolPolicy(Count(4)), {"temperature": 1.2, "seed": 5}),
            (PoolPolicy(), {}),
        ]
        return [
            driver.submit(random_prompt(number, 12), pool, max_tokens=24, id=f"r{number}", **options)
            for number, (pool, options) in enumerate(kinds)
        ]

    return submit


VICTIM = "r2"


def request_of(driver: Any, request_id: str) -> Request:
    request: Request
    (request,) = (each for each in driver.engine._inbox.live() if each.asked.id == request_id)
    return request


Answers = dict[str, tuple[list[int], str, tuple[object, ...]]]


def answers(driver: Driver, ids: list[str]) -> Answers:
    """What clients get, but for times and what was in the slots already."""
    told: Answers = {}
    for request_id in ids:
        usage = driver.usage(request_id)
        peak = usage.drift and round(usage.drift.peak_mass, 5)
        facts = (usage.finish_reason, usage.pool and usage.pool.experts, peak, usage.completion_tokens)
        told[request_id] = (driver.tokens(request_id), driver.text(request_id), facts)
    return told


@pytest.fixture(scope="module")
def expected() -> Answers:
    """Filled by the first test: the same requests, undisturbed."""
    return {}


@pytest.fixture
def undisturbed(
    make_driver: Callable[..., Driver], submit_all: Callable[[Any], list[str]], expected: Answers
) -> Answers:
    if not expected:
        driver = make_driver()
        ids = submit_all(driver)
        driver.finish()
        expected.update(answers(driver, ids))
    return expected


def check_only_the_victim_failed(driver: Any, ids: list[str], undisturbed: Answers, victim: str = VICTIM) -> PagerError:
    assert list(driver.failures) == [victim]
    others = [request_id for request_id in ids if request_id != victim]
    assert answers(driver, others) == {request_id: undisturbed[request_id] for request_id in others}
    tokens, *_ = undisturbed[victim]
    assert driver.tokens(victim) == tokens[: len(driver.tokens(victim))]
    driver.assert_nothing_held()
    driver.engine._blocks.check_integrity()
    error: PagerError = driver.failures[victim]
    return error


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("raiser", [fail, panic, end])
def test_a_fault_fails_the_request_that_it_belongs_to_and_no_other(
    make_driver: Callable[..., Driver],
    submit_all: Callable[[Any], list[str]],
    undisturbed: Answers,
    place: str,
    raiser: Callable[..., Any],
) -> None:
    driver = make_driver()
    ids = submit_all(driver)
    PLACES[place].put(request_of(driver, VICTIM), raiser)
    driver.finish()
    error = check_only_the_victim_failed(driver, ids, undisturbed)
    assert error.reason == "INTERNAL"
    assert (repr(VICTIM) in str(error)) != (raiser is end)
    assert "broken" not in str(error)


@pytest.mark.parametrize("raiser", [fail, panic, end])
def test_a_fault_as_several_answers_begin_fails_their_request_and_not_the_one_beside_it(
    make_driver: Callable[..., Driver], random_prompt: Callable[[int, int], list[int]], raiser: Callable[..., Any]
) -> None:
    """Both prompts run in one forward."""

    def finished(breaks: bool) -> Driver:
        driver = make_driver()
        driver.submit(random_prompt(1, 12), PoolPolicy(Count(3)), id=VICTIM, n=2, max_tokens=4)
        driver.submit(random_prompt(2, 12), PoolPolicy(Count(3)), id="other", max_tokens=4)
        if breaks:
            Place("_answer").put(request_of(driver, VICTIM), raiser)
        driver.finish()
        driver.assert_nothing_held()
        return driver

    whole, broken = finished(False), finished(True)
    assert (list(whole.failures), len(whole.tokens(VICTIM))) == ([], 8)
    assert (list(broken.failures), broken.tokens(VICTIM)) == ([VICTIM], [])
    assert broken.tokens("other") == whole.tokens("other")


@pytest.mark.parametrize("place", SHARED)
def test_a_shared_step_that_fails_once_is_run_again_and_changes_no_answer(
    make_driver: Callable[..., Driver],
    submit_all: Callable[[Any], list[str]],
    undisturbed: Answers,
    caplog: pytest.LogCaptureFixture,
    place: str,
) -> None:
    """Numbers that were drawn and mass that was measured for it count once."""
    driver = make_driver()
    ids = submit_all(driver)
    PLACES[place].put(request_of(driver, VICTIM), fail, once=True)
    driver.finish()
    assert "each runs by itself" in caplog.text
    assert answers(driver, ids) == undisturbed
    driver.assert_nothing_held()


def test_spans_that_fail_do_so_for_their_request(
    make_driver: Callable[..., Driver],
    submit_all: Callable[[Any], list[str]],
    undisturbed: Answers,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def record(request: Request, outcome: str) -> None:
        fail() if request.asked.id == VICTIM else record_spans(request, outcome)

    monkeypatch.setattr(engine_module, "record_spans", record)
    driver = make_driver()
    ids = submit_all(driver)
    driver.finish()
    assert repr(VICTIM) in str(check_only_the_victim_failed(driver, ids, undisturbed))


class BrokenObserver(EngineObserver):
    """One of its methods raises in its third call, which is about one of the requests."""

    def __init__(self, name: str) -> None:
        self.ended_with: list[str] = []
        setattr(self, name, Broken(getattr(self, name), 3, panic, once=True))

    def ended(self, outcome: str, *_: object) -> None:
        self.ended_with.append(outcome)


@pytest.mark.parametrize("name", ["queued", "first_token"])
def test_an_observer_that_fails_does_so_for_the_request_that_it_hears_of(
    make_driver: Callable[..., Driver],
    submit_all: Callable[[Any], list[str]],
    undisturbed: Answers,
    name: str,
) -> None:
    observer = BrokenObserver(name)
    driver = make_driver(observer=observer)
    ids = submit_all(driver)
    driver.finish()
    (victim,) = driver.failures
    check_only_the_victim_failed(driver, ids, undisturbed, victim)
    assert sorted(observer.ended_with) == ["internal", *["length"] * 5]


@pytest.mark.parametrize("name", ["stepped", "ended"])
def test_an_observer_that_fails_when_nothing_is_left_to_fail_harms_nobody(
    make_driver: Callable[..., Driver],
    submit_all: Callable[[Any], list[str]],
    undisturbed: Answers,
    name: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    driver = make_driver(observer=BrokenObserver(name))
    ids = submit_all(driver)
    driver.finish()
    assert answers(driver, ids) == undisturbed
    assert "observer" in caplog.text
    driver.assert_nothing_held()


def test_what_cannot_be_given_back_costs_nobody_an_answer(
    make_driver: Callable[..., Driver],
    submit_all: Callable[[Any], list[str]],
    undisturbed: Answers,
    caplog: pytest.LogCaptureFixture,
) -> None:
    driver = make_driver()
    ids = submit_all(driver)
    Place("release").put(request_of(driver, VICTIM), fail)
    driver.finish()
    assert not driver.failures
    assert answers(driver, ids) == undisturbed
    assert "could not give back all that it held" in caplog.text
    works = driver.submit([1, 2, 3], max_tokens=3)
    driver.finish()
    assert len(driver.tokens(works)) == 3


def test_blocks_that_cannot_be_given_back_keep_no_lease(
    make_driver: Callable[..., Driver], random_prompt: Callable[[int, int], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = make_driver()
    request = driver.submit(random_prompt(1, 8), PoolPolicy(Count(3)), max_tokens=3)
    driver.engine.step()
    monkeypatch.setattr(driver.engine._blocks, "free", fail)
    driver.finish()
    assert driver.tokens(request)
    assert driver.paged.pager.stats().held_bytes == 0


def test_a_fault_while_a_request_is_failed_leaves_its_failure_as_it_is(
    make_driver: Callable[..., Driver], submit_all: Callable[[Any], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its spans and its release fail, too."""
    monkeypatch.setattr(engine_module, "record_spans", panic)
    driver = make_driver()
    submit_all(driver)
    Place("release").put(request_of(driver, VICTIM), panic)
    driver.engine.cancel(VICTIM, "t")
    driver.engine.step()
    assert isinstance(driver.failures[VICTIM], Cancelled)
    assert len(driver.engine._inbox) == 5


def test_bytes_that_do_not_add_up_are_text_like_any_other(
    make_driver: Callable[..., Driver], random_prompt: Callable[[int, int], list[int]]
) -> None:
    """With byte fallback, at a temperature at which everything is drawn, beside greedy requests of others."""
    alphabet = {f"<0x{byte:02X}>": byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(alphabet, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    driver = make_driver(tokenizer=tokenizer)
    alone = [driver.submit(random_prompt(seed, 8), PoolPolicy(Count(3)), max_tokens=60) for seed in range(7)]
    driver.finish()
    wild = driver.submit(random_prompt(9, 8), PoolPolicy(Count(3)), temperature=100.0, seed=1, max_tokens=200)
    again = [driver.submit(random_prompt(seed, 8), PoolPolicy(Count(3)), max_tokens=60) for seed in range(7)]
    driver.finish()
    assert not driver.failures
    assert [driver.tokens(each) for each in again] == [driver.tokens(each) for each in alone]
    assert driver.text(wild).count("\ufffd") > 100
    pieces = [chunk.text for chunk in driver.chunks[wild]]
    assert sum(map(bool, pieces)) > 150, "it is shown as it comes"
