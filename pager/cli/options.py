"""Options that several commands share, singly and in bundles.

A bundle is a dataclass whose fields are options. A command takes it as one parameter and is decorated with `bundled`,
which expands it for Typer.
"""

from __future__ import annotations

import inspect
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from pager.errors import ConfigError, InvalidRequest
from pager.memory import format_bytes
from pager.reading import check_text, read_bounded, reason_of
from pager.store.hub import local_folder
from pager.types import DriftReport, ExpertPool, PoolAsk, PoolSource, Usage


def bundled(command: Callable[..., None]) -> Callable[..., None]:
    """Returns the command as Typer takes it: a parameter whose type is a bundle becomes the options of its fields."""
    hints = get_type_hints(command, include_extras=True)
    bundles: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    options: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name in bundles:
            options += _options_of(bundles[parameter.name])
        else:
            kind = inspect.Parameter.KEYWORD_ONLY
            options.append(parameter.replace(kind=kind, annotation=hints[parameter.name]))

    def run(**given: Any) -> None:
        for name, bundle in bundles.items():
            given[name] = bundle(**{each.name: given.pop(each.name) for each in fields(bundle)})
        command(**given)

    run.__name__, run.__doc__, run.__module__ = command.__name__, command.__doc__, command.__module__
    run.__annotations__ = {option.name: option.annotation for option in options}
    run.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    return run


def _options_of(bundle: type[Any]) -> list[inspect.Parameter]:
    hints = get_type_hints(bundle, include_extras=True)
    return [
        inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=each.default, annotation=hints[each.name])
        for each in fields(bundle)
    ]


# --- the prompt -------------------------------------------------------------------------------------------------------

Prompt = str | tuple[int, ...]
MAX_BYTES = 1 << 26  # for a prompt in a file


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """The options that give a prompt."""

    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="The prompt.")] = None
    prompt_file: Annotated[
        str | None, typer.Option(help="Read the prompt from a UTF-8 file, or from stdin with '-'.", metavar="FILE")
    ] = None
    token_ids: Annotated[str | None, typer.Option(help="A prompt of token ids: '1,2,3'.", metavar="IDS")] = None

    def read(self) -> Prompt:
        """Returns the prompt. Raises typer.BadParameter unless it is given once, InvalidRequest for bad text or ids."""
        if sum(given is not None for given in (self.prompt, self.prompt_file, self.token_ids)) != 1:
            raise typer.BadParameter(
                "give the prompt exactly once: as an argument, with --prompt-file or with --token-ids"
            )
        if self.token_ids is not None:
            return _ids(self.token_ids)
        if self.prompt_file is not None:
            return _file(self.prompt_file)
        assert self.prompt is not None
        return check_text(self.prompt, "the prompt")


def _ids(text: str) -> tuple[int, ...]:
    try:
        ids = tuple(int(part) for part in text.replace(",", " ").split())
    except ValueError:
        raise InvalidRequest(f"--token-ids takes whole numbers such as '1,2,3', not {text[:60]!r}") from None
    if any(not 0 <= token_id < 2**32 for token_id in ids):
        raise InvalidRequest(f"token id {min(ids) if min(ids) < 0 else max(ids)} is not in any vocabulary")
    return ids


def _file(name: str) -> str:
    try:
        data = sys.stdin.buffer.read(MAX_BYTES + 1) if name == "-" else read_bounded(name, MAX_BYTES)
    except (OSError, ValueError) as error:  # ValueError: an impossible file name
        raise InvalidRequest(f"prompt file {name} cannot be read: {reason_of(error)}") from None
    if len(data) > MAX_BYTES:
        raise InvalidRequest(f"the prompt has more than the {MAX_BYTES} bytes that one may have")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the prompt is not UTF-8: byte {error.start} ({error.reason})") from None


# --- the pool ---------------------------------------------------------------------------------------------------------

Pool = Annotated[
    str | None,
    typer.Option(
        help="How many experts the request may use: a number a layer (32), a share of all ('12.5%'), the gate mass "
        "to cover ('mass:0.9', or 'mass:0.9:48' with a cap), or 'full'.",
        metavar="SIZE",
    ),
]


@dataclass(frozen=True, kw_only=True)
class PoolOptions:
    """The options for the pool of a prompt: its size, or its name."""

    pool: Pool = None
    pool_name: Annotated[
        str | None, typer.Option(help="Use a pool made by `expert-pager calibrate`.", metavar="NAME")
    ] = None

    def ask(self) -> PoolAsk:
        """Returns what the options ask for; without any, the service's default, and all experts in this process.

        Raises typer.BadParameter for options that exclude each other, InvalidRequest for values.
        """
        return _pool_ask(self.pool, name=self.pool_name)


@dataclass(frozen=True, kw_only=True)
class AnswerPoolOptions(PoolOptions):
    """The options for the pool of an answer: also its source, an earlier pool, and the drift policy."""

    pool_source: Annotated[
        PoolSource | None,
        typer.Option(
            help="codebook: the pool of the codeword that covers the prompt, else its own; prefill: the worker's "
            "prefill chooses the pool; prediction: the routing-only pass does. Default: the service's; prefill in this "
            "process."
        ),
    ] = None
    pool_digest: Annotated[
        str | None, typer.Option(help="Use a pool this tenant was given before (with --server).", metavar="HEX")
    ] = None
    drift: Annotated[
        str | None,
        typer.Option(
            help="What to do when the answer leaves its pool: past a mean gate mass outside of it ('0.3') widen the "
            "pool, or use all experts from there on ('0.3:exact'). Averaged over 16 tokens, or N ('0.3:widen:N').",
            metavar="MASS[:widen|exact[:N]]",
        ),
    ] = None

    def ask(self) -> PoolAsk:
        return _pool_ask(self.pool, self.pool_source, self.pool_digest, self.pool_name, self.drift)


def _pool_ask(
    size: str | None,
    source: PoolSource | None = None,
    digest: str | None = None,
    name: str | None = None,
    drift: str | None = None,
) -> PoolAsk:
    from pager.pools.drift import parse_drift
    from pager.pools.pick import parse_pool_size

    given = {"--pool": size, "--pool-digest": digest, "--pool-name": name}
    named = [option for option, value in given.items() if value is not None]
    if len(named) > 1:
        raise typer.BadParameter(f"{' and '.join(named)} name different pools; give one of them")
    if source is PoolSource.FIXED:
        raise typer.BadParameter("a fixed pool is given with --pool-name or --pool-digest")
    if source is not None and (digest is not None or name is not None):
        raise typer.BadParameter(f"--pool-source names what chooses a pool, and {named[0]} names a pool")
    parsed = None if size is None else parse_pool_size(size)
    return PoolAsk(parsed, source, digest=digest, name=name, drift=parse_drift(drift))


# --- single options ---------------------------------------------------------------------------------------------------


def model_folder(value: str | Path) -> Path:
    """Returns the folder of a model given as a folder, or as on the hub. Raises CheckpointError."""
    return local_folder(value)


ModelPath = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL",
        help="Checkpoint folder, as downloaded or packed, GGUF file, or ORGANISATION/NAME[@REVISION] on the hub.",
        parser=model_folder,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, for scripts.")]
ExpertMemory = Annotated[
    str | None,
    typer.Option(
        help="Memory for routed experts: '64MiB', bytes, or a share of all of them ('25%'). "
        "Default: what the machine has.",
        metavar="SIZE",
    ),
]
HostMemory = Annotated[
    str | None,
    typer.Option(help="Host tier behind the slots: a size, or a share of all experts; 0 for none.", metavar="SIZE"),
]
KvMemory = Annotated[str | None, typer.Option(help="Memory for keys and values.", metavar="SIZE")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:N, or auto: a GPU where there is one.", metavar="NAME")]
Dtype = Annotated[
    str | None,
    typer.Option(help="bfloat16 (default), float16, float32, or auto: as the checkpoint says.", metavar="NAME"),
]


# --- output -----------------------------------------------------------------------------------------------------------
#
# How the commands print, and the check for the extras that some of them need.


_SERVE = ("ray", "grpc", "grpc_health", "grpc_reflection", "grpc_status", "google", "redis", "expert_pager", "jwt",
          "limits", "pydantic")  # fmt: skip
_LAB = ("sklearn", "scipy", "matplotlib")


@contextmanager
def serve_extra(purpose: str) -> Iterator[None]:
    """Surrounds imports: ConfigError, with what to install, where a package of the `serve` extra is missing."""
    with _extra(purpose, "serve", _SERVE):
        yield


def require(*packages: str) -> None:
    """Raises ModuleNotFoundError where a package is missing that will be imported later, or by another process."""
    for package in packages:
        if find_spec(package) is None:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)


@contextmanager
def lab_extra(purpose: str) -> Iterator[None]:
    """Surrounds imports in the same way for the `lab` extra."""
    with _extra(purpose, "lab", _LAB):
        yield


@contextmanager
def _extra(purpose: str, extra: str, packages: tuple[str, ...]) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing not in packages:
            raise
        raise ConfigError(
            f"{purpose} needs the package {missing!r}, which is not installed; run: pip install 'expert-pager[{extra}]'"
        ) from None


out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def print_error(message: str) -> None:
    err.print(f"error: {message}", markup=False)


def print_json(value: Any, indent: int | None = 2) -> None:
    """Prints one JSON document. JSON has no infinities; where a number is none, it is null."""
    print(json.dumps(_finite(value), indent=indent, allow_nan=False), flush=True)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value


def print_facts(facts: Sequence[tuple[str, str]]) -> None:
    """Prints names and values in two columns."""
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        out.print(f"{name:<{width}}  {value}", markup=False)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table whose first column is text, the others figures."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    out.print(table, soft_wrap=False)


@contextmanager
def bytes_progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Shows a progress bar on stderr, driven by (bytes done, bytes in all). Silent where stderr is no terminal."""
    columns = (
        TextColumn(what),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, disable=not err.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def steps_progress(what: str, total: int) -> Iterator[Callable[[], None]]:
    """Shows a progress bar on stderr, driven by a call after each of `total` steps. Silent without a terminal."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, disable=not err.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)


@contextmanager
def busy(what: str) -> Iterator[None]:
    """Shows a spinner on stderr while something without a measure goes on."""
    if not err.is_terminal:
        yield
        return
    with err.status(what):
        yield


def pool_dict(pool: ExpertPool | None) -> dict[str, Any] | None:
    if pool is None:
        return None
    return {
        "digest": pool.digest,
        "num_experts": pool.num_experts,
        "covered_mass": pool.covered_mass,
        "layers": [list(layer) for layer in pool.experts],
    }


def usage_dict(usage: Usage) -> dict[str, Any]:
    return {
        "mode": usage.mode,
        "finish_reason": str(usage.finish_reason),
        "prompt_tokens": usage.prompt_tokens,
        "cached_prompt_tokens": usage.cached_prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "pool": pool_dict(usage.pool),
        "codeword": usage.codeword or None,
        "bytes_from_disk": usage.bytes_from_disk,
        "bytes_from_host": usage.bytes_from_host,
        "experts_hit": usage.experts_hit,
        "experts_missed": usage.experts_missed,
        "stall_s": usage.stall_s,
        "out_of_pool_mass": usage.out_of_pool_mass,
        "predicted_recall": usage.predicted_recall,
        "queue_s": usage.queue_s,
        "time_to_first_token_s": usage.time_to_first_token_s,
        "model_fingerprint": usage.model_fingerprint,
        "drift": usage.drift and _drift_dict(usage.drift),
    }


def usage_lines(usage: Usage, elapsed_s: float) -> list[str]:
    lookups = usage.paging.num_lookups
    hits = f"{usage.experts_hit / lookups:.1%} of {lookups} expert look-ups" if lookups else "no expert look-ups"
    paged = f"{format_bytes(usage.bytes_from_disk)} from disk, {format_bytes(usage.bytes_from_host)} from host memory"
    return [
        f"{usage.mode}: {pool_text(usage.pool)}{f', codeword {usage.codeword}' if usage.codeword else ''}",
        *([drift_text(usage.drift)] if usage.drift else []),
        f"hit {hits}; paged {paged}; stalled {usage.stall_s * 1000:.0f} ms",
        f"{usage.prompt_tokens} + {usage.completion_tokens} tokens ({usage.finish_reason}) in {elapsed_s:.2f} s, "
        f"first after {usage.time_to_first_token_s * 1000:.0f} ms",
    ]


def pool_text(pool: ExpertPool | None) -> str:
    if pool is None:
        return "all experts"
    mass = "" if pool.covered_mass is None else f", {pool.covered_mass:.1%} of the gate's mass"
    return f"{pool.num_experts} experts in pool {pool.digest}{mass}"


def drift_text(drift: DriftReport) -> str:
    parts = [f"drift: at most {drift.peak_mass:.1%} of the gate's mass outside of the pool"]
    if drift.widenings:
        times = "once" if drift.widenings == 1 else f"{drift.widenings} times"
        parts.append(f"widened {times} by {drift.experts_added} experts in all")
    if drift.experts_left_out:
        parts.append(f"{drift.experts_left_out} experts left out, for which there are no slots")
    if drift.exact_from is not None:
        parts.append(f"all experts from token {drift.exact_from} on")
    return "; ".join(parts)


def _drift_dict(drift: DriftReport) -> dict[str, Any]:
    return {
        "peak_mass": drift.peak_mass,
        "widenings": drift.widenings,
        "experts_added": drift.experts_added,
        "exact_from": drift.exact_from,
        "experts_left_out": drift.experts_left_out,
    }
