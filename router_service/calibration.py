"""The methods for named pools: make one from examples, list them, delete one."""

from __future__ import annotations

import asyncio

from expert_pager.v1 import expert_pager_pb2 as pb

from pager.errors import InvalidRequest
from pager.routing.named import NamedPool, check_name, mean_scores
from pager.routing.pool import pick_pool
from pager.types import PoolSize
from router_service import decode, encode
from router_service.access_log import tell
from router_service.gate import Context, Gate, deadline_of
from router_service.intake import Intake
from router_service.pool_store import PoolStore, name_in_use
from router_service.ports import ModelInfo
from router_service.scoring import Passes, Scoring


class NamedPools:
    """A tenant sees its own pools only."""

    def __init__(
        self, model: ModelInfo, passes: Passes, scoring: Scoring, intake: Intake, store: PoolStore, gate: Gate
    ) -> None:
        self._model = model
        self._passes = passes
        self._scoring = scoring
        self._intake = intake
        self._store = store
        self._gate = gate

    async def calibrate(self, wire: pb.CalibrateRequest, context: Context, default: PoolSize) -> pb.CalibrateResponse:
        tenant = decode.tenant(context.invocation_metadata())
        ask = decode.calibrate_ask(wire, self._model, default)
        method = self._method(ask.method)
        tell(pool=f"named:{ask.name}")
        deadline_of(context)
        with self._gate.admit(tenant, wire.ByteSize()) as ticket:
            if not ask.replaces:
                await self._check_free(tenant, ask.name)  # before the work; `add` has the last word
            examples = []
            for index, example in enumerate(ask.examples):
                examples.append(await self._intake.example(tenant, example, index))
                self._gate.charge(ticket, len(examples[-1]))  # one by one: too many are refused before all are read
            tell(prompt_tokens=ticket.tokens)
            # One by one: the prompts of others take their turns in between.
            scored = [await self._scoring.scores(tenant, method, example) for example in examples]
            scores = await asyncio.to_thread(mean_scores, scored)
            pool = pick_pool(scores, ask.size, self._model.facts)
            named = NamedPool(ask.name, pool, method, len(examples), scores.num_tokens, self._model.fingerprint)
            await (self._store.replace if ask.replaces else self._store.add)(tenant, named)
        return pb.CalibrateResponse(pool=encode.named_pool(named))

    async def list_pools(self, context: Context) -> pb.ListPoolsResponse:
        listing = await self._store.all_of(decode.tenant(context.invocation_metadata()))
        response = pb.ListPoolsResponse(damaged=listing.damaged)
        for named in listing.pools:
            response.pools.append(encode.named_pool(named))
            await asyncio.sleep(0)  # hundreds of large pools take a while; others have their turns in between
        return response

    async def delete_pool(self, wire: pb.DeletePoolRequest, context: Context) -> pb.DeletePoolResponse:
        tenant = decode.tenant(context.invocation_metadata())
        return pb.DeletePoolResponse(deleted=await self._store.delete(tenant, check_name(wire.name)))

    def _method(self, asked: str | None) -> str:
        known = self._passes.available
        if not known:
            raise InvalidRequest(
                "this service runs no routing-only pass (its router is `fused`), so it can not score examples; make "
                "the pool with `expert-pager calibrate --model`, which can",
                field="method",
            )
        if asked is None:
            return list(known)[-1]
        if asked not in known:
            raise InvalidRequest(
                f"method {asked[:60]!r} can not be had here; known are {', '.join(known)}", field="method"
            )
        return asked

    async def _check_free(self, tenant: str, name: str) -> None:
        if await self._store.find(tenant, name) is not None:
            raise name_in_use(name)
