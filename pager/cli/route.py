"""`expert-pager route`: which experts a prompt wants, with nothing generated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from pager.cli.options import AsJson, Device, Dtype, Pool
from pager.cli.output import busy, out, pool_dict, print_json
from pager.cli.place import Model, Place, PoolsFolder, Server, Tenant, Timeout, find_named
from pager.cli.pool_options import NameOption, PoolAsk
from pager.cli.prompt import Prompt, PromptFile, PromptText, TokenIds, read_prompt
from pager.cli.tls import ClientTls, TlsCa, TlsIdentity
from pager.cli.usage import pool_text
from pager.types import ExpertPool
from pager.units import format_bytes


def route(
    prompt: PromptText = None,
    model: Model = None,
    server: Server = None,
    pool: Pool = None,
    pool_name: NameOption = None,
    router: Annotated[
        str | None,
        typer.Option(help="The pass, with --model: lexical, trunk, or fitted (default where it was fitted)."),
    ] = None,
    prompt_file: PromptFile = None,
    token_ids: TokenIds = None,
    device: Device = "auto",
    dtype: Dtype = None,
    pools: PoolsFolder = None,
    tenant: Tenant = "default",
    timeout: Timeout = None,
    tls_ca: TlsCa = None,
    tls_identity: TlsIdentity = None,
    as_json: AsJson = False,
) -> None:
    """Predict a prompt's expert pool with the routing-only pass. No routed expert is loaded, nothing is generated.

    Examples:

    `expert-pager route "SELECT name FROM users" --model ./model --pool 12.5%`

    `expert-pager route "Whereas the parties agree" --server localhost:50051 --pool mass:0.9 --json`
    """
    place = Place.of(
        model, server, tenant=tenant, timeout=timeout, device=device, dtype=dtype, local_only={"--router": router},
        tls=ClientTls.of(server, tls_ca, tls_identity),
    )  # fmt: skip
    asked, ask = read_prompt(prompt, prompt_file, token_ids), PoolAsk.of(pool, name=pool_name)
    if server is not None:
        result = _from_server(place, asked, ask)
    else:
        named = None if pool_name is None else find_named(pools, tenant, pool_name)
        with busy("loading"):
            routed = place.local().route(asked, ask, named, router or "auto")
        means = [list(map(float, mean)) for mean in routed.scores.mean_LR]
        scores = routed.scores
        result = _result(scores.source, scores.num_tokens, means, routed.pool, routed.expected_recall)
    if as_json:
        print_json({**result, "pool": pool_dict(result["pool"])})
    else:
        _print(result)


def _from_server(place: Place, prompt: Prompt, ask: PoolAsk) -> dict[str, Any]:
    with place.service() as service:
        reply, chosen = service.route(prompt, ask)
    means = [list(layer.mean) for layer in reply.scores.layers]
    expected = reply.expected_recall if reply.HasField("expected_recall") else None
    result = _result(reply.scores.source, reply.scores.num_tokens, means, chosen, expected)
    if reply.HasField("placement"):
        result["placement"] = {"worker": reply.placement.worker, "missing_bytes": reply.placement.missing_bytes}
    return result


def _result(
    source: str, num_tokens: int, means: Sequence[list[float]], pool: ExpertPool | None, expected: float | None
) -> dict[str, Any]:
    return {
        "source": source, "num_tokens": num_tokens, "pool": pool, "expected_recall": expected, "scores": list(means)
    }  # fmt: skip


def _print(result: dict[str, Any]) -> None:
    pool: ExpertPool | None = result["pool"]
    text = "the prefill's to choose" if pool is None and result["source"] == "fused" else pool_text(pool)
    out.print(f"{result['num_tokens']} tokens scored by the {result['source']} pass: {text}", markup=False)
    if result["expected_recall"] is not None:
        out.print(f"expected to name {result['expected_recall']:.0%} of the prefill's own pool", markup=False)
    if "placement" in result:
        missing = format_bytes(result["placement"]["missing_bytes"])
        out.print(f"would go to worker {result['placement']['worker']}, which lacks {missing} of it", markup=False)
    for layer, mean in enumerate(result["scores"]):
        if not mean:
            out.print(f"layer {layer:>2}  dense")
            continue
        order = sorted(range(len(mean)), key=lambda expert: (-mean[expert], expert))
        best = " ".join(f"{expert}:{mean[expert]:.0%}" for expert in order[:4])
        chosen = "" if pool is None else "  pool " + " ".join(map(str, pool.experts[layer]))
        out.print(f"layer {layer:>2}  most wanted {best}{chosen}", markup=False)
