"""`expert-pager clusters`: one HTML page that shows how a model, or two, route the tokens of documents."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pager.cli.extras import eval_extra
from pager.cli.options import AsJson, Device, Dtype, ExpertMemory, ModelPath
from pager.cli.output import busy, out, print_json
from pager.errors import InvalidRequest, PagerError
from pager.machine import resolve_device
from pager.units import format_bytes

if TYPE_CHECKING:
    from pager.evaluation.sampling import Document
    from pager.evaluation.traces import TracedDocument
    from pager.types import RoutingFacts

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
        from pager.evaluation.cluster_page import build_page
        from pager.evaluation.cluster_report import make_report, summary
        from pager.evaluation.sampling import sample_documents

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
        raise PagerError(f"{out_file} can not be written: {error.strerror}") from None
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
    from pager.engine.loading import load_paged_model
    from pager.evaluation.traces import RouterTracer
    from pager.planner import Budgets
    from pager.tokenizing import read_tokenizer

    tokenizer = read_tokenizer(path)
    if tokenizer is None:
        raise InvalidRequest(f"{path} has no tokenizer.json, which its documents need to become tokens")
    paged = load_paged_model(path, device=device, dtype=dtype, budgets=Budgets(expert_memory=expert_memory))
    try:
        tracer = RouterTracer(paged, tokenizer)
        return paged.facts, [tracer.trace(document, max_tokens) for document in documents]
    finally:
        paged.close()
