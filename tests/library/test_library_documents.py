"""Which tokens are a document, and that its pool goes wherever its cache goes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel, StaticCache

from pager.errors import ConfigError, InvalidRequest

pytestmark = pytest.mark.slow

Load = Callable[..., PreTrainedModel]
MakeSmall = Callable[..., Any]
MaskedGates = Callable[..., Any]

TOLERANCE: dict[str, Any] = {"rtol": 0.0, "atol": 1e-4}
PAD = 63


@pytest.fixture(params=["emo", "mixtral"])
def made(small: MakeSmall, request: pytest.FixtureRequest) -> Any:
    return small(request.param)


@pytest.fixture
def pooled(made: Any, load: Load) -> PreTrainedModel:
    """Pools of 4 of the 8 routed experts, in slots for 40 % of them."""
    return load(made.path, pool_size=4, expert_memory="40%")


def padded(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """[B, N] ids and mask."""
    width = max(len(row) for row in rows)
    ids, mask = torch.full((len(rows), width), PAD), torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        place = slice(width - len(row), None) if side == "left" else slice(0, len(row))
        ids[number, place], mask[number, place] = row, 1
    return ids, mask


def pools_of(output: Any) -> list[tuple[tuple[int, ...], ...]]:
    return [document.pool.experts for document in output.past_key_values.documents]


class TestDocuments:
    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("as_argument", ["keyword", "positional", "bool"])
    def test_padding_is_left_out(self, made: Any, pooled: PreTrainedModel, side: str, as_argument: str) -> None:
        rows = [made.prompt(1, count, seed=count)[0] for count in (5, 23, 12)]
        ids, mask = padded(rows, side)
        if as_argument == "positional" and made.plain.config.model_type != "emo":  # EMO's second is labels
            batch = pooled(ids, mask)
        else:
            batch = pooled(ids, attention_mask=mask.bool() if as_argument == "bool" else mask)
        for number, row in enumerate(rows):
            alone = pooled(row[None])
            assert pools_of(batch)[number] == pools_of(alone)[0]
            torch.testing.assert_close(batch.logits[number, mask[number].bool()], alone.logits[0], **TOLERANCE)
        assert len(set(pools_of(batch))) == 3, "rows too alike to show anything"

    def test_padding_would_change_a_pool_if_it_counted(self, made: Any, pooled: PreTrainedModel) -> None:
        ids, mask = padded([made.prompt(1, 5)[0], made.prompt(1, 23)[0]], "left")
        assert pools_of(pooled(ids, attention_mask=mask))[0] != pools_of(pooled(ids))[0]

    def test_left_padded_generation_is_each_prompt_alone(self, made: Any, pooled: PreTrainedModel) -> None:
        rows = [made.prompt(1, count, seed=count)[0] for count in (5, 23, 12)]
        ids, mask = padded(rows, "left")
        batch = pooled.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=-1)
        for number, row in enumerate(rows):
            assert batch[number, -12:].equal(generate(pooled, row[None])[0, -12:])

    def test_every_forward_without_a_past_starts_documents(self, made: Any, pooled: PreTrainedModel) -> None:
        first, second = (made.prompt(1, 16, seed=seed) for seed in (3, 4))
        pools = [pools_of(pooled(ids)) for ids in (first, second, first)]
        assert pools[0] == pools[2] != pools[1]
        cache = DynamicCache(config=pooled.config)
        pooled(first, past_key_values=cache)
        cache.crop(-16)
        assert pools_of(pooled(second, past_key_values=cache)) == pools[1]

    def test_a_row_that_was_all_padding_starts_its_document_later(self, made: Any, pooled: PreTrainedModel) -> None:
        short, long = made.prompt(1, 4, seed=5)[0], made.prompt(1, 12, seed=6)[0]
        ids, mask = padded([short, long], "left")
        cache = DynamicCache(config=pooled.config)
        pooled(ids[:, :8], attention_mask=mask[:, :8], past_key_values=cache)
        second = pooled(ids[:, 8:], attention_mask=mask, past_key_values=cache)
        assert pools_of(second)[0] == pools_of(pooled(short[None]))[0]
        assert pools_of(second)[1] == pools_of(pooled(long[None, :8]))[0]
        torch.testing.assert_close(second.logits[0], pooled(short[None]).logits[0], **TOLERANCE)

    def test_without_a_cache_all_text_so_far_is_the_document(
        self, made: Any, pooled: PreTrainedModel, masked_gates: MaskedGates
    ) -> None:
        ids = made.prompt(1, 16)
        for _ in range(6):
            with masked_gates(made.plain, num_routed=4, num_rows=1):
                ids = torch.cat([ids, made.plain(ids).logits[:, -1:].argmax(-1)], 1)
        assert generate(pooled, ids[:, :16], max_new_tokens=6, use_cache=False).equal(ids)
        assert pooled(ids, use_cache=False).past_key_values is None


class TestTravel:
    def test_through_reordering(self, made: Any, pooled: PreTrainedModel) -> None:
        self.check(made, pooled, lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0])

    def test_through_selecting_rows(self, made: Any, pooled: PreTrainedModel) -> None:
        self.check(made, pooled, lambda cache: cache.batch_select_indices(torch.tensor([2, 1])), [2, 1])

    def test_through_selecting_rows_by_a_mask(self, made: Any, pooled: PreTrainedModel) -> None:
        self.check(made, pooled, lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])), [0, 2])

    def test_through_repeating_rows(self, made: Any, pooled: PreTrainedModel) -> None:
        self.check(made, pooled, lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2])

    def check(self, made: Any, pooled: PreTrainedModel, move: Callable[[Any], Any], rows: list[int]) -> None:
        """After `move`, row i of the cache is what row `rows[i]` was: the next token's logits show its pool."""
        prompt, token = made.prompt(3, 20), torch.tensor([[7]])
        cache = DynamicCache(config=pooled.config)
        pools = pools_of(pooled(prompt, past_key_values=cache))
        assert len(set(pools)) == 3, "rows too alike to show anything"
        move(cache)
        output = pooled(token.expand(len(rows), 1), past_key_values=cache)
        assert pools_of(output) == [pools[row] for row in rows]
        for number, row in enumerate(rows):
            alone = DynamicCache(config=pooled.config)
            pooled(prompt[row : row + 1], past_key_values=alone)
            expected = pooled(token, past_key_values=alone).logits
            torch.testing.assert_close(output.logits[number], expected[0], **TOLERANCE)

    def test_through_a_copy(self, made: Any, pooled: PreTrainedModel) -> None:
        """The way to share a prompt's cache between continuations."""
        prompt, tail = made.prompt(1, 20), made.prompt(1, 3, seed=9)
        cache = DynamicCache(config=pooled.config)
        pooled(prompt, past_key_values=cache)
        outputs = [pooled(tail, past_key_values=copy.deepcopy(cache)) for _ in range(2)]
        torch.testing.assert_close(outputs[0].logits, outputs[1].logits, **TOLERANCE)
        assert pools_of(outputs[0]) == [document.pool.experts for document in cache.documents]

    def test_through_cropping(self, made: Any, pooled: PreTrainedModel) -> None:
        """What assisted generation does with rejected tokens."""
        prompt = made.prompt(1, 20).repeat(1, 2)
        assert generate(pooled, prompt, prompt_lookup_num_tokens=3).equal(generate(pooled, prompt))

    def test_a_reset_cache_starts_documents(self, made: Any, pooled: PreTrainedModel) -> None:
        cache = StaticCache(config=pooled.config, max_cache_len=32)
        pooled(made.prompt(2, 16, seed=3), past_key_values=cache)
        cache.reset()
        assert pools_of(pooled(made.prompt(2, 16), past_key_values=cache)) == pools_of(pooled(made.prompt(2, 16)))

    def test_a_cache_filled_elsewhere_is_refused(self, made: Any, pooled: PreTrainedModel) -> None:
        cache = made.plain(made.prompt()).past_key_values
        with pytest.raises(InvalidRequest, match="filled without pools") as caught:
            pooled(made.prompt(), past_key_values=cache)
        assert caught.value.field == "past_key_values"

    def test_a_cache_of_other_rows_is_refused(self, made: Any, pooled: PreTrainedModel) -> None:
        cache = pooled(made.prompt(3)).past_key_values
        with pytest.raises(InvalidRequest, match="holds 3 rows and the input 2"):
            pooled(made.prompt(2), past_key_values=cache)
        assert pooled(made.prompt(3), past_key_values=cache).logits.isfinite().all()


class TestGenerate:
    @pytest.mark.parametrize(
        "options",
        [
            {"num_beams": 3, "do_sample": False},
            {"num_beams": 4, "num_return_sequences": 3, "do_sample": False, "length_penalty": 0.5},
            {"num_beams": 3, "do_sample": True, "top_k": 20},
            {"num_return_sequences": 3, "do_sample": True, "temperature": 1.3},
            {"num_return_sequences": 2, "do_sample": True, "top_p": 0.7},
            {"do_sample": False, "repetition_penalty": 1.2},
        ],
        ids=["beams", "beams-returned", "beams-sampled", "samples", "nucleus", "penalty"],
    )
    @pytest.mark.parametrize("mode", ["exact", "pooled"])
    def test_equals_the_plain_model(
        self, made: Any, pooled: PreTrainedModel, load: Load, masked_gates: MaskedGates, options: Any, mode: str
    ) -> None:
        """Pooled: beams and samples of a prompt share its pool, as rows that never leave their prompt's block."""
        prompt = made.prompt()
        if mode == "exact":
            model, expected = load(made.path, expert_memory="40%"), seeded(made.plain, prompt, options)
        else:
            num_rows = 2 * max(options.get("num_beams", 1), options.get("num_return_sequences", 1))
            with masked_gates(made.plain, num_routed=4, num_rows=num_rows):
                model, expected = pooled, seeded(made.plain, prompt, options)
        assert seeded(model, prompt, options).equal(expected)

    @pytest.mark.parametrize("pool_size", [None, 4])
    def test_an_assistant_changes_nothing(self, made: Any, load: Load, pool_size: int | None) -> None:
        """Its first candidates come in one forward with the prompt, whose pool they must not choose."""
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        ends = {name: getattr(made.plain.config, name) for name in ("pad_token_id", "eos_token_id", "vocab_size")}
        assistant = LlamaForCausalLM(LlamaConfig(**sizes, **ends)).eval()
        model = load(made.path, pool_size=pool_size, expert_memory="100%")
        for seed in range(4):
            prompt = made.prompt(1, 20, seed=seed)
            expected = generate(model, prompt)
            assert generate(model, prompt, assistant_model=assistant).equal(expected)
            assert generate(model, prompt.repeat(1, 2), prompt_lookup_num_tokens=3).equal(
                generate(model, prompt.repeat(1, 2))
            )

    @pytest.mark.parametrize("option", [{"prefill_chunk_size": 8}, {"assistant_early_exit": 1}])
    def test_what_would_choose_another_pool_is_refused(
        self, made: Any, pooled: PreTrainedModel, load: Load, option: dict[str, int]
    ) -> None:
        exact = load(made.path, expert_memory="40%")
        prompt = made.prompt(1, 20)
        assert generate(exact, prompt, **option).equal(generate(made.plain, prompt))
        (name,) = option
        with pytest.raises(ConfigError, match=f"{name} has no place beside pool_size"):
            generate(pooled, prompt, **option)
        with pytest.raises(ConfigError, match=f"{name} has no place beside pool_size"):
            pooled.generate(prompt, GenerationConfig(**option, max_new_tokens=4))

    def test_a_static_cache(self, made: Any, pooled: PreTrainedModel, load: Load) -> None:
        exact = load(made.path, expert_memory="40%")
        static = generate(exact, made.prompt(), cache_implementation="static")
        assert static.equal(generate(made.plain, made.prompt()))
        with pytest.raises(InvalidRequest, match="static cache") as caught:
            generate(pooled, made.prompt(), cache_implementation="static")
        assert caught.value.field == "attention_mask"
        cache = StaticCache(config=pooled.config, max_cache_len=40)
        dynamic = DynamicCache(config=pooled.config)
        for part in made.prompt().split([20, 1, 3], 1):
            logits = [pooled(part, past_key_values=kind).logits for kind in (cache, dynamic)]
            torch.testing.assert_close(*logits, **TOLERANCE)

    def test_from_embeddings(self, made: Any, pooled: PreTrainedModel) -> None:
        embeds = pooled.get_input_embeddings()(made.prompt())
        torch.testing.assert_close(pooled(inputs_embeds=embeds).logits, pooled(made.prompt()).logits, **TOLERANCE)
        options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones(2, 24, dtype=torch.long)}
        from_embeds = pooled.generate(inputs_embeds=embeds, **options)
        assert from_embeds.equal(pooled.generate(made.prompt(), **options)[:, 24:])


class TestForward:
    def test_all_outputs_are_the_plain_models(
        self, made: Any, pooled: PreTrainedModel, load: Load, masked_gates: MaskedGates
    ) -> None:
        asked = {"output_router_logits": True, "output_hidden_states": True, "labels": made.prompt()}
        exact = load(made.path, expert_memory="40%")
        same_outputs(exact(made.prompt(), **asked), made.plain(made.prompt(), **asked))
        with masked_gates(made.plain, num_routed=4, num_rows=2):
            expected = made.plain(made.prompt(), **asked)
        same_outputs(pooled(made.prompt(), **asked), expected)
        as_tuple = pooled(made.prompt(), return_dict=False)
        torch.testing.assert_close(as_tuple[0], expected.logits, **TOLERANCE)

    def test_the_inner_model(self, made: Any, pooled: PreTrainedModel) -> None:
        output = pooled.model(made.prompt())
        torch.testing.assert_close(pooled.lm_head(output.last_hidden_state), pooled(made.prompt()).logits, **TOLERANCE)
        assert len(output.past_key_values.documents) == 2

    def test_a_positional_mask_of_the_inner_model(self, made: Any, pooled: PreTrainedModel) -> None:
        ids, mask = padded([made.prompt(1, 5)[0], made.prompt(1, 23)[0]], "left")
        by_keyword = pools_of(pooled.model(ids, attention_mask=mask))
        assert pools_of(pooled.model(ids, mask)) == by_keyword != pools_of(pooled.model(ids))

    @pytest.mark.parametrize("shape", [(2, 1, 24, 24), (1, 24), (2, 20)])
    def test_a_mask_that_can_not_tell_padding_is_refused(
        self, made: Any, pooled: PreTrainedModel, shape: tuple[int, ...]
    ) -> None:
        with pytest.raises(InvalidRequest, match=r"2-D, \[2, 24\]"):
            pooled(made.prompt(), attention_mask=torch.ones(shape, dtype=torch.bool))
        assert pooled(made.prompt()).logits.isfinite().all()

    @pytest.mark.parametrize("pool_size", [None, 4])
    @pytest.mark.parametrize("interruption", [RuntimeError, KeyboardInterrupt])
    def test_a_forward_that_broke_off_leaves_nothing_behind(
        self, made: Any, load: Load, pool_size: int | None, interruption: type[BaseException]
    ) -> None:
        model = load(made.path, pool_size=pool_size, expert_memory="40%")
        other = made.prompt(seed=8)
        expected = model(other).logits

        def interrupt(*_: Any) -> None:
            raise interruption

        hook = model.model.layers[1].register_forward_pre_hook(interrupt)
        with pytest.raises(interruption):
            model(made.prompt())
        hook.remove()
        torch.testing.assert_close(model(other).logits, expected, **TOLERANCE)
        model.expert_paging.pager.check_integrity()

    def test_no_input_is_the_models_own_error(self, pooled: PreTrainedModel) -> None:
        with pytest.raises(ValueError, match="input_ids"):
            pooled()


def generate(model: PreTrainedModel, ids: Tensor, **options: Any) -> Tensor:
    common = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": -1, "attention_mask": torch.ones_like(ids)}
    output: Tensor = model.generate(ids, **{**common, **options})
    return output


def seeded(model: PreTrainedModel, ids: Tensor, options: dict[str, Any]) -> Tensor:
    torch.manual_seed(5)
    output: Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, **options)
    return output


def same_outputs(output: Any, expected: Any) -> None:
    for name in ("loss", "logits", "router_logits", "hidden_states"):
        torch.testing.assert_close(getattr(output, name), getattr(expected, name), **TOLERANCE)
