"""The memory that a forward takes beside weights and KV: upper bounds from the model's shapes, and the means to keep to
them.

Legend: T tokens, K experts a token picks (shared ones included), E experts of a layer, D hidden, F expert intermediate,
H query heads, G key/value heads, V vocabulary. The counts cover what is alive at a time, as if every variable were
released late; tests/engine/test_engine_workspace.py compares them with what torch allocates.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from pager.engine import KERNEL_CACHE
from pager.engine.attention import SINK_WIDTH, attends_in
from pager.engine.experts import (
    COPIED_PAIRS,
    COPIED_ROWS,
    GATHERED_BYTES,
    HALF_PRECISION_ROWS,
    ROWS_TOGETHER,
    SMALL_EXPERT_BYTES,
    SUMMED_BYTES,
)
from pager.engine.kv import LayerAttention
from pager.engine.sampler import DRAWN_ROWS
from pager.engine.states import StateWork, work_of
from pager.memory import MASK_BYTES, NUM_CHECKERS, Workspace
from pager.models.open_model import OpenModel
from pager.store.reads import STAGING_BYTES

if TYPE_CHECKING:
    from pager.memory import Plan

log = logging.getLogger(__name__)

MIB = 2**20
FP32 = 4
INT64 = 8

KERNEL_BYTES = 5 * MIB // 8  # of a kernel that torch compiled for half precision

KEPT_BYTES = 9 * MIB // 2
"""The smallest buffer that malloc returns as soon as it is freed: see `return_freed_memory`. Below it are the experts
that a step copies together (`pager.engine.experts`), 4 MiB of them: to have them mapped anew cost a third of it."""
_ARENA_BYTES = MIB // 8  # what a thread takes from the system at a time at almost no cost
_SMALL_BUFFERS = 16  # buffers of 1 MiB at most, as many as a forward has at a time: malloc keeps their places
_LARGER_BUFFERS = 3  # buffers between 1 MiB and KEPT_BYTES
_KEPT_FREE_BYTES = _SMALL_BUFFERS * MIB + _LARGER_BUFFERS * KEPT_BYTES
"""How much malloc keeps of what is free at the end of an arena, where each step takes its buffers anew. With no more
than 4 MiB a step of 64 rows had 14 to 20 MiB mapped again each time, which was up to a quarter of its time."""
_MALLOC_TRIM_THRESHOLD, _MALLOC_MMAP_THRESHOLD = -1, -3

_ATTENTION_QUERIES, _ATTENTION_KEYS = 256, 512  # the tile of torch's attention on a CPU, one a thread
_GEMM_BYTES = 4 * MIB  # packed panels of a matrix product, one set a thread
_CUBLAS_BYTES = 64 * MIB  # cuBLAS and cuBLASLt, 32 MiB each on the newest GPUs
_CUDA_SEGMENT_BYTES = 20 * MIB  # what torch takes from the device for anything between 1 and 10 MiB


def workspace_of(opened: OpenModel, device: str, layers: Sequence[LayerAttention], *, num_readers: int) -> Workspace:
    """Returns what a forward of this model takes on `device`, with as many threads as torch has now."""
    on_cpu = torch.device(device).type == "cpu"
    shapes = _Shapes(opened, layers, on_cpu)
    is_half = opened.dtype != torch.float32
    # Twice on a GPU: a graph has memory of its own for all of that.
    fixed_bytes = shapes.cpu_bytes(num_readers) if on_cpu else 2 * (_CUBLAS_BYTES + 2 * _CUDA_SEGMENT_BYTES)
    token_bytes, context_bytes, draw_bytes = shapes.token_bytes(), shapes.context_bytes(), shapes.draw_bytes()
    fixed_bytes += shapes.states.prompt_bytes
    row_bytes = shapes.states.row_bytes and shapes.states.row_bytes + token_bytes
    if not on_cpu:
        # The caching allocator cuts what is below 10 MiB out of segments of 20, and keeps freed memory: a third
        # for the trunk's weights, many of which have such a size, and a quarter for temporary tensors.
        fixed_bytes += opened.trunk_bytes // 3
        token_bytes, row_bytes, context_bytes, draw_bytes = (
            nbytes + nbytes // 4 for nbytes in (token_bytes, row_bytes, context_bytes, draw_bytes)
        )
    return Workspace(
        token_bytes=token_bytes,
        row_bytes=row_bytes,
        gather_bytes=shapes.gather_bytes(),
        context_bytes=context_bytes,
        mask_bytes=MASK_BYTES if shapes.has_masks else 0,
        draw_bytes=draw_bytes,
        fixed_bytes=fixed_bytes,
        kernel_bytes=_kernel_bytes() if on_cpu and is_half else 0,
        keeps_step=not on_cpu,
    )


def staging_bytes(opened: OpenModel, device: str, *, num_readers: int, num_buffers: int) -> int:
    """Returns the bytes that experts pass through: page-locked buffers before a GPU, and what each reading thread
    converts in.
    """
    if not any(opened.facts.experts_per_layer):
        return 0
    pack = opened.checkpoint.pack
    stored = {spec.dtype for spec in opened.checkpoint.specs.values()} if pack is None else {pack.dtype}
    num_threads = num_readers + NUM_CHECKERS + 1
    pieces = num_threads * (STAGING_BYTES if stored != {opened.dtype} else 0) + num_threads * opened.making_bytes
    return pieces if torch.device(device).type == "cpu" else pieces + num_buffers * opened.expert_bytes


def sorting_bytes(vocabulary: int) -> int:
    """Returns what drawing one row takes beside its logits: sorted ones and their ids, and float64 for the rest."""
    return vocabulary * (2 * (FP32 + INT64) + 6 * 8 + 2)


class _Shapes:
    """The widths of a model that decide how much a token takes."""

    def __init__(self, opened: OpenModel, layers: Sequence[LayerAttention], on_cpu: bool) -> None:
        config, facts = opened.config, opened.facts
        self.on_cpu = on_cpu
        self.item = opened.dtype.itemsize
        self.hidden = int(config.hidden_size)
        self.vocabulary = int(config.vocab_size)
        self.keys, self.values = max(each.key_width for each in layers), max(each.value_width for each in layers)
        self.head_dim = max(each.key_dim for each in layers)
        self.queries = max(each.num_query_heads * each.key_dim for each in layers)
        self.is_grouped = any(each.num_query_heads != each.num_kv_heads for each in layers)
        self.is_latent = any(each.key_dim != each.value_dim for each in layers)
        self.has_sinks = any(each.has_sinks for each in layers)
        self.has_masks = not on_cpu or self.has_sinks or any(each.window is not None for each in layers)
        self.in_half = attends_in(opened.dtype) and not (self.has_sinks or self.is_latent)
        self.expert = opened.family.shape
        self.record = opened.record
        self.expert_bytes = opened.expert_bytes
        self.num_experts = max(facts.experts_per_layer)
        picks = zip(facts.top_k_per_layer, facts.shared_per_layer, strict=True)
        self.top_k = max(routed + shared for routed, shared in picks)
        self.dense = _dense_intermediate(opened)
        self.states = StateWork()
        if any(each.state is not None for each in layers):
            self.states = work_of(opened.whole, opened.dtype)

    def token_bytes(self) -> int:
        """Returns the bytes of a token in the layers: a layer's input, and the widest of its intermediate values."""
        position = 8 * INT64 + 4 * self.head_dim * FP32  # ids, slots, row, mask; cosines and sines
        streams = 3 * self.hidden * self.item + 2 * self.hidden * FP32  # input, residual, normed; the norm's fp32
        dense = 4 * self.dense * self.item
        widest = max(self._attention(), self._routing(), self._experts(), dense, self.states.token_bytes)
        return position + streams + widest

    def gather_bytes(self) -> int:
        """A token of context in one layer."""
        return (self.keys + self.values) * self.item

    def context_bytes(self) -> int:
        """The same as a prompt's attention wants it: on a CPU packed, or in fp32, where values are as wide as keys;
        repeated for its queries on a GPU; and what sinks make of it.
        """
        item = FP32 if self.on_cpu else self.item
        copies = 2 * self.keys * item * self.has_sinks * (1 + SINK_WIDTH / self.head_dim)
        if self.on_cpu:
            copies += (self.keys + self.values) * (self.item if self.in_half else FP32) if self.item < FP32 else 0
            copies += self.keys * FP32 if self.is_latent else 0
        elif self.is_grouped:
            copies += 2 * self.queries * item
        return math.ceil(copies)

    def draw_bytes(self) -> int:
        """Returns the bytes of a row whose token is drawn under top-p: logits, original and edited, with a grammar's
        mask; on a GPU also what sorting it takes.
        """
        row = self.vocabulary * (2 * self.item + 3 * FP32 + 3)
        return row if self.on_cpu else row + sorting_bytes(self.vocabulary)

    def cpu_bytes(self, num_readers: int) -> int:
        """Returns what any batch takes: what each thread keeps, the weights of small experts side by side, discarded
        rows.
        """
        tile = _ATTENTION_QUERIES * (_ATTENTION_KEYS + 2 + self.head_dim) * FP32
        threads = torch.get_num_threads() * (tile + _GEMM_BYTES)
        num_threads = num_readers + NUM_CHECKERS + 1  # readers, checkers, and the stepping thread
        kept = _KEPT_FREE_BYTES + num_threads * _ARENA_BYTES
        copied = 0
        if self.record:  # many rows are multiplied with a copy of the matrix
            copied = 2 * self.expert.intermediate * self.expert.hidden * self.item
            copied += self.record.scratch_bytes(max(self.expert.hidden, 2 * self.expert.intermediate))
        elif self.expert_bytes <= SMALL_EXPERT_BYTES:
            rows = COPIED_ROWS * (4 * self.expert.intermediate + self.hidden) * self.item
            gathered = min(self.num_experts * self.expert_bytes, GATHERED_BYTES)
            copied = gathered + COPIED_PAIRS * self.expert_bytes * 2 // 3 + rows
        rows = ROWS_TOGETHER + HALF_PRECISION_ROWS
        surplus = rows * (4 * self.expert.intermediate + 3 * self.hidden) * self.item
        surplus += self.num_experts * (HALF_PRECISION_ROWS - 1) * self.hidden * self.item
        drawn = DRAWN_ROWS * sorting_bytes(self.vocabulary)
        return threads + kept + copied + surplus + 3 * SUMMED_BYTES + drawn

    def _attention(self) -> int:
        queries, keys = self.queries, self.keys + self.values
        rotated = queries * (2 * self.item + 5 * FP32) + keys * self.item * (3 if self.is_latent else 1)
        attended = (queries + keys) * (self.item + FP32) + 2 * queries * (self.item + FP32)
        repeated = 0 if self.on_cpu else 2 * queries * self.item
        widened = self.context_bytes() + 2 * queries * FP32 if self.is_latent or self.has_sinks else 0
        return max(rotated, attended + repeated + widened) + self.hidden * self.item

    def _routing(self) -> int:
        """Returns the bytes of logits, the scores within the pool, probabilities, and the same in float64 to add up."""
        return self.num_experts * (2 * self.item + 4 * FP32 + 2 * 8 + 2) + self._picks()

    def _picks(self) -> int:
        return self.top_k * (3 * FP32 + 6 * INT64)

    def _experts(self) -> int:
        """Returns the bytes of pairs of token and expert: inputs and outputs side by side; then, on a GPU, the outputs
        weighted, twice.
        """
        pairs, hidden, inner = self.top_k, self.hidden, self.expert.intermediate
        if self.on_cpu:  # outputs side by side and their sums; one expert at a time, which may be every token's
            return self._picks() + (pairs + 1) * hidden * self.item + (4 * inner + 2 * hidden) * self.item
        side_by_side = 2 * pairs * hidden * self.item
        within = (4 * inner + hidden) * self.item * pairs
        weighted = 2 * pairs * hidden * FP32 + hidden * (FP32 + self.item)
        return self.num_experts * self.item + self._picks() + side_by_side + max(within, weighted)


def _kernel_bytes() -> int:
    return int(os.environ[KERNEL_CACHE]) * KERNEL_BYTES


def _dense_intermediate(opened: OpenModel) -> int:
    """Returns the width of the trunk's widest feed-forward layer, of layers without experts or beside the routed
    ones.
    """
    modules = opened.build_empty().named_modules()
    return max((int(each.weight.shape[0]) for name, each in modules if name.endswith(".gate_proj")), default=0)


def limit_kernels(plan: Plan) -> None:
    """Makes torch keep no more kernels than the plan has room for. It reads the number at its first product in half
    precision, so that a process which has computed before keeps to an earlier one.
    """
    most = plan.kernel_bytes // KERNEL_BYTES
    if 0 < most < int(os.environ[KERNEL_CACHE]):
        os.environ[KERNEL_CACHE] = str(most)


def return_freed_memory() -> None:
    """Makes malloc return large freed buffers to the system, for a process that is held to a plan; and returns what is
    free now.

    By itself glibc raises its threshold to the largest buffer that was freed, up to 32 MiB, and keeps twice as much in
    the arena of every thread that freed one. Costs a page fault per 4 KiB of each buffer of KEPT_BYTES or more. Smaller
    ones stay with the process, up to what the plan has for them.
    """
    try:
        libc = ctypes.CDLL(None)
        mallopt, malloc_trim = libc.mallopt, libc.malloc_trim
    except (OSError, AttributeError):  # another C library, which may behave differently
        log.info("the C library has no mallopt; how much freed memory it keeps is not known")
        return
    mallopt(_MALLOC_MMAP_THRESHOLD, KEPT_BYTES)
    mallopt(_MALLOC_TRIM_THRESHOLD, _KEPT_FREE_BYTES)
    malloc_trim(0)


def limit_device_memory(plan: Plan, device: torch.device) -> None:
    """Makes torch's allocator on a GPU refuse anything beyond the plan; it releases its cached memory first."""
    if device.type == "cuda":
        total_bytes = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, plan.device_bytes / total_bytes), device)
