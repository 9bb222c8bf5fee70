"""Which passes a router runs, by its settings and by what lies beside the checkpoint."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from transformers import GptOssConfig, GptOssForCausalLM

from pager.config import RouterConfig
from pager.errors import CheckpointError, ConfigError
from pager.models.open_model import OpenModel
from pager.pools.pick import pick_pool
from pager.predict.fitted import PREDICTOR_NAME, PredictorFile, num_features
from pager.predict.trunk import TrunkPredictor
from pager.types import Count, RoutingFacts
from router_service.prediction import Passes, PassPlan, PredictedModel
from tests.support.files import EMO_TINY, ROOT

OUTPUTS = 3 * 8
FACTS = RoutingFacts((9, 9, 9), (1, 1, 1), (2, 2, 2))
Fit = Callable[..., Path]


def fitted_weights(vocabulary: int, recall: float) -> dict[str, np.ndarray]:
    """A router that was fitted to nothing: what it scores and expects is made up."""
    draw = np.random.default_rng(3)
    weights = {
        "lexical.tokens": draw.normal(size=(vocabulary, 4)),
        "fitted.down": draw.normal(size=(4 + OUTPUTS, 2)),
        "fitted.trunk_mean": np.zeros(OUTPUTS),
    }
    for name, features in (("lexical", 4), ("fitted", 2)):
        weights[f"{name}.keys"] = draw.normal(size=(features, 3))
        weights[f"{name}.offsets"] = np.zeros(3)
        weights[f"{name}.head"] = draw.normal(size=(3 + features, OUTPUTS))
        weights[f"{name}.mean"] = np.full(OUTPUTS, 0.125)
    for source in ("lexical", "trunk", "fitted"):
        num_weights = num_features((8, 8, 8), looks_ahead=source == "fitted")
        weights[f"recall.{source}"] = np.array([recall] + [0.0] * (num_weights - 1))  # the first feature is always 1
    return {name: weight.astype(np.float32) for name, weight in weights.items()}


@pytest.fixture
def fit(checkpoint: Path, tmp_path: Path) -> Fit:
    """A copy of the checkpoint with a router fitted to it, or to another model."""

    def fit(*, recall: float = 0.9, fingerprint: str | None = None) -> Path:
        folder = tmp_path / "fitted-emo"
        shutil.copytree(checkpoint, folder)
        opened = OpenModel.open(folder)
        with opened.checkpoint:
            vocabulary, own = int(opened.config.vocab_size), opened.checkpoint.fingerprint
        PredictorFile(fingerprint or own, (8, 8, 8), fitted_weights(vocabulary, recall), {}).save(
            folder / PREDICTOR_NAME
        )
        return folder

    return fit


@contextmanager
def passes_of(folder: Path, **choices: object) -> Iterator[Passes]:
    planned = PassPlan.read(folder, RouterConfig(**choices))  # type: ignore[arg-type]
    opened = OpenModel.open(folder)
    with opened.checkpoint:
        unread = "" if opened.family.gates_are_known else opened.family.model_type
        model = PredictedModel(opened.checkpoint.fingerprint, opened.facts, unread)
        yield planned.passes(model, cache(lambda: TrunkPredictor(opened, "cpu", planned.stand_ins)))


@pytest.mark.parametrize(
    ("router", "chain"),
    [
        ("auto", ("fitted",)),
        ("fitted", ("fitted",)),
        ("trunk", ("trunk",)),
        ("lexical", ("lexical", "fitted")),
        ("prefill", ()),
    ],
)
def test_a_fitted_model_offers_every_pass(fit: Fit, router: str, chain: tuple[str, ...]) -> None:
    with passes_of(fit(), router=router) as passes:
        assert passes.chain == chain
        assert tuple(passes.available) == (("lexical", "trunk", "fitted") if chain else ())
        for name in passes.available:
            scores = passes.available[name]().scores([1, 2, 3])
            assert (scores.source, scores.num_tokens) == (name, 3)
            assert passes.estimate is not None
            assert passes.estimate(scores, pick_pool(scores, Count(4), FACTS)) == pytest.approx(0.9)


def test_a_model_without_a_fitted_router_has_its_trunk(checkpoint: Path) -> None:
    for router in ("auto", "trunk"):
        with passes_of(checkpoint, router=router) as passes:
            assert (passes.chain, passes.estimate) == (("trunk",), None)


def test_lexical_loads_no_trunk_until_it_is_wanted(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wanted(Exception):
        pass

    def refuse(*_: object) -> None:
        raise Wanted

    monkeypatch.setattr(TrunkPredictor, "__init__", refuse)
    folder = fit()
    with passes_of(folder, router="lexical") as passes:
        assert passes.available["lexical"]().scores([1]).source == "lexical"
        with pytest.raises(Wanted):
            passes.available["fitted"]()
    with passes_of(folder, router="lexical", min_recall=0.0) as passes:
        assert (passes.chain, tuple(passes.available)) == (("lexical",), ("lexical",))


def test_choices_that_can_take_no_effect_are_errors(fit: Fit, checkpoint: Path) -> None:
    for router in ("lexical", "fitted"):
        says = r"router\.safetensors is missing; make it with `expert-pager fit-router "
        with pytest.raises(ConfigError, match=says), passes_of(checkpoint, router=router):
            pass
    for folder, router in ((checkpoint, "trunk"), (checkpoint, "prefill"), (fit(), "prefill")):
        says, choices = r"router\.min_recall would have no effect", {"router": router, "min_recall": 0.7}
        with pytest.raises(ConfigError, match=says), passes_of(folder, **choices):
            pass


def test_gates_that_pick_in_ways_of_their_own_leave_the_choice_to_the_prefill(tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    GptOssForCausalLM(GptOssConfig(**sizes, **heads, num_local_experts=4)).save_pretrained(tmp_path)
    for router in ("auto", "prefill"):
        with passes_of(tmp_path, router=router) as passes:
            assert passes == Passes()
    model = PredictedModel("any", FACTS, "gpt_oss")
    for router in ("lexical", "trunk", "fitted"):
        planned = PassPlan(router, True, None, tmp_path / PREDICTOR_NAME, None)
        with pytest.raises(ConfigError, match=f"'{router}', and no predictor reads the gates of gpt_oss"):
            planned.passes(model, pytest.fail)
    for min_recall in (0.0, 0.7):
        with pytest.raises(ConfigError, match=r"router\.min_recall would have no effect: no predictor reads the gates"):
            PassPlan("trunk", False, min_recall, tmp_path / PREDICTOR_NAME, None).passes(model, pytest.fail)


def test_a_router_fitted_to_another_model_is_refused(fit: Fit) -> None:
    folder = fit(fingerprint="another")
    for router in ("auto", "lexical", "trunk"):
        with pytest.raises(CheckpointError, match="was fitted to the model another"), passes_of(folder, router=router):
            pass
    with passes_of(folder, router="prefill") as passes:
        assert not passes.available


def test_a_router_with_a_codebook_needs_neither_torch_nor_transformers() -> None:
    program = f"""
import sys
sys.modules["torch"] = sys.modules["transformers"] = None  # which fails any import of them
from pathlib import Path
import router_service.app
from pager.cli import serve
from pager.config import RouterConfig
from pager.tokenizing import read_tokenizer
from pager.types import RoutingFacts, Share
from router_service.chat import ChatTemplate
from router_service.prediction import PassPlan, PredictedModel
model = Path({str(EMO_TINY)!r})
planned = PassPlan.read(model, RouterConfig(router="lexical"))
routed = planned.file.routed_per_layer
facts = RoutingFacts(tuple(n + 1 for n in routed), (1,) * len(routed), (8,) * len(routed))
passes = planned.passes(PredictedModel(planned.file.fingerprint, facts), lambda: sys.exit("the trunk was loaded"))
text = ChatTemplate.read(model).render([dict(role="user", content="SELECT 1")], None)
scores = passes.available["lexical"]().scores(read_tokenizer(model).encode(text).ids)
print(passes.codebook.assign(scores, Share(0.125)).name)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.stdout.startswith("c"), done.stderr
