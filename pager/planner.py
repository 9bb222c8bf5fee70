"""Turns byte budgets into slots, KV blocks and buffers, once, at start-up. Integers only; knows no tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pager.errors import BudgetError
from pager.machine import Machine
from pager.types import RoutingFacts
from pager.units import format_bytes, parse_bytes, parse_bytes_or_share

__all__ = ["Budgets", "Machine", "Needs", "Plan", "describe", "plan"]

KV_BLOCK_TOKENS = 16
SMALLEST_KV_TOKENS = 256
DEFAULT_KV_SEQUENCES = 8
STAGING_BUFFERS = 4  # one for each reader thread
LARGEST_HEADROOM = 2 * 2**30


@dataclass(frozen=True, slots=True)
class Needs:
    """What a model costs in its serving dtype. `expert_bytes` is one expert; the trunk has no shared experts."""

    trunk_bytes: int
    expert_bytes: int
    facts: RoutingFacts
    kv_bytes_per_token: int
    context_tokens: int

    @property
    def num_routed(self) -> int:
        return sum(self.facts.routed_per_layer)

    @property
    def routed_bytes(self) -> int:
        return self.num_routed * self.expert_bytes

    @property
    def resident_bytes(self) -> int:
        return sum(self.facts.shared_per_layer) * self.expert_bytes

    @property
    def smallest_num_slots(self) -> int:
        """One token's routed experts of the layer that wants most."""
        return max(self.facts.top_k_per_layer, default=0)

    @property
    def kv_block_bytes(self) -> int:
        return self.kv_bytes_per_token * KV_BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class Budgets:
    """What the operator asked for. Sizes are bytes, "64MiB" or (experts, host) a share of all routed experts' bytes.

    None leaves the choice to the planner; a `host_memory` of 0 means no host tier.
    """

    expert_memory: str | int | float | None = None
    host_memory: str | int | float | None = None
    kv_memory: str | int | None = None
    max_running: int = 32


@dataclass(frozen=True, slots=True)
class Plan:
    """What a worker will allocate, in bytes. Nothing is ever allocated beyond it."""

    num_slots: int
    expert_bytes: int
    resident_bytes: int
    trunk_bytes: int
    num_kv_blocks: int
    kv_block_bytes: int
    host_records: int
    staging_bytes: int
    num_routed: int
    machine: Machine
    kv_block_tokens: int = KV_BLOCK_TOKENS

    @property
    def slot_bytes(self) -> int:
        return self.num_slots * self.expert_bytes

    @property
    def kv_bytes(self) -> int:
        return self.num_kv_blocks * self.kv_block_bytes

    @property
    def kv_tokens(self) -> int:
        return self.num_kv_blocks * self.kv_block_tokens

    @property
    def host_bytes(self) -> int:
        return self.host_records * self.expert_bytes

    @property
    def device_bytes(self) -> int:
        return self.trunk_bytes + self.resident_bytes + self.slot_bytes + self.kv_bytes + self.staging_bytes

    @property
    def total_bytes(self) -> int:
        return self.device_bytes + self.host_bytes

    @property
    def fully_resident(self) -> bool:
        return self.num_slots == self.num_routed

    def to_dict(self) -> dict[str, Any]:
        names = (
            "num_slots", "expert_bytes", "slot_bytes", "resident_bytes", "trunk_bytes", "num_kv_blocks",
            "kv_block_tokens", "kv_tokens", "kv_bytes", "host_records", "host_bytes", "staging_bytes",
            "num_routed", "fully_resident", "device_bytes", "total_bytes",
        )  # fmt: skip
        facts = {name: getattr(self, name) for name in names}
        return {**facts, "device": self.machine.device, "memory_bytes": self.machine.memory_bytes}


def plan(needs: Needs, budgets: Budgets, machine: Machine) -> Plan:
    """Explicit budgets are met or refused; what they leave is shared out between KV, experts and the host tier.

    Raises BudgetError for a budget too small to run one token or larger than the machine, ConfigError for no size.
    """
    usable = machine.memory_bytes - min(machine.memory_bytes // 8, LARGEST_HEADROOM)
    staging_bytes = STAGING_BUFFERS * needs.expert_bytes if needs.num_routed else 0
    fixed = needs.trunk_bytes + needs.resident_bytes + staging_bytes
    num_slots = _asked_slots(needs, budgets, machine)
    num_kv_blocks = _asked_kv_blocks(needs, budgets, machine)
    host_records = _asked_host_records(needs, budgets, machine)
    if machine.is_cpu:
        fixed += (host_records or 0) * needs.expert_bytes

    smallest_slots = needs.smallest_num_slots if num_slots is None else num_slots
    smallest_blocks = _smallest_kv_blocks(needs) if num_kv_blocks is None else num_kv_blocks
    smallest = fixed + smallest_slots * needs.expert_bytes + smallest_blocks * needs.kv_block_bytes
    if smallest > usable:
        raise BudgetError(
            f"the model needs {format_bytes(smallest)} with these budgets (trunk {format_bytes(needs.trunk_bytes)}, "
            f"shared experts {format_bytes(needs.resident_bytes)}, {smallest_slots} expert slots, "
            f"{smallest_blocks * KV_BLOCK_TOKENS} tokens of KV), but of the {format_bytes(machine.memory_bytes)} found "
            f"in {machine.where} {format_bytes(usable)} is free to plan; lower expert_memory, host_memory or kv_memory"
        )
    if num_kv_blocks is None:
        num_kv_blocks = _default_kv_blocks(needs, budgets, usable - fixed - (num_slots or 0) * needs.expert_bytes)
    if num_slots is None:
        left = usable - fixed - num_kv_blocks * needs.kv_block_bytes
        num_slots = min(needs.num_routed, max(smallest_slots, left // needs.expert_bytes)) if needs.num_routed else 0
        # The quarter for KV can leave less than a token's experts on a machine that is just large enough.
        num_kv_blocks = min(num_kv_blocks, (usable - fixed - num_slots * needs.expert_bytes) // needs.kv_block_bytes)
    if host_records is None:
        host_records = _default_host_records(needs, machine)
    return Plan(
        num_slots=num_slots,
        expert_bytes=needs.expert_bytes,
        resident_bytes=needs.resident_bytes,
        trunk_bytes=needs.trunk_bytes,
        num_kv_blocks=num_kv_blocks,
        kv_block_bytes=needs.kv_block_bytes,
        host_records=host_records,
        staging_bytes=staging_bytes,
        num_routed=needs.num_routed,
        machine=machine,
    )


def describe(plan: Plan) -> list[str]:
    """What the planner decided, a line each, for people."""
    share = plan.num_slots / plan.num_routed if plan.num_routed else 1.0
    host = f"{plan.host_records} experts, {format_bytes(plan.host_bytes)}" if plan.host_records else "none"
    return [
        f"trunk        {format_bytes(plan.trunk_bytes)}, always in memory",
        f"shared       {format_bytes(plan.resident_bytes)} of experts that every token uses, always in memory",
        f"expert slots {plan.num_slots} of {plan.num_routed} routed experts ({share:.1%}), "
        f"{format_bytes(plan.slot_bytes)} in slots of {format_bytes(plan.expert_bytes)}",
        f"KV cache     {plan.kv_tokens} tokens in {plan.num_kv_blocks} blocks, {format_bytes(plan.kv_bytes)}",
        f"staging      {format_bytes(plan.staging_bytes)}",
        f"host tier    {host}",
        f"total        {format_bytes(plan.total_bytes)}; {format_bytes(plan.machine.memory_bytes)} found in "
        f"{plan.machine.where}",
    ]


def _asked_slots(needs: Needs, budgets: Budgets, machine: Machine) -> int | None:
    if budgets.expert_memory is None:
        return None
    asked = parse_bytes_or_share(budgets.expert_memory, needs.routed_bytes)
    _check_machine("expert_memory", budgets.expert_memory, asked, machine.memory_bytes, machine.where)
    num_slots = min(asked // needs.expert_bytes, needs.num_routed) if needs.expert_bytes else 0
    if num_slots < needs.smallest_num_slots:
        smallest = needs.smallest_num_slots * needs.expert_bytes
        raise BudgetError(
            f"expert_memory {budgets.expert_memory!r} is {format_bytes(asked)} and holds {num_slots} experts; one "
            f"token needs {needs.smallest_num_slots} of a layer at once: give at least {smallest} bytes "
            f"({format_bytes(smallest)})"
        )
    return num_slots


def _asked_kv_blocks(needs: Needs, budgets: Budgets, machine: Machine) -> int | None:
    if budgets.kv_memory is None:
        return None
    asked = parse_bytes(budgets.kv_memory)
    _check_machine("kv_memory", budgets.kv_memory, asked, machine.memory_bytes, machine.where)
    blocks = asked // needs.kv_block_bytes
    if blocks < _smallest_kv_blocks(needs):
        smallest = _smallest_kv_blocks(needs) * needs.kv_block_bytes
        raise BudgetError(
            f"kv_memory {budgets.kv_memory!r} holds {blocks * KV_BLOCK_TOKENS} tokens; give at least {smallest} bytes "
            f"({format_bytes(smallest)}) for one sequence of {_smallest_kv_blocks(needs) * KV_BLOCK_TOKENS}"
        )
    return blocks


def _asked_host_records(needs: Needs, budgets: Budgets, machine: Machine) -> int | None:
    if budgets.host_memory is None:
        return 0 if machine.is_cpu else None
    if budgets.host_memory in (0, "0"):
        return 0
    asked = parse_bytes_or_share(budgets.host_memory, needs.routed_bytes)
    _check_machine("host_memory", budgets.host_memory, asked, machine.host_bytes, "free shared memory (/dev/shm)")
    return min(asked // needs.expert_bytes, needs.num_routed) if needs.expert_bytes else 0


def _default_host_records(needs: Needs, machine: Machine) -> int:
    """Beside a GPU: as many experts as half of the shared memory holds. On a CPU the tier would hold experts twice."""
    return min(needs.num_routed, machine.host_bytes // 2 // needs.expert_bytes) if needs.expert_bytes else 0


def _default_kv_blocks(needs: Needs, budgets: Budgets, remaining: int) -> int:
    sequences = min(budgets.max_running, DEFAULT_KV_SEQUENCES)
    wanted = sequences * -(-needs.context_tokens // KV_BLOCK_TOKENS)
    return max(_smallest_kv_blocks(needs), min(wanted, remaining // 4 // needs.kv_block_bytes))


def _smallest_kv_blocks(needs: Needs) -> int:
    return -(-min(SMALLEST_KV_TOKENS, needs.context_tokens) // KV_BLOCK_TOKENS)


def _check_machine(name: str, value: object, asked: int, found: int, where: str) -> None:
    if asked > found:
        raise BudgetError(
            f"{name} {value!r} is {format_bytes(asked)}, more than the {format_bytes(found)} found in {where}; lower it"
        )
