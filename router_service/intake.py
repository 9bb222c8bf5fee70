"""From what a call asks to the request a worker gets: the checks that need the tokenizer or the remembered pools."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from pager.errors import PromptTooLong, UnknownPool
from pager.routing.named import check_example
from pager.types import ExpertPool, GenerateRequest, PoolPolicy, SamplingParams
from router_service.decode import Ask, Prompt, check_prompt_length, in_vocabulary, prompt_ids
from router_service.decode_pools import PoolByDigest, PoolByName, fixed_pool
from router_service.hints import HintStore
from router_service.pool_store import PoolStore
from router_service.ports import ModelInfo
from router_service.prediction import Predictor
from router_service.scoring import Scoring


class Intake:
    """Knows no grpc. Raises PagerErrors that name the field at fault."""

    def __init__(
        self, model: ModelInfo, scoring: Scoring, predictor: Predictor, hints: HintStore, pools: PoolStore
    ) -> None:
        self._model = model
        self._scoring = scoring
        self._predictor = predictor
        self._hints = hints
        self._pools = pools

    async def request(self, ask: Ask, tenant: str, deadline_s: float | None) -> GenerateRequest:
        prompt = await self.prompt(tenant, ask.prompt)
        return GenerateRequest(
            id=ask.id,
            tenant=tenant,
            prompt_token_ids=prompt,
            sampling=self._sampling(ask, len(prompt)),
            pool=await self.policy(ask.pool, tenant),
            deadline_s=deadline_s,
        )

    async def prompt(self, tenant: str, prompt: Prompt) -> tuple[int, ...]:
        if not isinstance(prompt, str):
            return prompt_ids(prompt, self._model, "token_ids")
        encoded = await self._scoring.encode(tenant, prompt, self._model.token_limit)
        check_prompt_length(encoded.num_tokens, self._model, "text")
        return prompt_ids(encoded.ids, self._model, "text")

    async def example(self, tenant: str, example: Prompt, index: int) -> tuple[int, ...]:
        """One of the texts that a named pool is made from."""
        ids: Sequence[int]
        if isinstance(example, str):
            encoded = await self._scoring.encode(tenant, example, self._model.context_length)
            check_example(index, encoded.num_tokens, self._model.context_length)
            ids = encoded.ids
        else:
            await asyncio.sleep(0)  # one conversion at a time, however many examples there are
            ids = example
        return in_vocabulary(tuple(ids), self._model, f"examples[{index}]")

    async def policy(self, pool: PoolPolicy | PoolByDigest | PoolByName, tenant: str) -> PoolPolicy:
        """The policy itself, or that of the pool which this tenant named."""
        match pool:
            case PoolByDigest(digest, drift):
                return fixed_pool(await self._by_digest(digest, tenant), drift)
            case PoolByName(name, drift):
                return fixed_pool(await self._by_name(name, tenant), drift)
        return pool

    async def _by_digest(self, digest: str, tenant: str) -> ExpertPool:
        found = await self._hints.find_pool([self._predictor.by_digest(tenant, digest)])
        if found is None:
            raise UnknownPool(
                f"pool {digest} is not remembered for this tenant; give its experts instead", field="pool.digest"
            )
        return found

    async def _by_name(self, name: str, tenant: str) -> ExpertPool:
        named = await self._pools.find(tenant, name)
        if named is None:
            raise UnknownPool(
                f"this tenant has no pool {name!r}; make it with Calibrate, or see ListPools", field="pool.name"
            )
        return named.pool_for(self._model.fingerprint, self._model.facts)

    def _sampling(self, ask: Ask, prompt_tokens: int) -> SamplingParams:
        limit = self._model.token_limit
        wanted = ask.sampling.max_tokens
        if prompt_tokens + wanted <= limit:
            return ask.sampling
        if ask.has_max_tokens:
            raise PromptTooLong(
                f"the prompt's {prompt_tokens} tokens and max_tokens {wanted} exceed the {limit} that fit; "
                f"ask for at most {limit - prompt_tokens}",
                field="sampling.max_tokens",
            )
        return replace(ask.sampling, max_tokens=limit - prompt_tokens)
