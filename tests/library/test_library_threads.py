"""One model and many threads: every answer is what the same call gives by itself, whatever the other threads do."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pager.errors import ConfigError
from pager.models.open_model import OpenModel
from pager.types import Count, DriftPolicy, PoolPolicy

pytestmark = pytest.mark.slow

Load = Callable[..., PreTrainedModel]
MakeSmall = Callable[..., Any]
Run = Callable[[], Any]

PAD = 63
NEW_TOKENS = 8
TIMEOUT_S = 120.0  # of a thread that would wait for ever


@dataclass(frozen=True, slots=True)
class Call:
    """One call of `generate`: its rows may differ in length, and are padded on the left."""

    lengths: tuple[int, ...]
    seed: int
    num_beams: int = 1
    use_cache: bool = True

    def run(self, model: PreTrainedModel) -> list[list[int]]:
        generator = torch.Generator().manual_seed(self.seed)
        width = max(self.lengths)
        ids, mask = torch.full((len(self.lengths), width), PAD), torch.zeros(len(self.lengths), width, dtype=torch.long)
        for row, length in enumerate(self.lengths):
            ids[row, width - length :] = torch.randint(0, 60, (length,), generator=generator)
            mask[row, width - length :] = 1
        options = {"num_beams": self.num_beams, "use_cache": self.use_cache, "max_new_tokens": NEW_TOKENS}
        output = model.generate(ids, attention_mask=mask, do_sample=False, eos_token_id=-1, **options)
        return [list(map(int, row)) for row in output[:, width:]]


CALLS = {
    "one length": [Call((12,), seed) for seed in range(8)],
    "any lengths": [Call((3 + 5 * seed,), seed) for seed in range(8)],
    "batches": [Call((4, 17, 9), 1), Call((11, 11), 2), Call((20,), 3), Call((5, 6, 7, 8), 4)],
    "beams, and no cache": [Call((9,), 1, 2), Call((5, 14), 2, 3), Call((9,), 3, use_cache=False), Call((9,), 4)],
}


def at_once(runs: Sequence[Run]) -> list[Any]:
    """What each returned or raised, each in a thread of its own, begun together."""
    start = threading.Barrier(len(runs))

    def run(one: Run) -> Any:
        start.wait(TIMEOUT_S)
        try:
            return one()
        except BaseException as error:
            return error

    with ThreadPoolExecutor(len(runs)) as threads:
        return [future.result(TIMEOUT_S) for future in [threads.submit(run, one) for one in runs]]


@contextmanager
def interrupted(layer: Any, error: BaseException) -> Iterator[None]:
    """Inside, this thread's forwards raise `error` in the middle of the layer, past its router."""
    thread = threading.get_ident()

    def interrupt(*_: Any) -> None:
        if threading.get_ident() == thread:
            raise error

    handle = layer.mlp.experts.register_forward_pre_hook(interrupt)
    try:
        yield
    finally:
        handle.remove()


OPTIONS: dict[str, dict[str, Any]] = {
    "exact": {"expert_memory": "40%"},
    "exact, all in memory": {"expert_memory": "100%"},
    "pooled": {"expert_memory": "40%", "pool_size": 4},
    "drifting": {"expert_memory": "100%", "pool_size": 4, "drift": DriftPolicy(0.2, window=2)},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("calls", CALLS)
def test_threads_give_what_one_gives(small: MakeSmall, load: Load, calls: str, options: str) -> None:
    model = load(small("emo").path, **OPTIONS[options])
    runs = [partial(call.run, model) for call in CALLS[calls]]
    alone = [run() for run in runs]
    assert len({str(answer) for answer in alone}) == len(alone), "too alike to show anything"
    for _ in range(2):
        assert at_once(runs) == alone
    assert [run() for run in runs] == alone
    model.expert_paging.pager.check_integrity()
    assert model.expert_paging.pager.stats().held_bytes == 0


@pytest.mark.parametrize("options", ["exact", "pooled"])
def test_a_forward_that_fails_fails_its_own_thread_alone(small: MakeSmall, load: Load, options: str) -> None:
    model = load(small("mixtral").path, **OPTIONS[options])
    runs = [partial(call.run, model) for call in CALLS["any lengths"]]
    alone = [run() for run in runs]

    def fail(call: Call, error: BaseException) -> None:
        with interrupted(model.model.layers[1], error):
            call.run(model)

    errors = [RuntimeError("a hook failed"), KeyboardInterrupt("Ctrl-C"), ValueError("a hook failed")]
    failing = [partial(fail, Call((7,), seed), error) for seed, error in enumerate(errors)]
    *answers, first, second, third = at_once([*runs, *failing])
    assert answers == alone
    assert [first, second, third] == errors
    assert [run() for run in runs] == alone == at_once(runs)
    assert model.expert_paging.open_step is None
    model.expert_paging.pager.check_integrity()
    assert model.expert_paging.pager.stats().held_bytes == 0


@pytest.mark.parametrize("options", ["exact", "pooled"])
def test_after_an_interrupt_of_this_thread_any_thread_may_run(small: MakeSmall, load: Load, options: str) -> None:
    model = load(small("emo").path, **OPTIONS[options])
    call = Call((12,), 1)
    alone = call.run(model)
    with pytest.raises(KeyboardInterrupt), interrupted(model.model.layers[2], KeyboardInterrupt()):
        call.run(model)
    assert at_once([partial(call.run, model)]) == [alone]
    assert call.run(model) == alone


class Reentrant:
    """A streamer that answers another prompt while it takes a token."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self.answers: list[Any] = []

    def put(self, _: Tensor) -> None:
        self.answers.append(self._run())

    def end(self) -> None:
        pass


@pytest.mark.parametrize("options", ["exact", "pooled"])
def test_generate_within_generate(small: MakeSmall, load: Load, options: str) -> None:
    model = load(small("emo").path, **OPTIONS[options])
    outer, inner = torch.arange(3, 17)[None], Call((9,), 5)
    ask = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": -1, "attention_mask": torch.ones_like(outer)}
    alone, within = model.generate(outer, **ask), inner.run(model)
    streamer = Reentrant(partial(inner.run, model))
    assert model.generate(outer, streamer=streamer, **ask).equal(alone)
    assert streamer.answers == [within] * 4


@pytest.mark.parametrize("options", ["exact", "pooled"])
def test_a_forward_within_a_forward_has_documents_of_its_own(small: MakeSmall, load: Load, options: str) -> None:
    made = small("emo")
    model = load(made.path, **OPTIONS[options])
    outer, inner = made.prompt(1, 20, seed=1), made.prompt(2, 7, seed=2)
    expected = model(outer).logits, model(inner).logits
    found: list[Tensor] = []

    def hook(*_: Any) -> None:
        handle.remove()
        found.append(model(inner).logits)

    handle = model.model.layers[1].register_forward_pre_hook(hook)
    torch.testing.assert_close(model(outer).logits, expected[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(found[0], expected[1], rtol=0, atol=1e-4)


async def test_answers_of_asyncio_to_thread(small: MakeSmall, load: Load) -> None:
    """What a web framework does with a blocking call."""
    model = load(small("emo").path, **OPTIONS["pooled"])
    calls = CALLS["any lengths"]
    alone = [call.run(model) for call in calls]
    assert await asyncio.gather(*(asyncio.to_thread(call.run, model) for call in calls)) == alone


def test_other_threads_wait_for_a_step_that_a_caller_opened(small: MakeSmall, load: Load) -> None:
    made = small("emo")
    model = load(made.path, expert_memory="40%")
    paged, ids = model.expert_paging, made.prompt(1, 20)
    document = paged.routing(PoolPolicy(size=Count(4)))
    expected = load(made.path, pool_size=4)(ids).logits
    call = Call((12,), 1)
    alone = call.run(model)
    with ThreadPoolExecutor(1) as other:
        with paged.step([document], prefill=True):
            running = other.submit(call.run, model)
            logits = model(ids).logits
        assert running.result(TIMEOUT_S) == alone
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert document.pool is not None


def test_a_layer_by_itself_says_what_to_call(small: MakeSmall, load: Load) -> None:
    made = small("emo")
    model = load(made.path)
    hidden = torch.zeros(1, 2, 32)
    with pytest.raises(ConfigError, match=r"cannot run by itself, .* call the model"):
        model.model.layers[0].mlp(hidden)
    paged = model.expert_paging
    with paged.step([paged.routing(PoolPolicy())], prefill=True):
        (error,) = at_once([partial(model.model.layers[0].mlp, hidden)])
        assert isinstance(error, ConfigError), "a step belongs to the thread that opened it"
        model.model.layers[0].mlp(hidden)


def test_models_loaded_and_run_in_threads_of_their_own(small: MakeSmall, load: Load) -> None:
    paths = [small(family).path for family in ("emo", "mixtral")]
    call = Call((4, 17, 9), 1)

    def load_and_run(path: Any, dtype: str) -> Any:
        return call.run(load(path, dtype=dtype, expert_memory="40%", pool_size=4))

    runs = [partial(load_and_run, path, dtype) for path in paths for dtype in ("float32", "bfloat16")]
    alone = [run() for run in runs]
    assert at_once(runs) == alone
    assert torch.get_default_dtype() == torch.float32


def test_loading_leaves_the_default_dtype_of_other_threads_alone(
    small: MakeSmall, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: list[torch.dtype] = []
    monkeypatch.setattr(torch, "set_default_dtype", changes.append)
    opened = OpenModel.open(small("olmoe").path, "bfloat16")
    with opened.checkpoint:
        model = opened.load_trunk()
    assert set(changes) <= {torch.get_default_dtype()}
    assert model.dtype == model.config.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


OPTIMISED = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
import torch
import pager

assert False, "this program must run with -O"
torch.set_num_threads(1)
answers = {}
for pool_size in (None, 4):
    with pager.load_model(sys.argv[1], dtype="float32", expert_memory="40%", pool_size=pool_size) as model:
        def run(seed):
            ids = torch.randint(0, 60, (1, 5 + seed), generator=torch.Generator().manual_seed(seed))
            options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1}
            return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0].tolist()

        alone = [run(seed) for seed in range(6)]
        with ThreadPoolExecutor(6) as threads:
            answers[str(pool_size)] = [alone, list(threads.map(run, range(6))), [run(seed) for seed in range(6)]]
        try:
            model.model.layers[0].mlp(torch.zeros(1, 2, 32))
        except pager.errors.ConfigError as error:
            answers["by itself"] = str(error)
print(json.dumps(answers))
"""


@pytest.mark.slow
def test_without_assertions_too(small: MakeSmall) -> None:
    command = [sys.executable, "-O", "-c", OPTIMISED, str(small("emo").path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.splitlines()[-1])
    assert "cannot run by itself" in answers.pop("by itself")
    for alone, together, afterwards in answers.values():
        assert alone == together == afterwards


def test_leaving_the_block_closes_the_model(small: MakeSmall, load: Load) -> None:
    made = small("emo")
    with load(made.path) as model:
        assert isinstance(model, type(made.plain))
        assert type(model).__name__ == "EmoForCausalLM", "transformers goes by the name"
        model(made.prompt())
    with pytest.raises(ConfigError, match="this model was closed"):
        model(made.prompt())
