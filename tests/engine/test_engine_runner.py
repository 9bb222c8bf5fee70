"""The runner over KV blocks against transformers' own generate, on small random models of every family."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import pager.models  # noqa: F401  (registers EMO)
from pager.cluster.loading import load_engine
from pager.cluster.worker import WorkerObserver
from pager.config import ModelConfig, ServiceConfig
from pager.engine import attention
from pager.engine.kv import BlockPool, KvCache, layers_by_config
from pager.engine.paged_model import load_paged_model
from pager.engine.runner import DecodeBatch, ModelRunner, PromptPart, RowStart
from pager.errors import CheckpointError, UnsupportedModel
from pager.models.emo import EmoConfig, EmoForCausalLM
from pager.store.checkpoint import SINGLE_NAME

CPU = torch.device("cpu")
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


SHORT = 24  # of the rope types that tell short sequences from long ones
ROPE: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": SHORT},
    "longrope": {
        "short_factor": [1.0] * 4,
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "factor": 4.0,
        "original_max_position_embeddings": SHORT,
    },
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": SHORT,
    },
    "proportional": {"partial_rotary_factor": 0.5},
}


def small_model(family: str, rope_type: str = "default") -> PreTrainedModel:
    torch.manual_seed(0)
    rope = {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **ROPE[rope_type]}}
    makers: dict[str, Callable[[], PreTrainedModel]] = {
        "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**SMALL, **rope, num_experts=8)),
        "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SMALL, **rope, num_local_experts=8, head_dim=8)),
        "qwen3_moe": lambda: Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**SMALL, **rope, num_experts=8, moe_intermediate_size=16, head_dim=8)
        ),
        "emo": lambda: EmoForCausalLM(EmoConfig(**SMALL, **rope, num_experts=8)),
    }
    model = makers[family]().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def generate(model: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    output = model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False)
    return list(map(int, output[0, len(prompt) :]))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen3_moe", "emo"])
@pytest.mark.parametrize("rope_type", sorted({"default", *ROPE_INIT_FUNCTIONS}))
@pytest.mark.parametrize("chunk", [1000, 7], ids=["whole", "chunked"])
def test_prompts_of_different_lengths_decode_together_as_each_alone(family: str, rope_type: str, chunk: int) -> None:
    """Sequences below, across and above the length at which some rope types change their tables."""
    if rope_type not in ROPE:
        pytest.fail(f"transformers has a new rope type, {rope_type}: does a row alone decide its tables?")
    assert_each_decodes_as_alone(small_model(family, rope_type), chunk)


@pytest.mark.parametrize("model_type", ["qwen2_moe", "flex_olmo", "mellum"])
def test_other_families_that_pass_the_check_decode_as_alone(model_type: str) -> None:
    config = AutoConfig.for_model(model_type, **{**SMALL, "head_dim": 8}, num_experts=8, moe_intermediate_size=16)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    assert_each_decodes_as_alone(model, 7)


def assert_each_decodes_as_alone(model: PreTrainedModel, chunk: int) -> None:
    """Prompts of different lengths, in parts of `chunk` tokens, and then together in one batch."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 64, (n,), generator=generator).tolist() for n in (1, 15, 16, 40)]
    count = 20
    assert len(prompts[0]) + count < SHORT < len(prompts[1]) + count
    expected = [generate(model, prompt, count) for prompt in prompts]

    pool = BlockPool(32)
    cache = KvCache(attention.layers_of(model.config), 32, torch.float32, CPU)
    # What an earlier owner left must not show, whatever it is.
    for held in (*cache.k, *cache.v):
        held.fill_(math.nan)
    runner = ModelRunner(model, cache, CPU)
    tables, tokens = [], []
    for prompt in prompts:
        blocks = pool.allocate(len(prompt) + count)
        assert blocks is not None
        for start in range(0, len(prompt), chunk):
            logits_1V = runner.prefill([PromptPart(prompt[start : start + chunk], blocks, start, len(prompt))])
        tables.append(blocks)
        tokens.append([int(logits_1V.argmax())])
    batch = DecodeBatch(
        [RowStart(table, out[-1], len(prompt)) for table, out, prompt in zip(tables, tokens, prompts, strict=True)], CPU
    )
    for _ in range(count - 1):
        ids_B = runner.decode(batch).argmax(dim=-1)
        batch.advance(ids_B)
        for out, token in zip(tokens, ids_B.tolist(), strict=True):
            out.append(token)
    assert tokens == expected


def test_a_rope_type_that_nothing_is_known_about_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model("olmoe")
    monkeypatch.setattr(model.model.rotary_emb, "rope_type", "dynamic_yarn")
    cache = KvCache(layers_by_config(model.config), 1, torch.float32, CPU)
    with pytest.raises(UnsupportedModel, match=r"rope_type 'dynamic_yarn'.*supported are .*longrope"):
        ModelRunner(model, cache, CPU)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "values wider than keys": (
        "deepseek_v3",
        {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 24, "n_routed_experts": 8, "n_group": 1},
        r"layer 0 attends with values in heads of 24, wider than its keys of 16",
    ),
    "a cache of its own": ("minimax", {"num_experts": 4}, r"layer 1 is of the kind 'linear_attention'"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_the_service_cannot_attend_to_is_refused_by_layer_and_argument(what: str) -> None:
    model_type, fields, message = REFUSED[what]
    config = AutoConfig.for_model(model_type, **{**SMALL, **fields})
    with pytest.raises(UnsupportedModel, match=message) as caught:
        attention.layers_of(config)
    assert caught.value.message.startswith(f"{model_type} is not supported by the service: ")


def test_a_convolution_beside_the_cache_is_refused() -> None:
    model = small_model("olmoe")
    model.model.layers[1].mixer = torch.nn.Conv1d(4, 4, 3)
    with pytest.raises(
        UnsupportedModel, match=r"model\.layers\.1\.mixer is a convolution, which keeps a state of its own"
    ):
        attention._layers_of(model, torch.float32)


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen3_moe", "emo"])
def test_plain_attention_passes_the_check(family: str) -> None:
    config = small_model(family).config
    assert attention.layers_of(config) == layers_by_config(config)


def test_a_window_is_that_of_transformers_own_masks() -> None:
    for window, expected in ((32, 32), (1, 1), (SMALL["max_position_embeddings"], None), (None, None)):
        config = AutoConfig.for_model("mixtral", **SMALL, sliding_window=window)
        assert {each.window for each in attention.layers_of(config)} == {expected}


def test_an_argument_that_attention_would_leave_out_is_refused_when_it_comes() -> None:
    model = small_model("olmoe")
    runner = ModelRunner(model, KvCache(layers_by_config(model.config), 1, torch.float32, CPU), CPU)
    layer = model.model.layers[1].self_attn
    own = layer.forward
    for name in ("s_aux", "softcap"):
        layer.forward = lambda *args, name=name, **kwargs: own(*args, **{name: torch.zeros(4)}, **kwargs)
        with pytest.raises(UnsupportedModel, match=f"layer 1 attends with the argument {name}"):
            runner.prefill([PromptPart([1, 2, 3], [0])])


def test_attention_is_checked_before_anything_is_loaded(tmp_path: Path) -> None:
    kinds = {"layer_types": ["full_attention", "linear_attention"], "num_local_experts": 4}
    config = AutoConfig.for_model("minimax", **SMALL, **kinds, head_dim=8)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({name: tensor for name, tensor in weights.items() if name != "lm_head.weight"}, tmp_path / SINGLE_NAME)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        load_paged_model(tmp_path)
    with pytest.raises(UnsupportedModel, match="layer 1 is of the kind 'linear_attention'"):
        load_engine(ServiceConfig(model=ModelConfig(path=str(tmp_path))), lambda _: None, WorkerObserver(), None)


@pytest.mark.parametrize("num_values", [attention.FP32_VALUES, 40, 1])
def test_one_token_in_half_precision_attends_as_in_double(monkeypatch: pytest.MonkeyPatch, num_values: int) -> None:
    """Rows and heads are computed a few at a time: all at once, some rows, and a single head of a single row."""
    monkeypatch.setattr(attention, "FP32_VALUES", num_values)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    query, key, value = random(3, 4, 1, 8), random(3, 5, 2, 8).transpose(1, 2), random(3, 5, 2, 8).transpose(1, 2)
    mask = torch.zeros(3, 1, 1, 5, dtype=torch.bfloat16)
    mask[1, ..., 2:] = mask[2, ..., 4:] = -math.inf
    found = attention._attend_one_token(query, key, value, mask, 0.5, None)
    scores = query.double().view(3, 2, 2, 8) @ key.double().transpose(2, 3) * 0.5 + mask.double()
    expected = (scores.softmax(-1) @ value.double()).reshape(3, 1, 4, 8)
    assert torch.equal(found, expected.bfloat16())


@pytest.mark.parametrize("num_tokens", [1, 37, 130, 300])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "value_dim"), [(4, 4, 64), (6, 2, 32)])
def test_a_short_prompt_attends_in_fp32_to_what_came_before(
    monkeypatch: pytest.MonkeyPatch, num_tokens: int, num_heads: int, num_kv_heads: int, value_dim: int
) -> None:
    """Of a few heads and queries at a time; rounded once, at the end."""
    monkeypatch.setattr(attention, "SCORES", 2**15)
    generator = torch.Generator().manual_seed(0)
    shapes = (num_heads, 64), (num_kv_heads, 64), (num_kv_heads, value_dim)
    query, key, value = (
        torch.randn(1, heads, num_tokens, dim, generator=generator).bfloat16() for heads, dim in shapes
    )
    found = attention._attend_causally(query, key, value, 0.125)
    repeats = num_heads // num_kv_heads
    keys, values = (each.double().repeat_interleave(repeats, 1) for each in (key, value))
    scores = query.double() @ keys.transpose(2, 3) * 0.125
    is_later = torch.ones(num_tokens, num_tokens, dtype=torch.bool).triu(1)
    expected = (scores.masked_fill(is_later, -math.inf).softmax(-1) @ values).transpose(1, 2)
    assert found.shape == expected.shape
    assert (found == expected.bfloat16()).float().mean() > 0.99


@pytest.mark.parametrize("num_past", [0, 48, 200])
@pytest.mark.parametrize("num_new", [1, 37, 64, 130])
@pytest.mark.parametrize("window", [None, 40])
def test_a_prompt_in_half_precision_attends_in_a_few_lengths_as_in_fp32(
    monkeypatch: pytest.MonkeyPatch, num_past: int, num_new: int, window: int | None
) -> None:
    lengths: set[int] = set()

    def noting(kernel: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*tensors: Any, **options: Any) -> Any:
            if tensors[0].dtype == torch.bfloat16:
                lengths.update(tensor.shape[2] for tensor in tensors[:3])
            return kernel(*tensors, **options)

        return noted

    for name in ("scaled_dot_product_attention", "flash_attention"):
        monkeypatch.setattr(attention, name, noting(getattr(attention, name)))
    found = []
    for in_half in (False, True):
        monkeypatch.setattr(attention, "attends_in", lambda dtype, now=in_half: now and dtype == torch.bfloat16)
        found.append(attended_prompt(num_past, num_new, window))
    torch.testing.assert_close(found[1], found[0], rtol=2e-2, atol=2e-2)
    attends_by_itself = num_new > 64 and not num_past and (window is None or window >= num_new)
    assert bool(lengths) is not attends_by_itself
    assert all(length % 64 == 0 for length in lengths)


def attended_prompt(num_past: int, num_new: int, window: int | None) -> torch.Tensor:
    """What the last tokens of a prompt attend to in bf16, by a layer whose other slots hold nothing that is finite."""
    generator = torch.Generator().manual_seed(0)
    config = MixtralConfig(num_hidden_layers=1, hidden_size=192, num_attention_heads=6, num_key_value_heads=2)
    layers = tuple(replace(each, window=window) for each in layers_by_config(config))
    cache = KvCache(layers, 32, torch.bfloat16, torch.device("cpu"), gather_tokens=256 if num_new < 60 else 384)
    slots_C = torch.randperm(512, generator=generator)[: num_past + num_new]
    for held in (*cache.k, *cache.v):
        held.fill_(torch.nan)
        held[slots_C] = torch.randn(len(slots_C), *held.shape[1:], generator=generator).bfloat16()
    query = torch.randn(1, 6, num_new, 32, generator=generator).bfloat16()
    key, value = torch.randn(2, 1, 2, num_new, 32, generator=generator).bfloat16()
    prompt = attention.PromptStep(0, num_new, num_past, slots_C[None] if num_past else None)
    layer = torch.nn.Module()
    object.__setattr__(layer, "layer_idx", 0)
    step = attention.KvStep(cache, slots_C[num_past:], prompts=[prompt])
    output, _ = attention.attend(layer, query, key, value, None, kv_step=step)
    return output
