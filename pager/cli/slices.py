"""`expert-pager slice`: the experts of one pool as a checkpoint of their own, and back into the whole."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pager.cli.options import AsJson, bundled
from pager.cli.output import busy, bytes_progress, err, out, print_json
from pager.cli.place import PoolsFolder, ServerOptions, checked_tenant, find_named
from pager.errors import ConfigError, InvalidRequest, UnknownPool
from pager.memory.units import format_bytes
from pager.reading import read_json_file, reason_of

if TYPE_CHECKING:
    from pager.models.open_model import OpenModel
    from pager.types import ExpertPool, NamedPool

MAX_EXPERTS_FILE_BYTES = 1 << 24


@dataclass(frozen=True, kw_only=True)
class ChoiceOptions:
    """The ways to say which experts a slice keeps."""

    pool: Annotated[
        str | None,
        typer.Option(help="The experts of a named pool: of --pools, REDIS_URL or --server.", metavar="NAME"),
    ] = None
    examples: Annotated[
        Path | None,
        typer.Option(
            help='Experts chosen from one to a hundred examples: JSON lines with a "text" each, or one plain text.',
            metavar="FILE",
        ),
    ] = None
    experts_file: Annotated[
        Path | None,
        typer.Option(
            help="Routed experts by layer, as JSON: [[0, 3], [1, 2], ...], or what `calibrate --json` prints.",
            metavar="FILE",
        ),
    ] = None
    size: Annotated[
        str | None,
        typer.Option(
            help="With --examples: a number of experts a layer (32), or a share of all ('12.5%').", metavar="SIZE"
        ),
    ] = None
    method: Annotated[
        str | None, typer.Option(help="With --examples: how they choose, as in `calibrate`.", metavar="METHOD")
    ] = None

    def check(self) -> None:
        """Raises typer.BadParameter unless the experts are given once, and for options that can take no effect."""
        given = {"--pool": self.pool, "--examples": self.examples, "--experts-file": self.experts_file}
        if sum(value is not None for value in given.values()) != 1:
            raise typer.BadParameter(f"say once which experts to keep: {', '.join(given)}")
        if (self.examples is None) != (self.size is None):
            raise typer.BadParameter("--examples and --size go together")
        if self.method is not None and self.examples is None:
            raise typer.BadParameter("--method can take no effect here; it goes with --examples")

    def is_empty(self) -> bool:
        return self == ChoiceOptions()


@bundled
def slice_model(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="MODEL OUT", help="Checkpoint folder, and folder to create; with --merge OUT alone."),
    ],
    choice: ChoiceOptions,
    at: ServerOptions,
    pools: PoolsFolder = None,
    experts: Annotated[
        str | None,
        typer.Option(help="Store the experts as bf16. Default: as they are in MODEL.", metavar="NAME"),
    ] = None,
    merge: Annotated[
        Path | None, typer.Option("--merge", help="Put this slice, trained since, back.", metavar="SLICE")
    ] = None,
    into: Annotated[
        Path | None,
        typer.Option("--into", help="The model that it was cut from, of which OUT is a copy.", metavar="MODEL"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint that holds only the experts of one pool, or merge such a slice back.

    Gates lose the rows of the experts left out; shared experts and everything else stay. Plain transformers loads the
    slice (EMO after `import pager`) and gives the logits that MODEL gives within the pool; it can be trained. README.md
    in OUT says what was kept, of which model, and what chose it. OUT appears whole or not at all.

    A merge copies MODEL and puts what was trained in its place: all other experts stay the same to the bit.

    Examples:

    `expert-pager slice ./emo ./emo-law --examples contracts.jsonl --size 12.5%`

    `expert-pager slice ./emo ./emo-law --pool law --server localhost:50051 --experts bf16`

    `expert-pager slice --merge ./emo-law-trained --into ./emo ./emo-merged`
    """
    at.check()
    if merge is None and into is None:
        if len(paths) != 2:
            raise typer.BadParameter("give two folders: MODEL and OUT")
        choice.check()
        if at.server is not None and choice.pool is None:
            raise typer.BadParameter("--server can take no effect here; it goes with --pool")
        _cut(paths[0], paths[1], choice, (at, pools), experts, as_json)
        return
    if merge is None or into is None or len(paths) != 1:
        raise typer.BadParameter("a merge is `slice --merge SLICE --into MODEL OUT`")
    if not choice.is_empty() or experts is not None or at.server is not None:
        raise typer.BadParameter("a merge takes no other option than --merge, --into and --json")
    _merge(merge, into, paths[0], as_json)


def _cut(
    model: Path,
    output: Path,
    choice: ChoiceOptions,
    where: tuple[ServerOptions, Path | None],
    experts: str | None,
    as_json: bool,
) -> None:
    import torch

    from pager.models.open_model import OpenModel
    from pager.pools.slices import cut
    from pager.store.appearing import check_absent

    check_absent(output)
    if experts not in (None, "bf16"):
        raise ConfigError(f"--experts is bf16, or left out to store them as they are, not {experts!r}")
    opened = OpenModel.open(model)
    with opened.checkpoint:
        pool, chosen_by = _chosen(opened, choice, where)
        dtype = torch.bfloat16 if experts else None
        with bytes_progress("slicing") as progress:
            made = cut(opened, pool, output, chosen_by=chosen_by, expert_dtype=dtype, progress=progress)
    if as_json:
        facts = {"fingerprint": made.record.fingerprint, "chosen_by": chosen_by, "experts": made.record.experts}
        print_json({"path": str(output), "num_experts": made.num_experts, "bytes": made.nbytes, **facts})
        return
    total = made.num_experts + made.num_left_out
    out.print(f"{output}: {made.num_experts} of {total} experts, {format_bytes(made.nbytes)}", markup=False)
    out.print(f"chosen by {chosen_by}", markup=False)


def _chosen(
    opened: OpenModel, choice: ChoiceOptions, where: tuple[ServerOptions, Path | None]
) -> tuple[ExpertPool, str]:
    """The experts to keep, and what chose them in words."""
    from pager.pools.named import pool_for

    if choice.experts_file is not None:
        return _of_file(choice.experts_file), f"a list of experts, {choice.experts_file.name}"
    if choice.pool is not None:
        named = _find(choice.pool, *where)
        how = f"the named pool {named.name!r}, {_how(named)}"
    else:
        assert choice.examples is not None
        named = _calibrated(opened.checkpoint.path, choice.examples, choice)
        how = f"{_how(named)}, {choice.examples.name}"
    return pool_for(named, opened.checkpoint.fingerprint, opened.facts), how


def _how(named: NamedPool) -> str:
    examples = "1 example" if named.num_examples == 1 else f"{named.num_examples} examples"
    return f"method {named.method} over {examples} of {named.num_tokens} tokens"


def _find(name: str, at: ServerOptions, folder: Path | None) -> NamedPool:
    if at.server is None:
        return find_named(folder, checked_tenant(at.tenant), name)
    with at.service() as service:
        for named in service.list_pools().pools:
            if named.name == name:
                return named
    raise UnknownPool(f"tenant {at.tenant!r} has no pool {name!r} at {at.server}; see `expert-pager pools list`")


def _calibrated(model: Path, examples: Path, choice: ChoiceOptions) -> NamedPool:
    from pager.cli.local import Local
    from pager.lab.corpus import read_examples
    from pager.memory.machine import resolve_device
    from pager.memory.plan import Budgets
    from pager.pools.pick import parse_pool_size
    from pager.types import Full

    size, texts = parse_pool_size(choice.size), read_examples(examples)
    if isinstance(size, Full):
        raise InvalidRequest("a slice of all experts is the model itself; give a --size below `full`")
    with busy("choosing experts"):
        return Local(model, resolve_device("auto"), None).calibrate("slice", texts, size, choice.method, (), Budgets())


def _of_file(path: Path) -> ExpertPool:
    """The pool that a file lists. Raises InvalidRequest; whether the model has these experts is checked later."""
    from pager.types import ExpertPool

    try:
        value: Any = read_json_file(path, MAX_EXPERTS_FILE_BYTES)
    except (OSError, ValueError) as error:
        why = reason_of(error) if isinstance(error, OSError) else str(error)
        raise InvalidRequest(f"{path} cannot be read as a list of experts: {why}") from None
    for name in ("pool", "layers"):
        value = value.get(name) if isinstance(value, dict) and name in value else value
    if not isinstance(value, list) or not all(
        isinstance(layer, list) and all(type(expert) is int for expert in layer) for layer in value
    ):
        raise InvalidRequest(f"{path} is not a list with the experts of each layer, such as [[0, 3], [1, 2]]")
    return ExpertPool(tuple(tuple(sorted(layer)) for layer in value))


def _merge(part: Path, whole: Path, output: Path, as_json: bool) -> None:
    from pager.pools.slices import merge

    with bytes_progress("merging") as progress:
        merged = merge(part, whole, output, progress)
    if as_json:
        facts = {"experts": merged.num_experts, "gates": merged.num_gates, "others": merged.others}
        print_json({"path": str(output), "changed": facts})
        return
    out.print(f"{output}: {merged.num_experts} experts and {merged.num_gates} gates differ from {whole}", markup=False)
    if merged.others:
        err.print(
            f"warning: so do {len(merged.others)} tensors that every prompt uses, first {merged.others[0]}; train the "
            "experts alone if nothing else may change",
            markup=False,
        )
