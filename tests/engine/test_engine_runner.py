"""The runner over KV blocks against transformers' own generate, on small random models of every family."""

import math

import pytest
import torch
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import pager.models  # noqa: F401  (registers EMO)
from pager.engine.kv import BlockPool, KvCache
from pager.engine.runner import DecodeBatch, ModelRunner, RowStart
from pager.errors import UnsupportedModel
from pager.models.emo import EmoConfig, EmoForCausalLM

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


def small_model(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = {
        "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**SMALL, num_experts=8)),
        "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=8)),
        "qwen3_moe": lambda: Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**SMALL, num_experts=8, moe_intermediate_size=16, head_dim=8)
        ),
        "emo": lambda: EmoForCausalLM(EmoConfig(**SMALL, num_experts=8)),
    }[family]().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def generate(model: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    output = model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False)
    return output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen3_moe", "emo"])
@pytest.mark.parametrize("chunk", [1000, 7], ids=["whole", "chunked"])
def test_prompts_of_different_lengths_decode_together_as_each_alone(family: str, chunk: int) -> None:
    model = small_model(family)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 64, (n,), generator=generator).tolist() for n in (1, 15, 16, 40)]
    count = 20
    expected = [generate(model, prompt, count) for prompt in prompts]

    pool = BlockPool(32)
    cache = KvCache(model.config, 32, torch.float32, CPU)
    # What an earlier owner left must not show, whatever it is.
    cache.k.fill_(math.nan)
    cache.v.fill_(math.nan)
    runner = ModelRunner(model, cache, CPU)
    tables, tokens = [], []
    for prompt in prompts:
        blocks = pool.allocate(len(prompt) + count)
        assert blocks is not None
        for start in range(0, len(prompt), chunk):
            logits_1V = runner.prefill(prompt[start : start + chunk], blocks, start)
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


def test_a_sliding_window_is_refused() -> None:
    config = MixtralConfig(**SMALL, num_local_experts=4, sliding_window=32)
    cache = KvCache(config, 1, torch.float32, CPU)
    with pytest.raises(UnsupportedModel, match="sliding window of 32"):
        ModelRunner(MixtralForCausalLM(config), cache, CPU)
