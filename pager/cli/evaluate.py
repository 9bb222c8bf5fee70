"""`expert-pager eval` and `expert-pager clusters`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pager.cli.options import AsJson, Device, Dtype, ExpertMemory, ModelPath
from pager.cli.output import busy, err, eval_extra, out, print_json, print_table
from pager.errors import InvalidRequest, PagerError
from pager.memory.machine import resolve_device
from pager.memory.units import format_bytes

if TYPE_CHECKING:
    from pager.lab.corpus import Document
    from pager.lab.report import Evaluation, Figures
    from pager.lab.run import Ask
    from pager.lab.traces import TracedDocument
    from pager.types import RoutingFacts

EvalDocuments = Annotated[
    list[str],
    typer.Option(
        help="JSON lines with a text each, a file a domain (its name up to the first dot), .gz or not; a quoted "
        "pattern, or several.",
        metavar="GLOB",
    ),
]
Calibration = Annotated[
    list[str],
    typer.Option(help="Other documents of the same domains, for the methods that choose from such.", metavar="GLOB"),
]


def evaluate(
    model: ModelPath,
    documents: EvalDocuments,
    calibration: Calibration = [],  # noqa: B006 - typer reads it
    methods: Annotated[str | None, typer.Option(help="Names with commas between. Default: all there are.")] = None,
    sizes: Annotated[
        str, typer.Option(help="Percent of a layer's experts, shared ones included.")
    ] = "100,50,25,12.5,6.25",
    prompt_tokens: Annotated[int, typer.Option(help="Tokens that the pool is chosen from.", min=1)] = 64,
    context_tokens: Annotated[int, typer.Option(help="EvalDocuments are cut here.", min=2)] = 512,
    max_documents: Annotated[int | None, typer.Option(help="Of each domain. Default: all.", min=1)] = None,
    calibration_documents: Annotated[int, typer.Option(help="Of each domain.", min=1)] = 160,
    out_folder: Annotated[
        Path | None, typer.Option("--out", help="Folder for JSON, Markdown and plots; goes on where it was stopped.")
    ] = None,
    expert_memory: ExpertMemory = None,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.", metavar="NAME")] = "float32",
    seed: Annotated[int, typer.Option(help="Draws documents, resamples and random pools.", min=0)] = 0,
    resamples: Annotated[int, typer.Option(help="Of the documents, for the intervals.", min=10)] = 1000,
    as_json: AsJson = False,
) -> None:
    """Measure what a pool chosen from a prompt costs: loss and agreement with the full model on what comes after.

    Runs on any checkpoint that can be paged; experts that do not fit into memory are paged. Intervals are bootstrapped
    over documents.

    Examples:

    `expert-pager eval ./model --documents 'corpus/*.valid.jsonl.gz' --out report`

    `expert-pager eval ./model --documents 'mine/*.jsonl' --methods prefill,trunk --sizes 25,12.5 --max-documents 20`
    """
    with eval_extra("eval"), busy("loading"):
        import matplotlib as _  # noqa: F401 - so that a missing one is said before the work, not after

        from pager.lab.corpus import Cut
        from pager.lab.run import Ask

    ask = Ask(
        model,
        tuple(documents),
        tuple(calibration),
        tuple(name.strip() for name in methods.split(",")) if methods else None,
        parse_sizes(sizes),
        Cut(prompt_tokens, context_tokens),
        max_documents,
        calibration_documents,
        expert_memory,
        resolve_device(device),
        dtype,
        seed,
        resamples,
    )
    _run(ask, out_folder, as_json)


def parse_sizes(text: str) -> tuple[float, ...]:
    """Raises InvalidRequest."""
    try:
        percents = tuple(float(part) for part in text.replace("%", "").split(","))
    except ValueError:
        percents = ()
    if not percents or not all(0 < percent <= 100 for percent in percents):
        raise InvalidRequest(f"--sizes {text!r} is not a list of percentages above 0 and up to 100, like 25,12.5")
    return percents


def _run(ask: Ask, folder: Path | None, as_json: bool) -> None:
    from pager.lab.report import to_dict
    from pager.lab.run import evaluate, write_report
    from pager.tokenizing import read_tokenizer

    tokenizer = read_tokenizer(ask.model)
    if tokenizer is None:
        raise InvalidRequest(f"{ask.model} has no tokenizer.json, which its documents need to become tokens")
    finished = 0

    def done(name: str, total: int) -> None:
        nonlocal finished
        finished += 1
        err.print(f"{finished}/{total} {name}", markup=False)

    with tempfile.TemporaryDirectory() as scratch:
        evaluation = evaluate(ask, tokenizer, (folder or Path(scratch)) / "cells", done=done)
    written = write_report(evaluation, folder) if folder is not None else []
    if as_json:
        print_json(to_dict(evaluation))
        return
    _print(evaluation)
    for path in written:
        out.print(str(path), markup=False)


def _print(evaluation: Evaluation) -> None:
    def row(figures: Figures) -> tuple[str, ...]:
        rise = figures.rise
        return (
            f"{figures.method} {figures.percent:g} %",
            f"{figures.loss.mean:.3f}",
            f"{rise.mean:.3f} ({rise.low:.3f} to {rise.high:.3f})",
            f"{figures.agreement.mean:.1%}",
            format_bytes(round(figures.bytes_resident)),
            format_bytes(round(figures.bytes_paged)),
        )

    print_table(
        f"{evaluation.name}: after prompts of {evaluation.subject.cut.prompt_tokens} tokens",
        ("method", "loss", "rise (95 %)", "agrees", "resident", "paged a document"),
        [row(figures) for figures in (evaluation.full, *evaluation.figures)],
    )
    for (method, percent), why in evaluation.grid.left_out.items():
        err.print(f"left out {method} at {percent:g} %: {why}", markup=False)


Documents = Annotated[
    list[str],
    typer.Option(
        help="JSON lines, a file a domain (its name up to the first dot), .gz or not; a quoted pattern, or several.",
        metavar="GLOB",
    ),
]
Compare = Annotated[
    Path | None, typer.Option(help="A second checkpoint, shown beside the first.", metavar="MODEL", show_default=False)
]


def clusters(
    model: ModelPath,
    documents: Documents,
    compare: Compare = None,
    out_file: Annotated[Path, typer.Option("--out", help="The page to write.", metavar="FILE")] = Path("clusters.html"),
    num_clusters: Annotated[int, typer.Option("--clusters", help="Groups of tokens.", min=2, max=128)] = 32,
    max_documents: Annotated[int, typer.Option(help="Documents of each domain.", min=1)] = 8,
    max_tokens: Annotated[int, typer.Option(help="Tokens of each document, from its start.", min=1)] = 256,
    seed: Annotated[int, typer.Option(help="Draws the documents and starts the clustering.", min=0)] = 0,
    expert_memory: ExpertMemory = None,
    device: Device = "auto",
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Group the tokens of documents by how they are routed, and write one HTML page to explore them.

    The page needs nothing but itself. It shows clusters with their tokens in context, documents coloured by cluster,
    and which experts each domain uses. Experts that do not fit into memory are paged.

    Examples:

    `expert-pager clusters ./model --documents 'corpus/*.valid.jsonl.gz'`

    `expert-pager clusters ./emo --compare ./stdmoe --documents 'corpus/*.jsonl' --max-documents 20 --out page.html`
    """
    with eval_extra("clusters"), busy("loading"):
        from pager.lab.cluster_page import build_page, make_report, summary
        from pager.lab.corpus import sample_documents

    if not out_file.parent.is_dir():
        raise InvalidRequest(f"{out_file.parent} is not a directory; make it, or choose another --out")
    sampled = sample_documents(documents, max_documents, seed)
    reports = []
    for path in [model] if compare is None else [model, compare]:
        with busy(f"running {len(sampled)} documents through {path.name}"):
            facts, traced = _trace(path, sampled, max_tokens, expert_memory, resolve_device(device), dtype)
        with busy(f"grouping the tokens of {path.name}"):
            reports.append(make_report(path.resolve().name, facts, traced, num_clusters, seed))
    page = build_page(reports, seed, max_tokens)
    try:
        out_file.write_text(page, encoding="utf-8")
    except OSError as error:
        raise PagerError(f"{out_file} cannot be written: {error.strerror}") from None
    if as_json:
        print_json({"page": str(out_file), "models": [summary(report) for report in reports]})
        return
    for report in reports:
        out.print(
            f"{report.name}: {report.num_tokens} tokens, {report.domain_share:.0%} of them in the main domain of their "
            f"cluster, {report.word_share:.0%} among its ten commonest tokens",
            markup=False,
        )
    out.print(f"{out_file}: {format_bytes(len(page.encode()))}, open it in a browser", markup=False)


def _trace(
    path: Path, documents: list[Document], max_tokens: int, expert_memory: str | None, device: str, dtype: str | None
) -> tuple[RoutingFacts, list[TracedDocument]]:
    from pager.engine.paged_model import load_paged_model
    from pager.lab.traces import GateTracer
    from pager.memory.plan import Budgets
    from pager.tokenizing import read_tokenizer

    tokenizer = read_tokenizer(path)
    if tokenizer is None:
        raise InvalidRequest(f"{path} has no tokenizer.json, which its documents need to become tokens")
    paged = load_paged_model(path, device=device, dtype=dtype, budgets=Budgets(expert_memory=expert_memory))
    try:
        tracer = GateTracer(paged, tokenizer)
        return paged.facts, [tracer.trace(document, max_tokens) for document in documents]
    finally:
        paged.close()
