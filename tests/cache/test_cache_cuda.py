"""The copy stream and its events. Needs a GPU: without one the CPU tests cover everything else."""

from __future__ import annotations

import random

import pytest
import torch

from pager.cache.device import DeviceSlots
from pager.cache.pager import ExpertPager
from pager.cache.tiers import HostTier
from pager.types import ExpertKey
from tests.cache.conftest import GatedSource

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

NUM_LAYERS, NUM_EXPERTS = 4, 8


@pytest.mark.parametrize("with_host", [False, True])
def test_a_slot_is_overwritten_after_its_last_reader_and_read_after_its_copy(
    source: GatedSource, with_host: bool
) -> None:
    """The kernels are kept late and the leases released at once, so that only events keep old and new weights apart."""
    host = HostTier.create(1 << 16, source.shape, torch.float32) if with_host else None
    slots = DeviceSlots(4, source.shape, torch.float32, "cuda", num_layers=NUM_LAYERS, max_experts=NUM_EXPERTS)
    pager = ExpertPager(source, slots, host=host)
    chance = random.Random(0)
    seen, expected = [], []
    for _ in range(200):
        layer, experts = chance.randrange(NUM_LAYERS), chance.sample(range(NUM_EXPERTS), 2)
        while (lease := pager.reserve_pool([ExpertKey(layer, expert) for expert in experts])) is None:
            pass
        lease.wait(layer)
        torch.cuda._sleep(200_000)
        slot_of = slots.slot_of_LE[layer][torch.tensor(experts, device="cuda")].long()
        seen.append(torch.stack([slots.gate_up[slot_of].mean((1, 2)), -slots.down[slot_of].mean((1, 2))]))
        lease.release()
        expected.append([1.0 + layer * NUM_EXPERTS + expert for expert in experts])
    torch.cuda.synchronize()
    assert torch.equal(torch.stack(seen).cpu(), torch.tensor(expected)[:, None].expand(-1, 2, -1))
    pager.check_integrity()
    assert pager.stats().evictions > 50
    pager.close()
    if host is not None:
        host.close()
