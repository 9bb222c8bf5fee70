"""Selection methods on real models: against the recorded scores and sets, and against plain models by hand."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from pager.engine.paged_model import PagedModel, load_paged_model
from pager.errors import InvalidRequest, PoolTooSmall
from pager.lab.methods import FROM_EXAMPLES, random_layers, score, select
from pager.lab.recording import Probe
from pager.memory import Budgets
from pager.pools.pick import check_pool, pick_pool
from pager.predict.trunk import TrunkPredictor
from pager.types import (
    Bytes,
    Count,
    Counts,
    ExpertPool,
    Full,
    Mass,
    PoolPolicy,
    PoolSize,
    PoolSource,
    RoutingFacts,
    RoutingScores,
    Share,
)

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
CHECKPOINT = GOLDEN / "ckpt_emo_tiny"
RECORDED = {"greedy": "greedy", "easy-ep": "easy_ep", "random": "random_s0_"}
EXAMPLES = [list(range(3, 43)), list(range(90, 100)), [7] * 5]
SAMPLE = [list(range(100, 160)), list(range(200, 230))]


@pytest.fixture
def load() -> Iterator[Callable[..., PagedModel]]:
    loaded: list[PagedModel] = []

    def load_paged(path: Path = CHECKPOINT, expert_memory: str = "100%") -> PagedModel:
        paged = load_paged_model(path, dtype="float32", budgets=Budgets(expert_memory=expert_memory))
        loaded.append(paged)
        return paged

    yield load_paged
    for paged in loaded:
        paged.close()


@pytest.fixture(scope="module")
def recorded() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What the authors' own code selected on the golden checkpoint, from `calib`."""
    return json.loads((GOLDEN / "prune_emo_tiny.json").read_text()), load_file(GOLDEN / "prune_emo_tiny.safetensors")


def all_predictors(path: Path = CHECKPOINT) -> dict[str, Callable[[Sequence[int]], RoutingScores]]:
    """The trunk router under every name that a routing-only pass can have."""
    trunk = TrunkPredictor.load(path, dtype="float32")
    return dict.fromkeys(("trunk", "lexical", "fitted"), trunk.scores)


@pytest.mark.parametrize("expert_memory", ["100%", "12.5%"])
@pytest.mark.parametrize("keep", [4, 8])
@pytest.mark.parametrize("method", RECORDED)
def test_sets_and_logits_are_the_recorded_ones(
    load: Callable[..., PagedModel], recorded: Any, method: str, keep: int, expert_memory: str
) -> None:
    facts, tensors = recorded
    paged = load(expert_memory=expert_memory)
    pool = select(method, Probe(paged), facts["calib"], Count(keep - 1))
    kept = facts[f"{RECORDED[method]}{keep}.experts_kept_per_layer"]
    assert [[*experts, 15] for experts in pool.experts] == kept
    document = paged.routing(PoolPolicy(source=PoolSource.FIXED, fixed=pool))
    with torch.inference_mode(), paged.step([document], prefill=True):
        logits = paged.model(tensors["doc96.input_ids"], use_cache=False).logits
    torch.testing.assert_close(logits, tensors[f"{RECORDED[method]}{keep}.logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("keep", [4, 8])
def test_greedy_scores_are_the_recorded_ones(load: Callable[..., PagedModel], recorded: Any, keep: int) -> None:
    facts, tensors = recorded
    scores = score("greedy", Probe(load()), facts["calib"], Count(keep - 1))
    for layer, mean_R in enumerate(scores.mean_LR):
        np.testing.assert_allclose(mean_R, tensors[f"greedy{keep}.avg_probs.{layer}"][:15].double(), atol=1e-6)
    assert (scores.source, scores.num_tokens) == ("greedy", sum(map(len, facts["calib"])))


def test_easy_ep_scores_are_the_recorded_ones(load: Callable[..., PagedModel], recorded: Any) -> None:
    facts, tensors = recorded
    scores = score("easy-ep", Probe(load()), facts["calib"], Count(3))
    for layer, score_R in enumerate(scores.mean_LR):
        np.testing.assert_allclose(score_R, tensors[f"easy_ep.scores.{layer}"][:15], rtol=1e-4)


def test_prefill_is_the_pool_that_a_request_with_this_prompt_chooses(load: Callable[..., PagedModel]) -> None:
    paged = load()
    for size in (Count(4), Mass(0.6), Counts((3, 6, 9, 12))):
        document = paged.routing(PoolPolicy(size))
        with torch.inference_mode(), paged.step([document], prefill=True):
            paged.model(torch.tensor(EXAMPLES[:1]), use_cache=False)
        pool = select("prefill", Probe(paged), EXAMPLES[:1], size)
        assert select("fused", Probe(paged), EXAMPLES[:1], size) == pool, "by its earlier name"
        assert document.pool is not None
        assert pool.experts == document.pool.experts
        assert pool.covered_mass == pytest.approx(document.pool.covered_mass)


def test_greedy_on_one_example_is_the_prefill(load: Callable[..., PagedModel]) -> None:
    probe = Probe(load(expert_memory="25%"))
    prefill, greedy = (score(method, probe, EXAMPLES[:1], Count(5)) for method in ("prefill", "greedy"))
    for prefill_R, greedy_R in zip(prefill.mean_LR, greedy.mean_LR, strict=True):
        np.testing.assert_allclose(prefill_R, greedy_R, atol=1e-6)


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "olmoe": ("olmoe", {}),
    "mixtral": ("mixtral", {}),
    "qwen3-some-dense": ("qwen3_moe", {"mlp_only_layers": [1], "norm_topk_prob": True}),
    "emo-two-shared": ("emo", {"num_shared_experts": 2, "num_experts_per_tok": 4}),
    "emo-mixed": (
        "emo",
        {
            "num_experts_per_layer": [6, 0, 12],
            "num_shared_experts_per_layer": [0, 0, 2],
            "dense_intermediate_size": 24,
        },
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_scores_of_every_family_are_those_of_its_plain_model(
    small: Any, load: Callable[..., PagedModel], variant: str
) -> None:
    family, config = VARIANTS[variant]
    made = small(family, **config)
    examples = [made.prompt(1, length, seed=length)[0].tolist() for length in (20, 3, 9)]
    probe = Probe(load(made.path, "50%"), sample=examples, predictors=all_predictors(made.path))
    expected = by_hand(made.plain, examples, probe.facts)
    for method, rtol in (("mean", 1e-4), ("frequency", 1e-9), ("easy-ep", 1e-3)):
        scores = score(method, probe, examples, Count(4))
        for layer_R, expected_R in zip(scores.mean_LR, expected[method], strict=True):
            np.testing.assert_allclose(layer_R, expected_R, rtol=rtol, atol=1e-6)
    for method in FROM_EXAMPLES:
        pool = check_pool(select(method, probe, examples, Count(4)), probe.facts)
        assert [len(experts) for experts in pool.experts] == [min(4, num) for num in probe.facts.routed_per_layer]


def by_hand(plain: PreTrainedModel, examples: list[list[int]], facts: RoutingFacts) -> dict[str, list[np.ndarray]]:
    """Expert by expert and token by token, after the definitions."""
    found = {method: [np.zeros(num) for num in facts.routed_per_layer] for method in ("mean", "frequency", "easy-ep")}

    def record(layer: int) -> Callable[..., None]:
        num_routed = facts.routed_per_layer[layer]

        def hook(experts: Any, inputs: tuple[Tensor, ...], output_TD: Tensor) -> None:
            hidden_TD, index_TK, weights_TK = inputs
            for token, rank in itertools.product(range(len(index_TK)), range(index_TK.shape[1])):
                expert = int(index_TK[token, rank])
                if expert >= num_routed:
                    continue
                gate, up = (experts.gate_up_proj[expert] @ hidden_TD[token]).chunk(2)
                out_D = experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
                before, after = hidden_TD[token], hidden_TD[token] + output_TD[token]
                turned = 1 - float(before @ after / (before.norm() * after.norm()))
                found["frequency"][layer][expert] += 1
                found["easy-ep"][layer][expert] += float(weights_TK[token, rank]) * float(out_D.norm()) * turned

        def gate_hook(_: Any, __: Any, output: tuple[Tensor, ...]) -> None:
            found["mean"][layer] += output[0][:, :num_routed].double().softmax(-1).sum(0).numpy()

        block = plain.model.layers[layer].mlp
        block.gate.register_forward_hook(gate_hook)
        return lambda *args: hook(*args)

    for layer, decoder in enumerate(plain.model.layers):
        if hasattr(decoder.mlp, "experts"):
            decoder.mlp.experts.register_forward_hook(record(layer))
    with torch.inference_mode():
        for example in examples:
            plain(torch.tensor([example]))
    for layer_R in found["mean"]:
        layer_R /= sum(map(len, examples))
    for layer_R in found["frequency"]:
        layer_R /= max(layer_R.sum(), 1)
    return found


def test_every_method_names_the_same_pool_whatever_the_budget(load: Callable[..., PagedModel]) -> None:
    predictors = all_predictors()
    probes = [Probe(load(expert_memory=memory), predictors=predictors, sample=SAMPLE) for memory in ("100%", "7%")]
    for method in FROM_EXAMPLES:
        pools = [select(method, probe, EXAMPLES, Count(5)) for probe in probes]
        assert pools[0].experts == pools[1].experts, method


SIZES: list[PoolSize] = [Full(), Share(0.5), Mass(0.7), Mass(0.99, 4), Counts((3, 15, 4, 5)), Bytes(24 * 24576)]


@pytest.mark.parametrize("size", SIZES, ids=repr)
def test_every_method_takes_every_size(load: Callable[..., PagedModel], size: PoolSize) -> None:
    probe = Probe(load(), predictors=all_predictors(), sample=SAMPLE)
    for method in FROM_EXAMPLES:
        pool = check_pool(select(method, probe, EXAMPLES, size), probe.facts)
        if isinstance(size, Bytes):
            assert pool.num_experts == 24
        elif isinstance(size, Counts):
            assert tuple(map(len, pool.experts)) == size.per_layer
        elif isinstance(size, Full):
            assert pool.num_experts == 60
        assert (pool.covered_mass is None) == (method in {"easy-ep", "frequency", "random"})


def test_greedy_runs_with_the_counts_that_its_bytes_are_shared_out_to(load: Callable[..., PagedModel]) -> None:
    probe = Probe(load())
    pool = select("greedy", probe, EXAMPLES, Bytes(24 * 24576))
    assert pool == select("greedy", probe, EXAMPLES, Counts(tuple(map(len, pool.experts))))


def test_examples_count_by_their_tokens(load: Callable[..., PagedModel]) -> None:
    probe = Probe(load(), predictors=all_predictors())
    for method in ("trunk", "prefill", "mean"):
        together = score(method, probe, EXAMPLES, Full()).mean_LR
        each = [score(method, probe, [example], Full()).mean_LR for example in EXAMPLES]
        for layer, mean_R in enumerate(together):
            by_tokens = sum(len(example) * mine[layer] for example, mine in zip(EXAMPLES, each, strict=True)) / 55
            np.testing.assert_allclose(mean_R, by_tokens, atol=1e-7)


def test_routers_that_can_not_tell_experts_apart_give_the_lower_ids(
    small: Any, load: Callable[..., PagedModel]
) -> None:
    made = small("emo")
    for layer in made.plain.model.layers:
        layer.mlp.gate.weight.data.zero_()
    made.plain.save_pretrained(made.path)
    probe = Probe(load(made.path), predictors=all_predictors(made.path))
    for method in ("mean", "greedy", "prefill", "trunk"):
        assert select(method, probe, [[1, 2, 3]], Count(4)).experts == ((0, 1, 2, 3),) * 3
        assert select(method, probe, [[1, 2, 3]], Bytes(10 * probe.facts.expert_bytes)).experts == (
            (0, 1, 2, 3), (0, 1, 2), (0, 1, 2),
        )  # fmt: skip


def test_frequency_is_of_the_sample_and_not_of_the_examples(load: Callable[..., PagedModel]) -> None:
    probe = Probe(load(), sample=SAMPLE)
    pools = {select("frequency", probe, [example], Count(4)).experts for example in EXAMPLES}
    assert len(pools) == 1
    assert select("mean", probe, SAMPLE, Count(4)).experts not in pools


def test_random_pools_of_one_seed_grow_and_those_of_another_differ(load: Callable[..., PagedModel]) -> None:
    probe = Probe(load())
    four, eight = (select("random", probe, [[1]], Count(count)) for count in (4, 8))
    assert set(four.keys()) < set(eight.keys())
    assert select("random", probe, EXAMPLES, Count(4)) == four
    assert select("random", probe, [[1]], Count(4), seed=1) != four
    torch.manual_seed(5)
    for scores_R in random_layers(RoutingFacts((127, 0, 40), (0, 0, 1), (7, 0, 7)), seed=5):
        if len(scores_R):
            assert (-scores_R).argsort().tolist() == torch.randperm(len(scores_R)).tolist()
            assert scores_R.sum() == pytest.approx(1)


def test_the_model_answers_as_before(load: Callable[..., PagedModel]) -> None:
    """Nothing of a probe stays behind, not even of a forward that ended early."""
    paged = load()
    inputs = torch.tensor(EXAMPLES[:1])

    def logits() -> Tensor:
        with torch.inference_mode(), paged.step([paged.routing(PoolPolicy())], prefill=True):
            found: Tensor = paged.model(inputs, use_cache=False).logits
        return found

    logits()  # what is in slots already runs in another kernel than what is being paged in
    before = logits()
    probe = Probe(paged, predictors=all_predictors(), sample=SAMPLE)
    for method in FROM_EXAMPLES:
        select(method, probe, EXAMPLES, Count(4))
    assert torch.equal(logits(), before)
    assert paged.open_step is None
    paged.pager.check_integrity()


BAD: dict[str, tuple[str, list[list[int]], PoolSize, type[Exception], str]] = {
    "unknown method": ("best", [[1]], Count(4), InvalidRequest, "'best' is not .* known are prefill, trunk, lexical"),
    "no examples": ("mean", [], Count(4), InvalidRequest, "there are none"),
    "an empty example": ("mean", [[1], []], Count(4), InvalidRequest, "one of them is empty"),
    "a token too high": ("mean", [[1, 256]], Count(4), InvalidRequest, "token id 256, .* the 256 known"),
    "a token too low": ("greedy", [[-1]], Count(4), InvalidRequest, "token id -1"),
    "an example too long": ("mean", [[1] * 9999], Count(4), InvalidRequest, "an example has 9999 tokens; 1 to "),
    "no sample": ("frequency", [[1]], Count(4), InvalidRequest, "over a sample of documents, and none was given"),
    "no trunk": ("trunk", [[1]], Count(4), InvalidRequest, "there is no 'trunk' router .* load a TrunkPredictor"),
    "not fitted": ("fitted", [[1]], Count(4), InvalidRequest, "no 'fitted' router .* run `expert-pager fit-router`"),
    "no lexical map": ("lexical", [[1]], Count(4), InvalidRequest, "run `expert-pager fit-router`"),
    "too small": ("prefill", [[1]], Count(2), PoolTooSmall, "a pool of 2 routed experts in layer 0"),
    "too few bytes": ("greedy", [[1]], Bytes(24576), PoolTooSmall, "hold 1 routed experts"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_can_not_be_done_is_said(load: Callable[..., PagedModel], case: str) -> None:
    method, examples, size, error, message = BAD[case]
    with pytest.raises(error, match=message):
        select(method, Probe(load()), examples, size)


def test_a_prefill_can_not_share_bytes_out_but_takes_counts(load: Callable[..., PagedModel]) -> None:
    paged = load()
    with pytest.raises(InvalidRequest, match=r"layer by layer .* a count for each layer"):
        paged.routing(PoolPolicy(Bytes(1 << 20)))
    pool = ExpertPool(((0, 1, 2),) * 4)
    fixed = paged.routing(PoolPolicy(Bytes(1 << 20), PoolSource.PREDICTION, fixed=pool))
    assert fixed.pool == pool
    assert paged.slots_needed(PoolPolicy(Counts((3, 4, 5, 6)))) == 18
    assert paged.facts.expert_bytes == 24576
    trunk = all_predictors()["trunk"](EXAMPLES[0])
    assert pick_pool(trunk, Bytes(18 * 24576), paged.facts).num_experts == 18
