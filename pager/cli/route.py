"""`expert-pager route`: which experts a prompt wants, with nothing generated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pager.cli.extras import serve_extra
from pager.cli.generate import pool_text
from pager.cli.options import AsJson, Device, Dtype, Pool, resolve_device
from pager.cli.output import busy, out, pool_dict, print_json
from pager.cli.prompt import (
    Model,
    Prompt,
    PromptFile,
    PromptText,
    Server,
    Tenant,
    Timeout,
    TokenIds,
    one_place,
    read_prompt,
)
from pager.types import ExpertPool
from pager.units import format_bytes


def route(
    prompt: PromptText = None,
    model: Model = None,
    server: Server = None,
    pool: Pool = None,
    prompt_file: PromptFile = None,
    token_ids: TokenIds = None,
    device: Device = "auto",
    dtype: Dtype = None,
    tenant: Tenant = "default",
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """Predict a prompt's expert pool with the routing-only pass. No routed expert is loaded, nothing is generated.

    Examples:

    `expert-pager route "SELECT name FROM users" --model ./model --pool 12.5%`

    `expert-pager route "Whereas the parties agree" --server localhost:50051 --pool mass:0.9 --json`
    """
    one_place(model, server)
    asked = read_prompt(prompt, prompt_file, token_ids)
    if server is not None:
        result = _from_server(server, tenant, timeout, asked, pool)
    else:
        with busy("loading"):
            from pager.cli.local import Local
            from pager.routing.pool import parse_pool_size

            assert model is not None
            scores, chosen = Local(model, resolve_device(device), dtype).route(asked, parse_pool_size(pool))
        result = _result(scores.source, scores.num_tokens, [list(map(float, mean)) for mean in scores.mean_LR], chosen)
    if as_json:
        print_json({**result, "pool": pool_dict(result["pool"])})
    else:
        _print(result)


def _from_server(server: str, tenant: str, timeout: float | None, prompt: Prompt, pool: str | None) -> dict[str, Any]:
    with serve_extra("--server"):
        from pager.cli.remote import PoolAsk, Service, pool_of
    from pager.routing.pool import parse_pool_size

    with Service(server, tenant, timeout) as service:
        reply = service.route(prompt, PoolAsk(parse_pool_size(pool) if pool else None))
    chosen = pool_of(reply.pool) if reply.HasField("pool") else None
    means = [list(layer.mean) for layer in reply.scores.layers]
    result = _result(reply.scores.source, reply.scores.num_tokens, means, chosen)
    if reply.HasField("placement"):
        result["placement"] = {"worker": reply.placement.worker, "missing_bytes": reply.placement.missing_bytes}
    return result


def _result(source: str, num_tokens: int, means: Sequence[list[float]], pool: ExpertPool | None) -> dict[str, Any]:
    return {"source": source, "num_tokens": num_tokens, "pool": pool, "scores": list(means)}


def _print(result: dict[str, Any]) -> None:
    pool: ExpertPool | None = result["pool"]
    out.print(f"{result['num_tokens']} tokens scored by the {result['source']} pass: {pool_text(pool)}", markup=False)
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
