"""Experts that the page cache holds are computed where they are, once the slots are full."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from benchmarks.page_cache import drop
from pager.cache import pager as pager_module
from pager.errors import ExpertUnavailable
from pager.models.open_model import OpenModel
from pager.store.pack import pack
from pager.store.pack_format import PACK_NAME, RecordFormat
from pager.types import ExpertKey, PagingCounts

Small = Any
Load = Callable[..., PreTrainedModel]

# large enough for products in place of copies, and matrices of whole pages
LARGE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 128}


@pytest.fixture(autouse=True)
def from_small_experts_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pager_module, "IN_PLACE_BYTES", 1 << 12)


@pytest.fixture(params=["plain", "packed", "int8", "int4", "fp8"])
def checkpoint(request: pytest.FixtureRequest, small: Callable[..., Small], tmp_path: Path) -> tuple[Path, Small]:
    made = small("emo", **LARGE)
    return (made.path if request.param == "plain" else packed(made.path, tmp_path / "out", request.param)), made


def packed(path: Path, out: Path, kind: str = "packed", as_floats: torch.dtype = torch.float32) -> Path:
    opened = OpenModel.open(path, "float32")
    opened.checkpoint.close()
    dtype = as_floats if kind == "packed" else RecordFormat.of(kind, torch.bfloat16)
    counts, shape = opened.facts.experts_per_layer, opened.family.shape
    pack(path, out, pieces=opened.pieces, experts_per_layer=counts, shape=shape, dtype=dtype)
    return out


@torch.no_grad()
def forward(model: PreTrainedModel, made: Small, seed: int = 1, num_tokens: int = 24) -> torch.Tensor:
    logits: torch.Tensor = model(made.prompt(2, num_tokens, seed)).logits
    return logits


@torch.no_grad()
def with_picks(model: PreTrainedModel, made: Small, seed: int, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits, and [B, T, layers and experts] of the experts that each token picks."""
    output = model(made.prompt(2, num_tokens, seed), output_router_logits=True)
    top_k = model.expert_paging.facts.top_k_per_layer
    picked = [
        torch.zeros_like(logits_NE, dtype=torch.bool).scatter(1, logits_NE.topk(count).indices, True)
        for logits_NE, count in zip(output.router_logits, top_k, strict=True)
    ]
    return output.logits, torch.cat(picked, -1).view(2, num_tokens, -1)


def counts(model: PreTrainedModel) -> PagingCounts:
    found: PagingCounts = model.expert_paging.pager.stats().paging
    return found


def test_full_slots_stay_as_they_are_and_logits_do_too(checkpoint: tuple[Path, Small], load: Load) -> None:
    path, made = checkpoint
    whole, paged = load(path, dtype="auto"), load(path, dtype="auto", expert_memory="25%")
    forward(paged, made)  # fills the slots
    resident, before = paged.expert_paging.pager.resident_experts(), counts(paged)
    for seed in (1, 2, 3):
        tolerance = 1e-4 if whole.dtype == torch.float32 else 0.1
        for num_tokens in (24, 1):
            expected, found = forward(whole, made, seed, num_tokens), forward(paged, made, seed, num_tokens)
            torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    paging = counts(paged) - before
    assert paging.bytes_paged == 0
    assert min(paging.experts_hit, paging.experts_missed) > 0
    assert paged.expert_paging.pager.resident_experts() == resident
    paged.expert_paging.pager.check_integrity()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["emo", "olmoe", "qwen3_moe", "stacked", "packed"])
def test_small_experts_are_gathered_from_slots_and_page_cache(
    small: Callable[..., Small], load: Load, tmp_path: Path, family: str, dtype: str
) -> None:
    options = {"save": {"save_original_format": False}} if family == "stacked" else {}
    made = small(family if family in ("emo", "olmoe", "qwen3_moe") else "olmoe", hidden_size=64, **options)
    made.plain.to(getattr(torch, dtype)).save_pretrained(made.path, **options.get("save", {}))
    path = packed(made.path, tmp_path / "out", as_floats=getattr(torch, dtype)) if family == "packed" else made.path
    whole, paged = load(path, dtype=dtype), load(path, dtype=dtype, expert_memory="25%")
    num_alike = 0
    for seed, num_tokens in ((1, 24), (2, 24), (3, 1), (4, 1), (5, 3)):
        (expected, picks), (found, found_picks) = (with_picks(each, made, seed, num_tokens) for each in (whole, paged))
        # In half precision rounding decides here and there which expert a token picks, and what follows attends to it.
        picks_alike_B = (picks == found_picks).flatten(1).all(-1)
        is_close_BT = (found - expected).abs().amax(-1) < (1e-4 if dtype == "float32" else 0.1)
        assert is_close_BT[picks_alike_B].all()
        num_alike += int(picks_alike_B.sum())
        if seed == 1:
            before = counts(paged)  # the slots are full
    assert num_alike >= (10 if dtype == "float32" else 6)
    paging = counts(paged) - before
    assert paging.bytes_paged == 0
    assert min(paging.experts_hit, paging.experts_missed) > 0


def test_what_the_page_cache_lost_is_read(small: Callable[..., Small], load: Load) -> None:
    made = small("olmoe", **LARGE)
    paged = load(made.path, expert_memory="25%")
    expected = forward(paged, made)
    before = counts(paged)
    forward(paged, made)
    assert counts(paged).bytes_paged == before.bytes_paged
    paged.expert_paging.close()
    paged = load(made.path, expert_memory="25%")
    forward(paged, made)
    source = paged.expert_paging.pager._source
    source._found_in_place.clear()
    source._layers.clear()
    for file in source._files.values():
        file._mapped = None  # mapped pages stay in the page cache
    drop(made.path.glob("*.safetensors"))
    before = counts(paged)
    torch.testing.assert_close(forward(paged, made), expected, rtol=0, atol=1e-4)
    assert counts(paged).bytes_paged > before.bytes_paged


def test_a_damaged_expert_is_not_found_in_place(small: Callable[..., Small], tmp_path: Path) -> None:
    path = packed(small("emo", **LARGE).path, tmp_path / "out")
    opened = OpenModel.open(path, "float32")
    with opened.checkpoint:
        source = opened.open_experts()
    damaged, whole = ExpertKey(0, 3), ExpertKey(0, 4)
    with (path / PACK_NAME).open("r+b") as file:
        place = source.place_of(damaged)
        file.seek((place.start + place.end) // 2)
        file.write(b"damaged")
    assert source.in_place([damaged]) == {}
    found, read = source.in_place([damaged, whole])[whole], tuple(torch.empty(shape) for shape in source.shape.shapes)
    source.read(whole, *read)
    assert all(torch.equal(torch.cat(pieces), tensor) for pieces, tensor in zip(found, read, strict=True))
    with pytest.raises(ExpertUnavailable, match="checksum"):
        source.read(damaged, *read)
    source.close()


def test_a_file_that_was_shortened_fails_the_forward_and_not_the_process(
    small: Callable[..., Small], load: Load
) -> None:
    made = small("olmoe", **LARGE)
    paged = load(made.path, expert_memory="25%")
    for seed in (1, 2):
        forward(paged, made, seed)
    for file in made.path.glob("*.safetensors"):
        with file.open("r+b") as stream:
            stream.truncate(4096)
    with pytest.raises(ExpertUnavailable, match="cannot read expert"):
        forward(paged, made)
