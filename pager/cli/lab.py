"""The commands of the lab: `expert-pager eval`, `clusters`, `fit-router`, `replay` and `simulate`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pager.cli.options import (
    AsJson,
    Device,
    Dtype,
    ExpertMemory,
    ModelPath,
    bundled,
    busy,
    err,
    lab_extra,
    model_folder,
    out,
    print_json,
    print_table,
    steps_progress,
)
from pager.cli.pools import ServerOptions, api_key
from pager.errors import ConfigError, InvalidRequest, PagerError
from pager.gguf import is_gguf
from pager.memory import Budgets, format_bytes, resolve_device

if TYPE_CHECKING:
    from pager.cache.trace import Trace
    from pager.lab.corpus import EvaluationAsk
    from pager.lab.fit import Fit
    from pager.lab.replay import BudgetResults
    from pager.lab.report import Evaluation, Figures
    from pager.lab.simulate import Arrival, Outcome

Documents = Annotated[
    list[str],
    typer.Option(
        help="Files of JSON lines with a text each, a file a domain (its name up to the first dot), .gz or not; a "
        "quoted pattern, or several.",
        metavar="GLOB",
    ),
]
Calibration = Annotated[
    list[str],
    typer.Option(help="Other documents of the same domains, for the methods that choose from them.", metavar="GLOB"),
]


def evaluate(
    model: ModelPath,
    documents: Documents,
    calibration: Calibration = [],  # noqa: B006 - typer reads it
    methods: Annotated[str | None, typer.Option(help="Names, separated by commas. Default: all of them.")] = None,
    sizes: Annotated[
        str, typer.Option(help="Percent of a layer's experts, shared ones included.")
    ] = "100,50,25,12.5,6.25",
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of a document from which its pool is chosen.", min=1)] = 64,
    context_tokens: Annotated[int, typer.Option(help="Documents are cut to this many tokens.", min=2)] = 512,
    max_documents: Annotated[int | None, typer.Option(help="Documents of each domain. Default: all.", min=1)] = None,
    calibration_documents: Annotated[int, typer.Option(help="Calibration documents of each domain.", min=1)] = 160,
    out_folder: Annotated[
        Path | None, typer.Option("--out", help="Folder for JSON, Markdown and plots; continues where it was stopped.")
    ] = None,
    expert_memory: ExpertMemory = None,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.", metavar="NAME")] = "float32",
    seed: Annotated[int, typer.Option(help="Seed for drawing documents, resamples and random pools.", min=0)] = 0,
    resamples: Annotated[int, typer.Option(help="Resamples of the documents, for the intervals.", min=10)] = 1000,
    as_json: AsJson = False,
) -> None:
    """Measure what a pool chosen from a prompt costs: loss and agreement with the full model on what comes after.

    Runs on any checkpoint that can be paged; experts that do not fit into memory are paged. Intervals are bootstrapped
    over documents.

    Examples:

    `expert-pager eval ./model --documents 'corpus/*.valid.jsonl.gz' --out report`

    `expert-pager eval ./model --documents 'mine/*.jsonl' --methods prefill,trunk --sizes 25,12.5 --max-documents 20`
    """
    with lab_extra("eval"), busy("loading"):
        import matplotlib as _  # noqa: F401 - so that a missing one is reported before the work, not after it

        from pager.lab.corpus import Cut, EvaluationAsk, parse_percents

    ask = EvaluationAsk(
        model,
        tuple(documents),
        tuple(calibration),
        tuple(name.strip() for name in methods.split(",")) if methods else None,
        parse_percents(sizes),
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


def _run(ask: EvaluationAsk, folder: Path | None, as_json: bool) -> None:
    from pager.lab.corpus import tokenizer_of
    from pager.lab.report import evaluate, to_dict, write_report

    tokenizer = tokenizer_of(ask.model)
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
    _print_evaluation(evaluation)
    for path in written:
        out.print(str(path), markup=False)


def _print_evaluation(evaluation: Evaluation) -> None:
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


Compare = Annotated[
    Path | None, typer.Option(help="A second checkpoint, shown beside the first.", metavar="MODEL", show_default=False)
]


def clusters(
    model: ModelPath,
    documents: Documents,
    compare: Compare = None,
    out_file: Annotated[Path, typer.Option("--out", help="The page to write.", metavar="FILE")] = Path("clusters.html"),
    num_clusters: Annotated[int, typer.Option("--clusters", help="Number of groups of tokens.", min=2, max=128)] = 32,
    max_documents: Annotated[int, typer.Option(help="Documents of each domain.", min=1)] = 8,
    max_tokens: Annotated[int, typer.Option(help="Tokens of each document, from its start.", min=1)] = 256,
    seed: Annotated[int, typer.Option(help="Seed for drawing documents and for the clustering.", min=0)] = 0,
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
    with lab_extra("clusters"), busy("loading"):
        from pager.lab.clusters import build_page, make_report, slice_line, summary, trace_documents
        from pager.lab.corpus import sample_documents

    if not out_file.parent.is_dir():
        raise InvalidRequest(f"{out_file.parent} is not a directory; make it, or choose another --out")
    sampled = sample_documents(documents, max_documents, seed)
    budgets, resolved = Budgets(expert_memory=expert_memory), resolve_device(device)
    reports = []
    for path in [model] if compare is None else [model, compare]:
        with busy(f"running {len(sampled)} documents through {path.name}"):
            facts, traced = trace_documents(path, sampled, max_tokens, device=resolved, dtype=dtype, budgets=budgets)
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
    line = slice_line(str(model))
    out.print(f"the experts of one domain as a model of their own: {line}", markup=False)


def fit_router(
    model: ModelPath,
    documents: Annotated[
        list[str],
        typer.Option(
            help='JSON lines with a "text" each, .gz or not; a file or a pattern, repeatable. As many documents are '
            "taken from each file.",
            metavar="FILE",
        ),
    ],
    output: Annotated[
        Path | None, typer.Option(help="Where to write. Default: router.safetensors in the model's folder.")
    ] = None,
    max_documents: Annotated[int, typer.Option(help="The most documents to read, over all files.", min=8)] = 2560,
    max_tokens: Annotated[int, typer.Option(help="The most tokens to read of a document.", min=32)] = 512,
    codewords: Annotated[
        int | None,
        typer.Option(
            help="Number of pools that requests share. Default: as many as held-out documents call for.", min=1
        ),
    ] = None,
    codebook_only: Annotated[
        bool, typer.Option("--codebook-only", help="Keep the passes of the model's file, and fit only the codebook.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed for choosing documents and drawing pool sizes.")] = 0,
    expert_memory: ExpertMemory = None,
    device: Device = "auto",
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Fit the passes `lexical` and `fitted`, and a codebook, to documents like the expected prompts.

    A few hundred to a few thousand documents, minutes; no gradients. Writes a small file beside the checkpoint, which
    `--predictor lexical` and `--predictor fitted` use. A codebook has the pools that alike requests share.

    Example: `expert-pager fit-router ./model --documents 'corpus/*.train.jsonl.gz'`
    """
    from pager.engine.paged_model import load_paged_model
    from pager.lab.corpus import sample_texts, tokenizer_of
    from pager.lab.fit import add_codebook, fit_checkpoint
    from pager.predict.fitted import PREDICTOR_NAME
    from pager.tokenizing import encode

    if output is None and is_gguf(model):
        raise ConfigError(f"{model} is a file, with no folder for what is fitted; say with --output where it goes")
    texts = sample_texts(documents, max_documents, seed)
    tokenizer = tokenizer_of(model)
    with busy("loading"):
        paged = load_paged_model(
            model, device=resolve_device(device), dtype=dtype, budgets=Budgets(expert_memory=expert_memory)
        )
    try:
        token_ids = [encode(tokenizer, text, add_special_tokens=False).ids[:max_tokens] for text in texts]
        if codebook_only:
            file, codebook = add_codebook(model, paged, token_ids, steps_progress, codewords)
        else:
            fitted = fit_checkpoint(model, paged, token_ids, seed, steps_progress, codewords)
            file, codebook = fitted.file, fitted.codebook
    finally:
        paged.close()
    path = output or model / PREDICTOR_NAME
    nbytes = file.save(path)
    found: dict[str, object] = {"path": str(path), "bytes": nbytes, "documents": int(file.facts["codebook_documents"])}
    found |= {"codewords": codebook.num_codewords, "mass_lost_to_sharing": codebook.lost_mass}
    if codewords is not None and codebook.num_codewords < codewords:
        err.print(
            f"{codewords} codewords were asked for and {codebook.num_codewords} made, as each takes at least four "
            "documents; give more of them, or ask for fewer codewords",
            markup=False,
        )
    if not codebook_only:
        found |= {"unseen_recall": fitted.recall, "recall_error": fitted.recall_error, "unseen_mass": fitted.mass}
    if as_json:
        print_json(found)
        return
    out.print(f"fitted to {found['documents']} documents: {path} ({format_bytes(nbytes)})", markup=False)
    lost = codebook.lost_mass[codebook.num_codewords]
    out.print(
        f"codebook of {codebook.num_codewords} codewords; sharing an eighth of the experts costs unseen documents "
        f"{lost:.3f} of their gate mass",
        markup=False,
    )
    if not codebook_only:
        _report_passes(fitted)


def _report_passes(fitted: Fit) -> None:
    out.print("on documents that the maps had not seen:")
    for source, recall in fitted.recall.items():
        out.print(
            f"{source:<8} {fitted.mass[source]:.3f} of what the best eighth of the experts covers; recall of the "
            f"prefill's pool {recall:.2f}, estimated within {fitted.recall_error[source]:.3f}",
            markup=False,
        )


def replay(
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="File in the folder of `serve --trace`.")],
    budgets: Annotated[
        str, typer.Option("--budgets", help="Comma-separated: bytes ('64MiB') or shares of all routed experts ('25%').")
    ] = "12.5%,25%,50%,75%",
    prometheus: Annotated[
        Path | None,
        typer.Option(
            "--prometheus", metavar="FILE", help="Also write the curve as metrics, with what 1 GiB more buys."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a recorded run would have read with another eviction policy or another budget.

    The optimum is Belady's rule, which knows the future. Record a trace under a budget that holds all experts: what was
    held, and for how long, then depends on the requests alone.

    Example: `expert-pager replay trace.jsonl.gz --budgets 25%,50%`
    """
    from pager.cache.trace import read_trace
    from pager.lab.replay import curve, replay_budgets, write_curve

    recorded = read_trace(trace)
    if recorded.is_cut:
        err.print(f"{trace} is cut off: it is replayed up to its last complete event", markup=False)
    if recorded.num_lost:
        err.print(f"{recorded.num_lost} events of {trace} were lost while it was recorded", markup=False)
    tables = replay_budgets(recorded, [budget.strip() for budget in budgets.split(",")])
    if prometheus is not None:
        write_curve(curve(recorded, tables), prometheus)
    if as_json:
        print_json(_replay_dict(trace, recorded, tables))
    else:
        _print_replay(recorded, tables)


def _replay_dict(path: Path, trace: Trace, tables: Sequence[BudgetResults]) -> dict[str, object]:
    rows = [
        {
            "budget": table.budget, "slots": table.num_slots, "policy": result.policy, "hits": result.hits,
            "misses": result.misses, "bytes": result.misses * trace.header.expert_bytes,
        }
        for table in tables
        for result in table.results
    ]  # fmt: skip
    facts = {"lost_events": trace.num_lost, "cut": trace.is_cut}
    return {"trace": str(path), "model_fingerprint": trace.header.fingerprint, **facts, "results": rows}


def _print_replay(trace: Trace, tables: Sequence[BudgetResults]) -> None:
    header = trace.header
    for table in tables:
        best = table.results[-1].misses
        budget_bytes = format_bytes(table.num_slots * header.expert_bytes)
        print_table(
            f"{table.budget}: {table.num_slots} of {header.num_experts} experts, {budget_bytes}",
            ("policy", "hits", "bytes waited for", "over the optimum"),
            [
                (
                    result.policy,
                    f"{result.hit_rate:.1%}",
                    format_bytes(result.misses * header.expert_bytes),
                    f"{result.misses / best - 1:+.1%}" if best else "-",
                )
                for result in table.results
            ],
        )
    out.print(f"{len(trace.accesses)} events of model {header.fingerprint[:16]}", markup=False)


@dataclass(frozen=True, kw_only=True)
class DrawnOptions:
    """Traffic that is drawn where there is no trace."""

    requests: Annotated[int, typer.Option(help="Requests to draw.", min=1, metavar="N")] = 100_000
    tenants: Annotated[int, typer.Option(help="Tenants to draw, by Zipf's law.", min=1, metavar="N")] = 100
    per_second: Annotated[float, typer.Option(help="Requests of drawn traffic, in the mean.", metavar="RATE")] = 10.0
    seed: Annotated[int, typer.Option(help="Seed of the drawn traffic.")] = 0


@dataclass(frozen=True, kw_only=True)
class WhatIfOptions:
    """The options for variations of the traffic."""

    another_like: Annotated[
        str | None, typer.Option(help="Also with one tenant more, which sends what this one sends.", metavar="TENANT")
    ] = None
    lose_at: Annotated[
        float | None, typer.Option(help="Lose a worker so many seconds after the first request.", min=0, metavar="S")
    ] = None
    compare: Annotated[bool, typer.Option("--compare", help="Also with other rules of placement and admission.")] = (
        False
    )


@bundled
def simulate(
    drawn: DrawnOptions,
    what_if: WhatIfOptions,
    model: Annotated[
        Path, typer.Option(help="The model, whose codebook has the pools.", parser=model_folder, metavar="MODEL")
    ],
    costs: Annotated[Path, typer.Option(help="What work costs: measured with --server, else read.", metavar="FILE")],
    trace: Annotated[
        Path | None,
        typer.Argument(help="The JSON log of a router. Without it, traffic is drawn.", show_default=False),
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(help="Measure the costs at this idle service first, in about a minute.", metavar="HOST:PORT"),
    ] = None,
    tls_ca: Annotated[
        Path | None,
        typer.Option(
            help="With --server: use TLS, and trust servers whose certificate this one has signed.", metavar="PEM"
        ),
    ] = None,
    tls_identity: Annotated[
        Path | None,
        typer.Option(
            help="With --tls-ca, for a service that requires it: the client's certificate and key in a file.",
            metavar="PEM",
        ),
    ] = None,
    pool: Annotated[str, typer.Option(help="The size of the codewords' pools.", metavar="SIZE")] = "12.5%",
    workers: Annotated[
        int, typer.Option(help="Workers of the service; one more is simulated as well.", min=1, max=1024)
    ] = 2,
    as_json: AsJson = False,
) -> None:
    """Forecast what a service makes of a trace: tokens/s, first tokens, bytes paged; and what if there were more.

    Placement, admission, fairness and eviction are the service's own; forwards and reads take what was measured.

    Examples:

    `expert-pager simulate --model ./model --costs costs.json --server localhost:50051 --requests 10000`

    `expert-pager simulate router.log --model ./model --costs costs.json --workers 4 --another-like acme`
    """
    from pager.lab.simulate import OTHERS, SERVICE, Rules, Simulation
    from pager.lab.traffic import Drawn, Pools, Trace, measure, read_costs, read_log, with_another, write_costs
    from pager.pools.pick import parse_pool_size

    if trace is not None and drawn != DrawnOptions():
        raise typer.BadParameter("--requests, --tenants, --per-second and --seed have no effect with a TRACE")
    at = ServerOptions(server=server, tls_ca=tls_ca, tls_identity=tls_identity)
    at.check()
    pools = Pools.of(model, parse_pool_size(pool))
    if server is not None:
        with busy(f"measuring at {server}"):
            write_costs(measure(server, pools, api_key(os.environ), at.credentials()), costs)
    taking = read_costs(costs)
    if trace is None:
        asked = Drawn(drawn.requests, drawn.tenants, drawn.per_second, seed=drawn.seed)
        read = Trace(asked.arrivals(sorted(pools.codewords)))
    else:
        read = read_log(trace)
    if read.num_left_out:
        err.print(f"left out {read.num_left_out} requests with pools of their own", markup=False)
    asked_for: list[tuple[str, Rules, int, Sequence[Arrival]]] = [
        ("as it is", SERVICE, workers, read.arrivals),
        ("with one worker more", SERVICE, workers + 1, read.arrivals),
    ]
    if what_if.another_like is not None:
        more = with_another(read.arrivals, what_if.another_like)
        asked_for.append((f"with another {what_if.another_like}", SERVICE, workers, more))
    if what_if.compare:
        asked_for += [(rules.name, rules, workers, read.arrivals) for rules in OTHERS]
    by_name = pools.known_and_drawn({arrival.pool for arrival in read.arrivals})
    found: dict[str, Outcome] = {}
    for name, rules, num_workers, arrivals in asked_for:
        with busy(f"simulating {len(arrivals)} requests, {name}"):
            found[name] = Simulation(by_name, taking, num_workers, rules, what_if.lose_at).run(arrivals)
    if as_json:
        print_json({"requests": len(read.arrivals), "left_out": read.num_left_out, "results": _outcomes(found)})
        return
    print_table(
        f"{len(read.arrivals)} requests, {workers} {'worker' if workers == 1 else 'workers'}",
        ("", "tokens/s", "first token s, p50", "p99", "worst tenant's p99", "paged", "was there", "refused", "failed"),
        [(name, *_shown(row)) for name, row in _outcomes(found).items()],
    )


def _shown(row: dict[str, Any]) -> tuple[str, ...]:
    times = (f"{row[name]:.3f}" for name in ("first_token_p50_s", "first_token_p99_s", "worst_tenant_p99_s"))
    paged, there = format_bytes(row["bytes_paged"]), f"{row['placed_resident']:.1%}"
    return (f"{row['tokens_per_s']:.0f}", *times, paged, there, str(row["refused"]), str(row["failed"]))


def _outcomes(found: Mapping[str, Outcome]) -> dict[str, dict[str, Any]]:
    return {
        name: {
            "workers": outcome.num_workers,
            "tokens_per_s": outcome.tokens_per_s,
            "first_token_p50_s": outcome.first_token_at(50),
            "first_token_p99_s": outcome.first_token_at(99),
            "worst_tenant_p99_s": outcome.worst_tenant_at(99),
            "bytes_paged": outcome.bytes_paged,
            "placed_resident": outcome.num_resident / max(1, outcome.num_placed),
            "refused": outcome.num_refused,
            "failed": outcome.num_failed,
        }
        for name, outcome in found.items()
    }
