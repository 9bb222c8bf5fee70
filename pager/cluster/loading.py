"""The loader of a real worker: checkpoint, pager, tokenizer and engine, from the configuration. Imports torch."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import time
from itertools import zip_longest
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch.nn.functional import linear

from pager.cache.pager import CacheOptions, ExpertPager
from pager.cluster.placement import LoadedModel
from pager.cluster.worker import Experts, HostAccess, LoadedEngine, Sink, WorkerObserver, budgets_of
from pager.config import ModelConfig, ServiceConfig, WorkerConfig
from pager.engine.attention import check_served
from pager.engine.engine import Engine
from pager.engine.interface import EngineLimits
from pager.engine.paged_model import PagedModel, load_paged_model
from pager.engine.runner import use_fastest_num_threads
from pager.engine.workspace import limit_device_memory, return_freed_memory
from pager.errors import ConfigError
from pager.memory import describe, resolve_device
from pager.models.open_model import OpenModel
from pager.observe.worker_metrics import TierBytes
from pager.tokenizing import read_tokenizer
from pager.types import ExpertKey

log = logging.getLogger(__name__)

PAGE_IN_POLL_S = 0.02
SLOW_PRODUCTS = 2.0  # times as long as in float32, which has twice the bytes to read
PRODUCT_ROWS, PRODUCT_WIDTH, PRODUCT_TRIES = 64, 512, 5
EMBEDDED_RAY = "not counted  about 180 MiB of Ray's own processes, once on this machine (measured on 2026-11-30)"


def load_engine(config: ServiceConfig, sink: Sink, observer: WorkerObserver, host: HostAccess | None) -> LoadedEngine:
    """Loads the model and makes its engine. Raises CheckpointError, UnsupportedModel, BudgetError, ConfigError."""
    check_model(config.model)
    workers = config.workers
    torch.set_num_threads(num_threads := int(os.environ["OMP_NUM_THREADS"]))
    return_freed_memory()
    device = device_of(workers)
    paged = load_paged_model(
        config.model.path,
        device=device,
        dtype=config.model.dtype,
        budgets=budgets_of(workers, has_host_tier=host is not None),
        host_tier=host.attach if host else None,
        cache=CacheOptions(policy=workers.policy, in_place=workers.in_place),
        observer=observer,
        trace=_trace_file(workers),
    )
    try:
        limit_device_memory(paged.plan, paged.device)
        warn_of_slow_products(paged.dtype, paged.device)
        if workers.num_threads is None:
            use_fastest_num_threads(paged, num_threads)
        tokenizer = _tokenizer(Path(config.model.path))
        limits = EngineLimits(
            max_running=workers.max_running,
            max_waiting=workers.max_waiting,
            prefix_cache=workers.prefix_cache,
            share_prefixes=workers.share_prefixes,
        )
        engine = Engine(paged, tokenizer, limits, sink=sink, observer=observer)
    except BaseException:
        paged.close()
        raise
    return_freed_memory()  # gives back the memory that only loading needed
    return LoadedEngine(
        engine=engine,
        model=_info(config, paged),
        kv_block_bytes=paged.plan.kv_block_bytes,
        resident=paged.pager.resident_experts,
        paging=lambda: paged.pager.stats().paging,
        tiers=lambda: _tiers(paged, host),
        page_in=lambda experts, timeout_s: page_in(paged.pager, experts, timeout_s),
        close=paged.close,
    )


def warn_of_slow_products(dtype: torch.dtype, device: torch.device) -> None:
    """Logs a warning where the processor multiplies so much more slowly in `dtype` that float32 would be faster."""
    if device.type != "cpu" or dtype == torch.float32:
        return
    seconds: dict[torch.dtype, list[float]] = {torch.float32: [], dtype: []}
    for _ in range(PRODUCT_TRIES):
        for each, taken in seconds.items():
            row_RD, matrix_DD = (torch.ones(rows, PRODUCT_WIDTH, dtype=each) for rows in (PRODUCT_ROWS, PRODUCT_WIDTH))
            started_s = time.perf_counter()
            linear(row_RD, matrix_DD)
            taken.append(time.perf_counter() - started_s)
    ratio = min(seconds[dtype]) / min(seconds[torch.float32])
    if ratio > SLOW_PRODUCTS:
        name = str(dtype).removeprefix("torch.")
        log.warning(
            "this processor takes %.0f times as long to multiply in %s as in float32; where there is memory for twice "
            "the bytes, serve with --dtype float32 (model.dtype)", ratio, name,
        )  # fmt: skip


def check_model(model: ModelConfig) -> None:
    """Raises UnsupportedModel for a model that the service cannot run, before anything of it is loaded."""
    opened = OpenModel.open(model.path, model.dtype)
    with opened.checkpoint:
        check_served(opened)


def page_in(pager: ExpertPager, experts: Experts, timeout_s: float) -> None:
    """Pages in experts until all are loaded, the slots are full or time is up. Unreadable experts are skipped."""
    ranks = zip_longest(*([ExpertKey(layer, each) for each in row] for layer, row in enumerate(experts)))
    keys = [key for rank in ranks for key in rank if key is not None][: pager.num_slots]  # takes some of each layer
    pager.prefetch(keys)
    end_s = time.monotonic() + timeout_s
    while pager.prefetch_pending(keys) and time.monotonic() < end_s:
        time.sleep(PAGE_IN_POLL_S)


def device_of(workers: WorkerConfig) -> str:
    """Returns the device that Ray has given the worker; Ray shows it no other GPU."""
    return resolve_device(workers.device)


def _trace_file(workers: WorkerConfig) -> Path | None:
    """Returns the path of a trace file for each start of a worker. Raises ConfigError without its folder."""
    if workers.trace is None:
        return None
    try:
        Path(workers.trace).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"workers.trace {workers.trace!r} is not a writable folder: {error.strerror}") from None
    # Processes in containers that start within one second may have the same process id.
    return Path(workers.trace) / f"{time.strftime('%Y%m%dT%H%M%S')}-{platform.node()}-{os.getpid()}.jsonl.gz"


def _tokenizer(checkpoint: Path) -> Tokenizer:
    """Returns the checkpoint's tokenizer. Without one, a checkpoint is served too: every id then has an empty text."""
    return read_tokenizer(checkpoint) or Tokenizer(BPE())


def _tokenizer_class(checkpoint: Path) -> str:
    settings = checkpoint / "tokenizer_config.json"
    described = json.loads(settings.read_bytes()) if settings.exists() else {}
    return str(described.get("tokenizer_class", ""))


def _tokenizer_sha256(checkpoint: Path) -> str:
    file = checkpoint / "tokenizer.json"
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else ""


def _info(config: ServiceConfig, paged: PagedModel) -> LoadedModel:
    plan = paged.plan
    return LoadedModel(
        name=config.model.public_name,
        fingerprint=paged.fingerprint,
        dtype=str(paged.dtype).removeprefix("torch."),
        device=str(paged.device),
        context_length=paged.config.max_position_embeddings,
        kv_token_limit=plan.kv_tokens,
        vocab_size=paged.config.vocab_size,
        facts=paged.facts,
        sampling=paged.default_sampling,
        num_slots=plan.num_slots,
        expert_bytes=plan.expert_bytes,
        unread_gates="" if paged.family.gates_are_known else paged.family.model_type,
        plan_facts=plan.to_dict() | {"num_threads": torch.get_num_threads()},
        plan="\n".join((*describe(plan), *([EMBEDDED_RAY] if config.cluster.joined is None else []))),
        tokenizer_class=_tokenizer_class(Path(config.model.path)),
        tokenizer_sha256=_tokenizer_sha256(Path(config.model.path)),
    )


def _tiers(paged: PagedModel, host: HostAccess | None) -> dict[str, TierBytes]:
    stats = paged.pager.stats()
    device = TierBytes(stats.capacity_bytes, stats.resident_bytes, stats.held_bytes, stats.reserved_bytes)
    if host is None:
        return {"device": device}
    return {"device": device, "host": TierBytes(paged.plan.host_bytes, *host.used_bytes())}
