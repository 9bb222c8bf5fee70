"""`expert-pager pack` and `expert-pager verify`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pager.cli.options import AsJson, ModelPath
from pager.cli.output import bytes_progress, err, out, print_json
from pager.errors import ConfigError
from pager.memory.units import format_bytes

if TYPE_CHECKING:
    from pager.store.values import OddItem

MOST_WARNINGS = 10


def pack(
    model: ModelPath,
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder to create; must not exist.")],
    dtype: Annotated[
        str | None,
        typer.Option(help="Store in float32, bfloat16 or float16. Default: as stored.", metavar="NAME"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Rewrite a checkpoint so that an expert is one read.

    Every expert becomes one contiguous, aligned, checksummed extent. The folder appears whole or not at all, and can be
    used wherever the original can. What `expert-pager fit-router` left beside the original goes along.

    Example: `expert-pager pack ./Emo_1b14b_1T ./emo-packed --dtype bfloat16`
    """
    from pager.models.open_model import DTYPES, OpenModel
    from pager.predict.fitted import PREDICTOR_NAME, PredictorFile
    from pager.store.pack import pack as write_pack

    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    source = OpenModel.open(model)
    with source.checkpoint as checkpoint, bytes_progress("packing") as progress:
        # Read first, so that another model's is refused before the work begins.
        router = PredictorFile.load(model, checkpoint.fingerprint) if (model / PREDICTOR_NAME).is_file() else None
        odd = write_pack(
            model,
            output,
            names=source.family.expert_names,
            experts_per_layer=source.facts.experts_per_layer,
            shape=source.family.expert_shape(source.config),
            dtype=DTYPES[dtype] if dtype else None,
            progress=progress,
        )
    if router is not None:  # the same weights under another fingerprint
        with OpenModel.open(output).checkpoint as packed:
            replace(router, fingerprint=packed.fingerprint).save(output / PREDICTOR_NAME)
    num_experts = sum(source.facts.experts_per_layer)
    nbytes = sum(path.stat().st_size for path in output.iterdir())
    _warn_of(odd)
    if as_json:
        print_json({"path": str(output), "num_experts": num_experts, "bytes": nbytes, "odd": _odd_dicts(odd)})
    else:
        out.print(f"packed {num_experts} experts into {output} ({format_bytes(nbytes)})", markup=False)


def verify(
    model: ModelPath,
    record: Annotated[
        bool, typer.Option("--record", help="Write the checksums of a plain checkpoint that you trust.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check every byte of a checkpoint against its checksum.

    A packed checkpoint carries its checksums. For a plain one, `--record` writes them once into `checksums.json` beside
    it; from then on they are checked here, and whenever a weight is read. Exit status 1 when anything is damaged.
    Matrices that hold one value only, or values that are no numbers, are a warning: zeros have a checksum as well.

    Example: `expert-pager verify --record ./model && expert-pager verify ./model`
    """
    from pager.store.verify import record as record_checksums
    from pager.store.verify import verify as verify_checksums

    if record:
        with bytes_progress("recording") as progress:
            recorded = record_checksums(model, progress)
        num_tensors = len(recorded.manifest.tensor_checksums)
        _warn_of(recorded.odd)
        if as_json:
            print_json({"path": str(model), "recorded": num_tensors, "odd": _odd_dicts(recorded.odd)})
        else:
            out.print(f"recorded the checksums of {num_tensors} tensors in {model}", markup=False)
        return
    with bytes_progress("verifying") as progress:
        report = verify_checksums(model, progress)
    _warn_of(report.odd)
    if as_json:
        bad = [
            {"name": item.name, "file": item.file, "offset": item.offset, "reason": item.reason} for item in report.bad
        ]
        print_json(
            {
                "path": str(report.path), "ok": report.ok, "packed": report.packed, "checked": report.num_checked,
                "bytes": report.nbytes_checked, "bad": bad, "odd": _odd_dicts(report.odd),
            }
        )  # fmt: skip
    else:
        for item in report.bad:
            err.print(f"bad: {item.name} at byte {item.offset} of {item.file}: {item.reason}", markup=False)
        verdict = "all sound" if report.ok else f"{len(report.bad)} damaged; fetch or pack it again"
        checked = f"{report.num_checked} items, {format_bytes(report.nbytes_checked)}"
        (out if report.ok else err).print(f"checked {checked}: {verdict}", markup=False)
    if not report.ok:
        raise typer.Exit(1)


def _warn_of(odd: Sequence[OddItem]) -> None:
    """A checksum says nothing of it: bytes that were never written have one too."""
    for item in odd[:MOST_WARNINGS]:
        err.print(f"warning: {item.name} in {item.file}: {item.reason}", markup=False)
    if len(odd) > MOST_WARNINGS:
        err.print(f"warning: {len(odd) - MOST_WARNINGS} more like these; --json lists them all", markup=False)
    if odd:
        err.print(
            "warning: no trained weights are like this; fetch the files again, or record what you trust", markup=False
        )


def _odd_dicts(odd: Sequence[OddItem]) -> list[dict[str, str]]:
    return [{"name": item.name, "file": item.file, "reason": item.reason} for item in odd]
