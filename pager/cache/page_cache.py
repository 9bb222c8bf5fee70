"""Whether the system's page cache is of use beside the tiers that have budgets. Pure: bytes in, a reason out."""

from __future__ import annotations

from pager.units import format_bytes


def why_bypass(*, experts_bytes: int, slots_bytes: int, has_host_tier: bool, free_bytes: int) -> str:
    """Why experts should be read past the page cache; empty where it is of use.

    It is where it can keep all experts beside the slots, at no cost: what leaves a slot comes back at the speed of
    memory. Where it can't, it costs processor time for every byte, and memory that others want, and under a cyclic
    scan of more than it holds it keeps nothing.
    """
    if has_host_tier:
        return "the host tier keeps what was read"
    if experts_bytes + slots_bytes > free_bytes:
        return (
            f"{format_bytes(experts_bytes)} of experts and {format_bytes(slots_bytes)} of slots do not fit together "
            f"into the {format_bytes(free_bytes)} of memory that are free"
        )
    return ""
