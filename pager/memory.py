"""Memory: sizes as people write them, what a process may use, what a model needs, and the plan.

The plan turns byte budgets into slots, KV blocks and buffers, once, at start-up. Integers only; knows no tensors.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from pager.errors import BudgetError, ConfigError
from pager.types import RoutingFacts

# --- sizes ------------------------------------------------------------------------------------------------------------
#
# Byte sizes and shares as people write them: `"64MiB"`, `"1.5GB"`, `268435456`, `"25%"`, `0.25`.


_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_BYTES = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*$")


def parse_bytes(value: str | int) -> int:
    """Returns the bytes of `value`. Raises ConfigError for anything but a positive size."""
    if isinstance(value, int) and not isinstance(value, bool):
        if value <= 0:
            raise ConfigError(f"a size must be positive, not {value}; write bytes or something like '64MiB'")
        return value
    match = _BYTES.match(str(value))
    if match is None or match[2].lower() not in _UNITS:
        raise ConfigError(f"{value!r} is not a size; write bytes or something like '64MiB', '1.5GB'")
    size = int(float(match[1]) * _UNITS[match[2].lower()])
    if size <= 0:
        raise ConfigError(f"a size must be positive, not {value!r}; write bytes or something like '64MiB'")
    return size


def parse_bytes_or_share(value: str | int | float, whole: int) -> int:
    """Returns the bytes of `value`; `"25%"` and a float in (0, 1] mean that share of `whole` bytes, rounded down."""
    share: float | None = None
    if isinstance(value, float):
        share = value
    elif isinstance(value, str) and value.strip().endswith("%"):
        try:
            share = float(value.strip()[:-1]) / 100
        except ValueError:
            raise ConfigError(f"{value!r} is not a share; write something like '12.5%'") from None
    if share is None:
        return parse_bytes(value)  # type: ignore[arg-type]
    if not 0 < share <= 1:
        raise ConfigError(f"a share of the experts lies above 0 and at most at 100%, not {value!r}{or_percent(value)}")
    return int(share * whole)


def or_percent(value: object) -> str:
    """Returns the end of a message about a `value` that reads like percent (25, 25.0 or "25"); else nothing."""
    try:
        number = float(str(value))
    except ValueError:
        return ""
    return f"; did you mean '{number:g}%'?" if 1 < number <= 100 else ""


def format_bytes(size: int) -> str:
    """Formats `size` in the largest binary unit that keeps a leading digit: 1536 → '1.5 KiB'."""
    amount = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(amount) < 1024 or unit == "GiB":
            return f"{int(amount)} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    raise AssertionError("unreachable")


def format_address(host: str, port: int) -> str:
    """Formats HOST:PORT, with the brackets that an IPv6 address must have."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


# --- the machine ------------------------------------------------------------------------------------------------------
#
# The memory that this process may use: the device's free memory, or what host and control group leave.


_SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True, slots=True)
class Machine:
    """The memory that a plan may spend.

    `memory_bytes` is free on `device`; `host_bytes` is free for a shared-memory host tier.

    On a CPU both come out of the same main memory.
    """

    memory_bytes: int
    device: str = "cpu"
    host_bytes: int = 0
    is_capped: bool = False  # by a control group, in which no stranger takes memory

    @property
    def headroom_bytes(self) -> int:
        """The memory left for what no plan counts: page tables, the interpreter's objects, other processes."""
        return min(self.memory_bytes // (16 if self.is_capped else 8), LARGEST_HEADROOM)

    @property
    def is_cpu(self) -> bool:
        return self.device.split(":")[0] == "cpu"

    @property
    def where(self) -> str:
        return "main memory" if self.is_cpu else f"memory of {self.device}"

    def shared_by(self, num_workers: int) -> Machine:
        """Returns the part of this machine that one of `num_workers` equal workers may plan with.

        Workers that own a GPU each have its memory to themselves; the host tier belongs to all of them already.
        """
        return replace(self, memory_bytes=self.memory_bytes // num_workers) if self.is_cpu else self

    @classmethod
    def detect(cls, device: str = "cpu") -> Machine:
        """Measures what is free now. Raises ConfigError when `device` is a GPU that is not there."""
        available, limit = int(psutil.virtual_memory().available), cgroup_free_bytes()
        free = available if limit is None else min(available, limit)
        shared = min(free, _free_shared_memory())
        kind, _, index = device.partition(":")
        if kind == "cpu":
            return cls(free, device, shared, is_capped=limit is not None and limit < available)
        if kind != "cuda" or not (index.isdecimal() or device == kind):
            raise ConfigError(
                f"device must be 'cpu' or 'cuda', not {device!r}; 'cuda:1' is the second GPU, 'auto' one if it is there"
            )
        return cls(_free_gpu_memory(device, int(index or 0)), device, shared)


def resolve_device(device: object) -> str:
    """Returns the device's name, from a name or a `torch.device`; "auto" is a GPU where there is one."""
    if device != "auto":
        return str(device)
    import torch  # slow to import, and not needed for a device that is named

    return "cuda" if torch.cuda.is_available() else "cpu"


def cgroup_free_bytes(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """Returns what this process's control group (v1 or v2) and its parents still allow; None without a limit.

    Page cache counts as free: the kernel gives it back before it kills anybody.
    """
    found = [_free_in(folder) for hierarchy, path in _memory_groups(root, own) for folder in _upwards(hierarchy, path)]
    limits = [free for free in found if free is not None]
    return min(limits) if limits else None


def _memory_groups(root: Path, own: Path) -> list[tuple[Path, str]]:
    """Returns pairs of the memory controller's mount point and this process's path in it; v2 is the line `0::/path`."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return []
    groups = []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            groups.append((root, path))
        elif "memory" in controllers.split(","):
            groups.append((root / "memory", path))
    return groups


def _upwards(hierarchy: Path, path: str) -> list[Path]:
    folder = hierarchy / path.lstrip("/")
    inside = [folder, *folder.parents]
    return inside[: inside.index(hierarchy) + 1] if hierarchy in inside else [hierarchy]


def _free_in(folder: Path) -> int | None:
    for limit_name, used_name in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        try:
            limit, used = (folder / limit_name).read_text().strip(), int((folder / used_name).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        if limit == "max":
            return None
        prefix = "" if limit_name == "memory.max" else "total_"
        cache = sum(int(stat.get(prefix + name, 0)) for name in ("inactive_file", "active_file"))
        return max(0, int(limit) - max(0, used - cache))
    return None


def _free_shared_memory() -> int:
    try:
        stats = os.statvfs(_SHARED_MEMORY)
    except OSError:
        return 0
    return stats.f_bavail * stats.f_frsize


def _free_gpu_memory(device: str, index: int) -> int:
    import torch  # slow to import, and not needed to plan for a CPU

    if not torch.cuda.is_available():
        raise ConfigError(f"device {device!r} was asked for, but torch finds no GPU here; use device 'cpu'")
    if index >= torch.cuda.device_count():
        raise ConfigError(f"device {device!r} was asked for, but torch finds {torch.cuda.device_count()} GPUs here")
    free, _ = torch.cuda.mem_get_info(index)
    return int(free)


# --- needs ------------------------------------------------------------------------------------------------------------
#
# What a model needs to run, in bytes: the planner's input. Knows no tensors and no machine.


KV_BLOCK_TOKENS = 16
SMALLEST_KV_TOKENS = 256
PREFILL_CHUNK_TOKENS = 512
"""The most tokens of a prompt in one forward where earlier ones are read from the KV cache."""
LONE_CHUNK_TOKENS = 2048
"""The same of a prompt beside which nothing else runs or waits, where a whole prompt takes as much memory."""
PADDED_TOKENS = 64
"""What the lengths that attention in half precision meets on a CPU are padded to a multiple of."""
GATHER_TOKENS = 16_384
"""How many tokens of context a decode step gathers at a time, or those of one row where that is more."""
KERNEL_SHARE, GATHER_SHARE = 48, 64
"""On a small machine, kernels that are kept and contexts that are gathered get at most one part in so many: what they
lack costs time, and what experts lack costs more."""
LEAST_KERNEL_BYTES = 32 * 2**20

_INDEX_BYTES = 32  # a token of context in a row's table: its slot, read where it is seen, and the mask
MASK_BYTES = 5  # a pair of query and key: a bool, and the float that torch makes of it


@dataclass(frozen=True, slots=True)
class Workspace:
    """The memory that a forward takes beside weights and KV: upper bounds from the model's shapes.

    `token_bytes` is for a token on its way through the layers, `row_bytes` for one whose layers read and make states of
    its text, `draw_bytes` for a row whose next token is drawn.
    `gather_bytes` is a token of context in the buffers that keys and values are gathered in, which are kept;
    `context_bytes` what a part of a prompt makes of it, and `mask_bytes` is for a pair of them where that takes a mask.
    `fixed_bytes` comes once; `kernel_bytes` is what the backend compiles for the shapes it meets, and keeps. With
    `keeps_step` a decode step has memory of its own, as a CUDA graph does. At most `most_gathered` tokens of context
    are gathered at a time, where no row is longer.
    """

    token_bytes: int = 0
    row_bytes: int = 0
    gather_bytes: int = 0
    context_bytes: int = 0
    mask_bytes: int = MASK_BYTES
    draw_bytes: int = 0
    fixed_bytes: int = 0
    kernel_bytes: int = 0
    keeps_step: bool = False
    most_gathered: int = GATHER_TOKENS

    def within(self, memory_bytes: int) -> Workspace:
        """Returns what it takes on a CPU with so much memory: less for kernels and for gathered contexts on a small
        one.
        """
        share = memory_bytes // GATHER_SHARE
        gathered = share // self.gather_bytes if self.gather_bytes else self.most_gathered
        return replace(
            self,
            kernel_bytes=min(self.kernel_bytes, max(memory_bytes // KERNEL_SHARE, LEAST_KERNEL_BYTES)),
            most_gathered=min(self.most_gathered, gathered),
        )

    def gathered_tokens(self, num_rows: int, num_tokens: int) -> int:
        """Returns how much context is gathered at a time for so many rows, the longest of which has `num_tokens`."""
        longest = -(-num_tokens // PADDED_TOKENS) * PADDED_TOKENS
        return max(longest, min(num_rows * num_tokens, self.most_gathered))

    def forward_bytes(self, num_rows: int, num_tokens: int) -> int:
        """Returns the most that forwards take at a time: a prompt of `num_tokens`, a step of so many rows as long."""
        decode = num_rows * self._row_bytes(num_tokens)
        gathered = self.gathered_tokens(num_rows, num_tokens) * self.gather_bytes
        prompt = self._prompt_bytes(num_tokens)
        return self.fixed_bytes + gathered + (prompt + decode if self.keeps_step else max(prompt, decode))

    def chunk_tokens(self, num_tokens: int) -> int:
        """Returns the most tokens that can run after others of a prompt of `num_tokens`, in the memory for prompts."""
        left = self._prompt_bytes(num_tokens) - self._past_bytes(num_tokens)
        most = min(LONE_CHUNK_TOKENS, left // max(1, self.token_bytes))
        return max(PREFILL_CHUNK_TOKENS, most - most % PREFILL_CHUNK_TOKENS)

    def beside_tokens(self, num_rows: int, num_tokens: int) -> int:
        """Returns the most tokens of prompts that can run in the forward of so many rows, in the memory for either."""
        have = max(self._prompt_bytes(num_tokens), num_rows * self._row_bytes(num_tokens))
        left = have - self._past_bytes(num_tokens) - num_rows * (self.token_bytes + num_tokens * _INDEX_BYTES)
        return min(PREFILL_CHUNK_TOKENS, max(0, left // max(1, self.token_bytes)))

    def _row_bytes(self, num_tokens: int) -> int:
        """Returns what a row of a decode step takes, whose text has `num_tokens`."""
        return max(self.token_bytes, self.row_bytes, self.draw_bytes) + num_tokens * _INDEX_BYTES

    def _prompt_bytes(self, num_tokens: int) -> int:
        """Returns what a prompt takes: all of it in one forward, or its last chunk after the others."""
        chunk = min(num_tokens, PREFILL_CHUNK_TOKENS)
        return max(num_tokens * self.token_bytes, chunk * self.token_bytes + self._past_bytes(num_tokens))

    def _past_bytes(self, num_tokens: int) -> int:
        """Returns what the context takes whose tokens ran before, seen by PREFILL_CHUNK_TOKENS at a time."""
        return num_tokens * (self.context_bytes + min(num_tokens, PREFILL_CHUNK_TOKENS) * self.mask_bytes)


@dataclass(frozen=True, slots=True)
class Needs:
    """The bytes that a model needs in its serving dtype. `expert_bytes` is one expert; the trunk has no shared experts.

    `staging_bytes` is what experts pass through on their way into slots, all readers together.
    """

    trunk_bytes: int
    expert_bytes: int
    facts: RoutingFacts
    kv_bytes_per_token: int
    context_tokens: int
    staging_bytes: int
    workspace: Workspace
    state_bytes: int = 0  # of an answer in flight, whatever its length

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
        """Returns the routed experts that one token needs in the layer that needs most."""
        return max(self.facts.top_k_per_layer, default=0)

    @property
    def kv_block_bytes(self) -> int:
        return self.kv_bytes_per_token * KV_BLOCK_TOKENS

    @property
    def smallest_kv_blocks(self) -> int:
        return -(-min(SMALLEST_KV_TOKENS, self.context_tokens) // KV_BLOCK_TOKENS)

    def longest_tokens(self, num_kv_blocks: int) -> int:
        """Returns the length of the longest request in an engine with so much KV."""
        return min(self.context_tokens, num_kv_blocks * KV_BLOCK_TOKENS)

    def gather_tokens(self, num_kv_blocks: int, max_running: int) -> int:
        """Returns the context that such an engine gathers at a time. Each request has a block of its own."""
        return self.workspace.gathered_tokens(min(max_running, num_kv_blocks), self.longest_tokens(num_kv_blocks))

    def workspace_bytes(self, num_kv_blocks: int, max_running: int) -> int:
        """Returns the most that its forwards take, the buffers to gather in included."""
        return self.workspace.forward_bytes(min(max_running, num_kv_blocks), self.longest_tokens(num_kv_blocks))

    def chunk_tokens(self, num_kv_blocks: int) -> int:
        """Returns the most tokens of a prompt in a forward after others of it."""
        return self.workspace.chunk_tokens(self.longest_tokens(num_kv_blocks))

    def beside_tokens(self, num_kv_blocks: int, max_running: int) -> int:
        """Returns the most tokens of prompts in a forward that decodes as well."""
        return self.workspace.beside_tokens(min(max_running, num_kv_blocks), self.longest_tokens(num_kv_blocks))

    def kv_cost_bytes(self, num_kv_blocks: int, max_running: int) -> int:
        """Returns the cost of so much KV, with the working memory for requests as long as it allows."""
        return num_kv_blocks * self.kv_block_bytes + self.workspace_bytes(num_kv_blocks, max_running)


# --- the plan ---------------------------------------------------------------------------------------------------------


DEFAULT_KV_SEQUENCES = 8
NUM_READERS = 4  # reads of experts that are under way at a time
NUM_CHECKERS = 2  # threads more than that: what was read is checked while the next is read
STAGING_BUFFERS = NUM_READERS + NUM_CHECKERS
LARGEST_HEADROOM = 2 * 2**30


@dataclass(frozen=True, slots=True)
class Budgets:
    """The budgets that the operator asked for.

    Sizes are bytes, "64MiB" or (experts, host) a share of all routed experts' bytes.

    None leaves the choice to the planner; a `host_memory` of 0 means no host tier.
    """

    expert_memory: str | int | float | None = None
    host_memory: str | int | float | None = None
    kv_memory: str | int | None = None
    max_running: int = 32
    num_sharing: int = 1  # equal workers that share the machine


@dataclass(frozen=True, slots=True)
class Plan:
    """The memory that a worker will allocate, in bytes. Nothing is ever allocated beyond it.

    `workspace_bytes` is for the largest forward that `max_running` requests and the KV allow: the engine runs none
    larger, and gathers no more than `gather_tokens` of context at a time. `kernel_bytes` is what the backend compiles
    as it goes, and keeps.
    """

    num_slots: int
    expert_bytes: int
    resident_bytes: int
    trunk_bytes: int
    num_kv_blocks: int
    kv_block_bytes: int
    host_records: int
    staging_bytes: int
    workspace_bytes: int
    kernel_bytes: int
    gather_tokens: int
    max_running: int
    num_routed: int
    machine: Machine
    kv_block_tokens: int = KV_BLOCK_TOKENS
    chunk_tokens: int = PREFILL_CHUNK_TOKENS  # of a prompt, in a forward after others of it
    beside_tokens: int = 0  # of prompts, in a forward that decodes as well
    state_bytes: int = 0  # of all answers in flight

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
        """The bytes on the device. Beside a GPU, staging buffers and host tier are in main memory."""
        weights = self.trunk_bytes + self.resident_bytes + self.slot_bytes
        own = weights + self.kv_bytes + self.state_bytes + self.workspace_bytes + self.kernel_bytes
        return own + self.staging_bytes if self.machine.is_cpu else own

    @property
    def total_bytes(self) -> int:
        """The bytes on the device and in main memory together."""
        return self.device_bytes + self.host_bytes + (0 if self.machine.is_cpu else self.staging_bytes)

    @property
    def fully_resident(self) -> bool:
        return self.num_slots == self.num_routed

    def to_dict(self) -> dict[str, Any]:
        names = (
            "num_slots", "expert_bytes", "slot_bytes", "resident_bytes", "trunk_bytes", "num_kv_blocks",
            "kv_block_tokens", "kv_tokens", "kv_bytes", "host_records", "host_bytes", "staging_bytes",
            "state_bytes", "workspace_bytes", "kernel_bytes", "max_running", "num_routed", "fully_resident",
            "device_bytes", "total_bytes",
        )  # fmt: skip
        facts = {name: getattr(self, name) for name in names}
        return {**facts, "device": self.machine.device, "memory_bytes": self.machine.memory_bytes}


def plan(needs: Needs, budgets: Budgets, machine: Machine) -> Plan:
    """Meets or refuses explicit budgets, and shares out what they leave between KV, experts and the host tier.

    Raises BudgetError for a budget too small to run one token or larger than the machine, ConfigError for no size.
    """
    machine = machine.shared_by(budgets.num_sharing)
    if machine.is_cpu:
        needs = replace(needs, workspace=needs.workspace.within(machine.memory_bytes))
    usable = machine.memory_bytes - machine.headroom_bytes
    state_bytes = budgets.max_running * needs.state_bytes
    fixed = needs.trunk_bytes + needs.resident_bytes + needs.workspace.kernel_bytes + state_bytes
    num_slots = _asked_slots(needs, budgets, machine)
    num_kv_blocks = _asked_kv_blocks(needs, budgets, machine)
    host_records = _asked_host_records(needs, budgets, machine)
    if machine.is_cpu:
        fixed += needs.staging_bytes + (host_records or 0) * needs.expert_bytes
    _check_fits(needs, budgets, machine, fixed, num_slots, num_kv_blocks, usable)

    if num_slots is not None:
        left = usable - fixed - num_slots * needs.expert_bytes
        num_kv_blocks = num_kv_blocks or _default_kv_blocks(needs, budgets, left // 4)
    else:
        num_kv_blocks = num_kv_blocks or _default_kv_blocks(needs, budgets, (usable - fixed) // 4)
        left = usable - fixed - needs.kv_cost_bytes(num_kv_blocks, budgets.max_running)
        num_slots = _slots_in(needs, left)
        # The quarter for KV can leave less than a token's experts on a machine that is just large enough.
        left = usable - fixed - num_slots * needs.expert_bytes
        num_kv_blocks = _most_kv_blocks(needs, budgets, num_kv_blocks, left)
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
        staging_bytes=needs.staging_bytes,
        workspace_bytes=needs.workspace_bytes(num_kv_blocks, budgets.max_running),
        kernel_bytes=needs.workspace.kernel_bytes,
        gather_tokens=needs.gather_tokens(num_kv_blocks, budgets.max_running),
        chunk_tokens=needs.chunk_tokens(num_kv_blocks),
        beside_tokens=needs.beside_tokens(num_kv_blocks, budgets.max_running),
        max_running=budgets.max_running,
        state_bytes=state_bytes,
        num_routed=needs.num_routed,
        machine=machine,
    )


def describe(plan: Plan) -> list[str]:
    """Describes what the planner decided, one line per decision."""
    share = plan.num_slots / plan.num_routed if plan.num_routed else 1.0
    host = f"{plan.host_records} experts, {format_bytes(plan.host_bytes)}" if plan.host_records else "none"
    states = f"states       {format_bytes(plan.state_bytes)} that layers hand on from token to token"
    kernels = f"kernels      {format_bytes(plan.kernel_bytes)} that torch may compile and keep in half precision"
    return [
        f"trunk        {format_bytes(plan.trunk_bytes)}, always in memory",
        f"shared       {format_bytes(plan.resident_bytes)} of experts that every token uses, always in memory",
        f"expert slots {plan.num_slots} of {plan.num_routed} routed experts ({share:.1%}), "
        f"{format_bytes(plan.slot_bytes)} in slots of {format_bytes(plan.expert_bytes)}",
        f"KV cache     {plan.kv_tokens} tokens in {plan.num_kv_blocks} blocks, {format_bytes(plan.kv_bytes)}",
        *([states] if plan.state_bytes else []),
        f"staging      {format_bytes(plan.staging_bytes)}{'' if plan.machine.is_cpu else ' of main memory'}",
        f"workspace    {format_bytes(plan.workspace_bytes)} for the longest prompt, or a step of {plan.max_running} "
        "requests",
        *([kernels] if plan.kernel_bytes else []),
        f"host tier    {host}",
        f"total        {format_bytes(plan.total_bytes)}; {format_bytes(plan.machine.memory_bytes)} found in "
        f"{plan.machine.where}",
    ]


def _check_fits(
    needs: Needs,
    budgets: Budgets,
    machine: Machine,
    fixed: int,
    num_slots: int | None,
    num_kv_blocks: int | None,
    usable: int,
) -> None:
    slots = needs.smallest_num_slots if num_slots is None else num_slots
    blocks = needs.smallest_kv_blocks if num_kv_blocks is None else num_kv_blocks
    smallest = fixed + slots * needs.expert_bytes + needs.kv_cost_bytes(blocks, budgets.max_running)
    if smallest <= usable:
        return
    working = needs.workspace_bytes(blocks, budgets.max_running) + needs.workspace.kernel_bytes
    working += budgets.max_running * needs.state_bytes
    raise BudgetError(
        f"the model needs {format_bytes(smallest)} with these budgets (trunk {format_bytes(needs.trunk_bytes)}, "
        f"shared experts {format_bytes(needs.resident_bytes)}, {slots} expert slots, "
        f"{blocks * KV_BLOCK_TOKENS} tokens of KV, {format_bytes(working)} to work with for {budgets.max_running} "
        f"requests at once), but of the {format_bytes(machine.memory_bytes)} found in {machine.where} "
        f"{format_bytes(usable)} is free to plan; lower expert_memory, host_memory, kv_memory or max_running"
    )


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
            f"({format_bytes(smallest)}){or_percent(budgets.expert_memory)}"
        )
    return num_slots


def _asked_kv_blocks(needs: Needs, budgets: Budgets, machine: Machine) -> int | None:
    if budgets.kv_memory is None:
        return None
    asked = parse_bytes(budgets.kv_memory)
    _check_machine("kv_memory", budgets.kv_memory, asked, machine.memory_bytes, machine.where)
    blocks = asked // needs.kv_block_bytes
    if blocks < needs.smallest_kv_blocks:
        smallest = needs.smallest_kv_blocks * needs.kv_block_bytes
        raise BudgetError(
            f"kv_memory {budgets.kv_memory!r} holds {blocks * KV_BLOCK_TOKENS} tokens; give at least {smallest} bytes "
            f"({format_bytes(smallest)}) for one sequence of {needs.smallest_kv_blocks * KV_BLOCK_TOKENS}"
        )
    return blocks


def _asked_host_records(needs: Needs, budgets: Budgets, machine: Machine) -> int | None:
    if budgets.host_memory is None:
        return 0 if machine.is_cpu else None
    if budgets.host_memory in (0, "0"):
        return 0
    asked = parse_bytes_or_share(budgets.host_memory, needs.routed_bytes)
    _check_machine("host_memory", budgets.host_memory, asked, machine.host_bytes, "free shared memory (/dev/shm)")
    num_records = min(asked // needs.expert_bytes, needs.num_routed) if needs.expert_bytes else 0
    if needs.num_routed and not num_records:
        raise BudgetError(
            f"host_memory {budgets.host_memory!r} is {format_bytes(asked)} and holds no expert of "
            f"{needs.expert_bytes} bytes; give at least as many, or 0 for no host tier{or_percent(budgets.host_memory)}"
        )
    return num_records


def _default_host_records(needs: Needs, machine: Machine) -> int:
    """Returns as many experts as half of the shared memory holds beside a GPU; on a CPU none, which would be copies."""
    return min(needs.num_routed, machine.host_bytes // 2 // needs.expert_bytes) if needs.expert_bytes else 0


def _default_kv_blocks(needs: Needs, budgets: Budgets, limit_bytes: int) -> int:
    sequences = min(budgets.max_running, DEFAULT_KV_SEQUENCES)
    wanted = sequences * -(-needs.context_tokens // KV_BLOCK_TOKENS)
    return _most_kv_blocks(needs, budgets, wanted, limit_bytes)


def _most_kv_blocks(needs: Needs, budgets: Budgets, wanted: int, limit_bytes: int) -> int:
    """Returns as many of the wanted blocks as fit with the working memory that they need, but at least the smallest."""
    smallest = needs.smallest_kv_blocks
    beyond = bisect_right(
        range(smallest, wanted + 1), limit_bytes, key=lambda blocks: needs.kv_cost_bytes(blocks, budgets.max_running)
    )
    return smallest + max(0, beyond - 1)


def _slots_in(needs: Needs, limit_bytes: int) -> int:
    if not needs.num_routed:
        return 0
    return min(needs.num_routed, max(needs.smallest_num_slots, limit_bytes // needs.expert_bytes))


def _check_machine(name: str, value: object, asked: int, found: int, where: str) -> None:
    if asked > found:
        raise BudgetError(
            f"{name} {value!r} is {format_bytes(asked)}, more than the {format_bytes(found)} found in {where}; lower it"
        )
