"""The commands on a checkpoint's files: `expert-pager inspect`, `pack`, `verify` and `slice`."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pager.cli.options import (
    AsJson,
    Device,
    Dtype,
    ExpertMemory,
    HostMemory,
    KvMemory,
    ModelPath,
    bundled,
    busy,
    bytes_progress,
    err,
    out,
    print_facts,
    print_json,
    print_table,
)
from pager.cli.pools import PoolsFolder, ServerOptions, checked_tenant, find_named
from pager.errors import ConfigError, InvalidRequest, PoolTooSmall, UnknownPool, UnsupportedModel
from pager.memory import Budgets, Machine, Needs, Plan, describe, format_bytes, resolve_device
from pager.memory import plan as make_plan
from pager.reading import read_json_file, reason_of, shown

if TYPE_CHECKING:
    import torch

    from pager.models.open_model import OpenModel
    from pager.pools.slices import Slice
    from pager.store.pack_format import RecordFormat
    from pager.store.safetensors import OddItem
    from pager.types import ExpertPool, NamedPool


MOST_WARNINGS = 10
TESTED = frozenset(
    {
        "afmoe", "aria_text", "axk1", "axk2", "bailing_hybrid", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3",
        "deepseek_v32", "deepseek_v4", "dots1", "dots3_note_text", "emo", "ernie4_5_moe", "exaone_moe", "flex_olmo",
        "flint", "gemma4_text", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "gpt_oss", "granitemoe", "granitemoe_swa",
        "granitemoehybrid", "granitemoeshared", "hunyuan_v1_moe", "hy_v3", "hy_v4", "inkling2_text", "inkling_text",
        "jamba", "kimi_linear", "kolibri1", "laguna", "lfm2_moe", "mellum", "mimo_v2_flash", "minimax", "minimax_m2",
        "minimax_m3_vl_text", "mixtral", "nemotron_h", "olmoe", "phimoe", "qwen2_moe", "qwen3_5_moe_text", "qwen3_moe",
        "qwen3_next", "qwen4_exp_text", "solar_open", "zaya",
    }
)  # fmt: skip
"""Families whose small random models are tested against plain transformers, as docs/families.md says."""
ONLY_EXACT = frozenset({"deepseek_v4", "inkling_text", "zaya"})
"""Those of them whose gates no mask restricts."""
POOL_SIZES = ("12.5%", "25%", "50%", "full")


def inspect(
    model: ModelPath,
    expert_memory: ExpertMemory = None,
    host_memory: HostMemory = None,
    kv_memory: KvMemory = None,
    max_running: Annotated[int, typer.Option(help="Requests that may run at once.", min=1)] = 32,
    device: Device = "auto",
    dtype: Dtype = None,
    plan: Annotated[bool, typer.Option("--plan", help="Show the plan for this machine even without a budget.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what a checkpoint holds and what a memory budget would buy. Reads headers only, no weights.

    Examples:

    `expert-pager inspect ./model`

    `expert-pager inspect ./model --expert-memory 25%`

    `expert-pager inspect ./model --expert-memory 8GiB --dtype auto --device cuda --json`
    """
    from pager.engine.paged_model import needs_of
    from pager.models.open_model import OpenModel

    resolved = resolve_device(device)
    found = OpenModel.open(model, dtype, device=resolved)
    with found.checkpoint:
        found.check()
        if found.record is not None:
            found.record.check_machine(resolved, found.dtype)
        needs = needs_of(found, resolved)
        facts = _facts_of(found, needs)
    made = None
    if plan or any(budget is not None for budget in (expert_memory, host_memory, kv_memory)):
        budgets = Budgets(expert_memory, host_memory, kv_memory, max_running)
        made = make_plan(needs, budgets, Machine.detect(resolved))
    pools = _pools(needs, made)
    if as_json:
        print_json({**facts, "pools": pools, "plan": made.to_dict() if made else None})
        return
    print_facts(_lines(facts))
    out.print()
    _print_pools(pools, made)
    if made:
        out.print()
        out.print("plan", style="bold")
        for line in describe(made):
            out.print(line, markup=False)


def _facts_of(found: OpenModel, needs: Needs) -> dict[str, Any]:
    facts, checkpoint = found.facts, found.checkpoint
    pack_bytes = checkpoint.pack.extents_nbytes if checkpoint.pack else 0
    return {
        "path": str(checkpoint.path),
        "family": found.family.model_type,
        "layout": found.layout_name,
        "format": _format_of(found, making_us := round(1e6 * found.seconds_to_make())),
        "decoding_us_per_expert": making_us,
        "runs": (runs := _ways_to_run(found)),
        "tested": _tests_of(found, runs["service"]),
        "packed": checkpoint.is_packed,
        "checksums": all(spec.checksum for spec in checkpoint.specs.values()),
        "fingerprint": checkpoint.fingerprint,
        "stored_dtypes": sorted({str(spec.dtype).removeprefix("torch.") for spec in checkpoint.specs.values()}),
        "stored_bytes": sum(checkpoint.file_nbytes.values()) + pack_bytes,
        "serving_dtype": str(found.dtype).removeprefix("torch."),
        "layers": facts.num_layers,
        "dense_layers": sum(count == 0 for count in facts.experts_per_layer),
        "experts_per_layer": list(facts.experts_per_layer),
        "shared_per_layer": list(facts.shared_per_layer),
        "top_k_per_layer": list(facts.top_k_per_layer),
        "context_tokens": needs.context_tokens,
        "trunk_bytes": needs.trunk_bytes,
        "expert_bytes": needs.expert_bytes,
        "resident_bytes": needs.resident_bytes,
        "routed_experts": needs.num_routed,
        "routed_bytes": needs.routed_bytes,
        "kv_bytes_per_token": needs.kv_bytes_per_token,
        "state_bytes_per_answer": needs.state_bytes,
        "smallest_expert_memory": needs.smallest_num_slots * needs.expert_bytes,
    }


def _format_of(found: OpenModel, making_us: int) -> str:
    """Describes what is read for an expert, what decoding that costs, and what a slot holds."""
    from pager.models.formats import quantisation_of

    source = found.open_experts()
    source.close()
    held = str(found.dtype).removeprefix("torch.")
    if found.record is not None:
        held_s, plain_s = found.seconds_of_a_row()
        return (
            f"{found.record}; held as stored (a token takes {1e3 * held_s:.2f} ms in an expert here, in {held} "
            f"{1e3 * plain_s:.2f})"
        )
    if found.quantised is not None and not found.checkpoint.is_packed:
        read = format_bytes(source.stored_bytes)
        decoded = f"decoded when it enters a slot ({making_us} µs here)" if making_us else "converted on its way"
        return f"{found.quantised.words}; an expert is read as {read}, {decoded} and held as {held}"
    stored = str(source.stored_dtype).removeprefix("torch.")
    method = quantisation_of(found.checkpoint).get("quant_method")
    said = f"; its config calls it quantised by {shown(method)}, which its weights are not" if method else ""
    return f"{stored}, {'held as stored' if stored == held else f'converted to {held} on its way into a slot'}{said}"


def _ways_to_run(found: OpenModel) -> dict[str, str]:
    """Returns for each way to run the model "yes", or why not."""
    from pager.engine.attention import check_served

    gates_are_known = found.family.gates_are_known
    service = "yes" if gates_are_known else "yes, without predictions: its gates pick in an unknown way"
    try:
        check_served(found)
    except UnsupportedModel as error:
        service = error.message
    pools = found.family.unpoolable or "yes"
    if found.family.model_type in ONLY_EXACT:
        pools = "no: no mask restricts its gates, as tests of its family show"
    elif not gates_are_known:
        pools = "yes, by a mask on its gates, which is tried when it is loaded"
        if found.family.model_type not in TESTED:
            pools = "its gates pick in an unknown way; whether a pool can restrict them is tried when it is loaded"
    return {"exact": "yes", "pools": pools, "service": service}


def _tests_of(found: OpenModel, service: str) -> str:
    if found.family.model_type not in TESTED:
        return "no: this family is not among those that were tried; logits should equal those of plain transformers"
    served = "; in the service the same, alone and among others" if service.startswith("yes") else ""
    return (
        "small random models of this family against plain transformers, in float32: logits within 1e-4 at any budget, "
        f"the same greedy tokens{served}"
    )


def _lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    checked = "packed, with checksums" if facts["packed"] else "as downloaded"
    if facts["checksums"] and not facts["packed"]:
        checked += ", checksums recorded"
    dense = f", {facts['dense_layers']} of them dense" if facts["dense_layers"] else ""
    experts = f"{_range(facts['experts_per_layer'])} a layer, {_range(facts['shared_per_layer'])} of them shared"
    state_bytes = facts["state_bytes_per_answer"]
    states = f"; {format_bytes(state_bytes)} of states for each answer in flight" if state_bytes else ""
    return [
        ("model", f"{facts['path']} ({facts['family']}, {checked})"),
        (
            "weights",
            f"{format_bytes(facts['stored_bytes'])} on disk as {', '.join(facts['stored_dtypes'])}; "
            f"served as {facts['serving_dtype']}",
        ),
        ("layout", facts["layout"]),
        ("format", facts["format"]),
        *((name, facts["runs"][name]) for name in ("exact", "pools", "service")),
        ("tested", facts["tested"]),
        ("fingerprint", facts["fingerprint"]),
        ("layers", f"{facts['layers']}{dense}"),
        ("experts", f"{experts}; a token picks {_range(facts['top_k_per_layer'])} routed ones"),
        (
            "context",
            f"{facts['context_tokens']} tokens, {format_bytes(facts['kv_bytes_per_token'])} of KV each{states}",
        ),
        ("trunk", f"{format_bytes(facts['trunk_bytes'])}, always in memory"),
        ("shared", f"{format_bytes(facts['resident_bytes'])}, always in memory"),
        (
            "routed",
            f"{format_bytes(facts['routed_bytes'])} in {facts['routed_experts']} experts of "
            f"{format_bytes(facts['expert_bytes'])}",
        ),
        ("smallest", f"--expert-memory {facts['smallest_expert_memory']} runs one token"),
    ]


def _range(counts: list[int]) -> str:
    """Formats a count of experts: '32', or '8 to 32' where layers differ; dense layers do not count."""
    sparse = [count for count in counts if count] or [0]
    return str(sparse[0]) if min(sparse) == max(sparse) else f"{min(sparse)} to {max(sparse)}"


def _pools(needs: Needs, made: Plan | None) -> list[dict[str, Any]]:
    from pager.pools.pick import largest_counts, parse_pool_size

    rows = []
    for size in POOL_SIZES:
        try:
            counts = largest_counts(parse_pool_size(size), needs.facts)
        except PoolTooSmall:
            continue
        slots = sum(counts)
        row = {"size": size, "routed_per_layer": list(counts), "slots": slots, "bytes": slots * needs.expert_bytes}
        if made:
            row["fit_at_once"] = made.num_slots // slots if slots else None
        rows.append(row)
    return rows


def _print_pools(pools: list[dict[str, Any]], made: Plan | None) -> None:
    columns = ["pool", "routed a layer", "slots", "memory"] + (["disjoint ones that fit"] if made else [])
    rows = []
    for pool in pools:
        row = [pool["size"], _range(pool["routed_per_layer"]), str(pool["slots"]), format_bytes(pool["bytes"])]
        rows.append(row + ([str(pool["fit_at_once"])] if made else []))
    print_table("pools", columns, rows)


def pack(
    model: ModelPath,
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder to create; must not exist.")],
    dtype: Annotated[
        str | None,
        typer.Option(help="Store in float32, bfloat16 or float16. Default: as stored.", metavar="NAME"),
    ] = None,
    experts: Annotated[
        str | None,
        typer.Option(help="Quantise the experts: int8 or fp8, half of bfloat16, or int4, a third.", metavar="KIND"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Rewrite a checkpoint so that an expert is one read.

    Every expert becomes one contiguous, aligned, checksummed extent. The folder appears whole or not at all, and can be
    used wherever the original can. What `expert-pager fit-router` left beside the original goes along.

    Slots hold quantised experts as they are stored, so that a budget holds more of them, and a CPU multiplies with them
    as they are; the trunk is not quantised. int8 and int4 can be served in the dtype that they are packed for only.

    Examples:

    `expert-pager pack ./Emo_1b14b_1T ./emo-packed --dtype bfloat16`

    `expert-pager pack ./Emo_1b14b_1T ./emo-int4 --experts int4`
    """
    from pager.models.open_model import DTYPES, OpenModel
    from pager.predict.fitted import PREDICTOR_NAME, PredictorFile
    from pager.store.pack_format import RecordFormat

    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    chosen = DTYPES[dtype] if dtype else None
    source = OpenModel.open(model, dtype or "auto")
    with source.checkpoint as checkpoint:
        # Read first, so that a file of another model is refused before the work begins.
        router = PredictorFile.load(model, checkpoint.fingerprint) if (model / PREDICTOR_NAME).is_file() else None
        odd = _write_pack(source, output, RecordFormat.of(experts, source.dtype) if experts else chosen)
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


def _write_pack(source: OpenModel, output: Path, form: torch.dtype | RecordFormat | None) -> tuple[OddItem, ...]:
    """Packs an open checkpoint, and returns what is odd about its values."""
    from pager.store.pack import pack as write_pack

    with bytes_progress("packing") as progress:
        return write_pack(
            source.checkpoint.path,
            output,
            pieces=source.pieces,
            experts_per_layer=source.facts.experts_per_layer,
            shape=source.family.shape,
            dtype=form,
            quantised=source.quantised_names,
            progress=progress,
        )


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
    from pager.store.pack import record as record_checksums
    from pager.store.pack import verify as verify_checksums

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
    """Prints warnings about matrices that a checksum cannot detect: bytes that were never written have one too."""
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


# --- slice ------------------------------------------------------------------------------------------------------------


MAX_EXPERTS_FILE_BYTES = 1 << 24


@dataclass(frozen=True, kw_only=True)
class ChoiceOptions:
    """The options that say which experts a slice keeps."""

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
    codeword: Annotated[
        str | None,
        typer.Option(help="The experts of a codeword of the codebook that `fit-router` made.", metavar="NAME"),
    ] = None
    size: Annotated[
        str | None,
        typer.Option(
            help="With --examples and --codeword: experts a layer (32), or a share of all ('12.5%').", metavar="SIZE"
        ),
    ] = None
    method: Annotated[
        str | None, typer.Option(help="With --examples: how they choose, as in `calibrate`.", metavar="METHOD")
    ] = None

    def check(self) -> None:
        """Raises typer.BadParameter unless the experts are given once, and for options that would have no effect."""
        given = {"--pool": self.pool, "--examples": self.examples, "--experts-file": self.experts_file}
        given["--codeword"] = self.codeword
        if sum(value is not None for value in given.values()) != 1:
            raise typer.BadParameter(f"say exactly once which experts to keep: {', '.join(given)}")
        if (self.examples is None and self.codeword is None) != (self.size is None):
            raise typer.BadParameter("--examples and --codeword need --size, and nothing else takes it")
        if self.method is not None and self.examples is None:
            raise typer.BadParameter("--method would have no effect here; it goes with --examples")

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
        typer.Option(
            help="Store the experts as bf16, or packed as int8, fp8 or int4. Default: as they are in MODEL.",
            metavar="NAME",
        ),
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
    in OUT says what was kept, of which model, and what chose it. OUT appears whole or not at all. With experts in 8 or
    4 bits it is packed (`pack --experts`): expert-pager runs it, and it is neither trained nor merged.

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
            raise typer.BadParameter("--server would have no effect here; it goes with --pool")
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
    from pager.models.open_model import OpenModel
    from pager.pools.slices import check_can_be_cut
    from pager.store.appearing import check_absent
    from pager.store.pack_format import KINDS

    check_absent(output)
    if experts not in (None, "bf16", *KINDS):
        kinds = ", ".join(("bf16", *KINDS))
        raise ConfigError(f"--experts is one of {kinds}, or left out to store them as they are, not {experts!r}")
    opened = OpenModel.open(model)
    with opened.checkpoint:
        check_can_be_cut(opened)  # before anything is chosen, which may take long
        if experts == "bf16" and opened.quantised is not None:
            raise ConfigError(
                f"the experts of {model} are quantised ({opened.quantised.words}); leave --experts out to keep them so"
            )
        pool, chosen_by = _chosen(opened, choice, where)
        made = (_cut_packed if experts in KINDS else _cut_plain)(opened, pool, output, chosen_by, experts)
    if as_json:
        facts = {"fingerprint": made.record.fingerprint, "chosen_by": chosen_by, "experts": made.record.experts}
        print_json({"path": str(output), "num_experts": made.num_experts, "bytes": made.nbytes, **facts})
        return
    total = made.num_experts + made.num_left_out
    out.print(f"{output}: {made.num_experts} of {total} experts, {format_bytes(made.nbytes)}", markup=False)
    out.print(f"chosen by {chosen_by}", markup=False)


def _cut_plain(opened: OpenModel, pool: ExpertPool, output: Path, chosen_by: str, experts: str | None) -> Slice:
    import torch

    from pager.pools.slices import cut

    dtype = torch.bfloat16 if experts == "bf16" else None
    packed_as = None if experts == "bf16" else experts
    with bytes_progress("slicing") as progress:
        return cut(
            opened, pool, output, chosen_by=chosen_by, expert_dtype=dtype, packed_as=packed_as, progress=progress
        )


def _cut_packed(opened: OpenModel, pool: ExpertPool, output: Path, chosen_by: str, experts: str | None) -> Slice:
    """Cuts a slice beside `output` and packs it into that."""
    from pager.models.open_model import OpenModel
    from pager.store.pack_format import RecordFormat

    assert experts is not None, "it is one of KINDS"
    with tempfile.TemporaryDirectory(dir=output.absolute().parent, prefix=f".{output.name}-") as beside:
        made = _cut_plain(opened, pool, Path(beside) / output.name, chosen_by, experts)
        part = OpenModel.open(Path(beside) / output.name, "auto")
        with part.checkpoint:
            _warn_of(_write_pack(part, output, RecordFormat.of(experts, part.dtype)))
    return replace(made, nbytes=sum(path.stat().st_size for path in output.iterdir()))


def _chosen(
    opened: OpenModel, choice: ChoiceOptions, where: tuple[ServerOptions, Path | None]
) -> tuple[ExpertPool, str]:
    """Returns the experts to keep, and a text that says what chose them."""
    from pager.pools.pick import pool_for

    if choice.experts_file is not None:
        return _of_file(choice.experts_file), f"a list of experts, {choice.experts_file.name}"
    if choice.codeword is not None:
        return _of_codeword(opened, choice.codeword, choice.size), f"the codeword {choice.codeword!r} of its codebook"
    if choice.pool is not None:
        named = _find(choice.pool, *where)
        how = f"the named pool {named.name!r}, {_how(named)}"
    else:
        assert choice.examples is not None
        named = _calibrated(opened.checkpoint.path, choice.examples, choice)
        how = f"{_how(named)}, {choice.examples.name}"
    return pool_for(named, opened.checkpoint.fingerprint, opened.facts), how


def _of_codeword(opened: OpenModel, name: str, size: str | None) -> ExpertPool:
    from pager.pools.pick import parse_pool_size
    from pager.predict.fitted import PREDICTOR_NAME, Codebook, PredictorFile

    path, codebook = opened.checkpoint.path, None
    if (path / PREDICTOR_NAME).is_file():
        codebook = Codebook.of(PredictorFile.load(path, opened.checkpoint.fingerprint), opened.facts)
    if codebook is None:
        raise ConfigError(f"{path} has no codebook; make one with `expert-pager fit-router {path} --documents FILE`")
    if name not in codebook.names:
        raise InvalidRequest(f"{name[:60]!r} is no codeword of {path}; it has {', '.join(codebook.names)}")
    return codebook.pool(name, parse_pool_size(size))


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
    from pager.memory import Budgets, resolve_device
    from pager.pools.pick import parse_pool_size
    from pager.types import Full

    size, texts = parse_pool_size(choice.size), read_examples(examples)
    if isinstance(size, Full):
        raise InvalidRequest("a slice of all experts is the model itself; give a --size below `full`")
    with busy("choosing experts"):
        return Local(model, resolve_device("auto"), None).calibrate("slice", texts, size, choice.method, (), Budgets())


def _of_file(path: Path) -> ExpertPool:
    """Returns the pool that a file lists, whose experts the model may lack. Raises InvalidRequest."""
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
            f"warning: {len(merged.others)} tensors that every prompt uses differ too, first {merged.others[0]}; "
            "train the experts alone if nothing else may change",
            markup=False,
        )
