"""From what a call asks to the request a worker gets: the checks that need the tokenizer or the remembered pools."""

from __future__ import annotations

from dataclasses import replace

from pager.errors import PromptTooLong, UnknownPool
from pager.types import GenerateRequest, PoolPolicy, SamplingParams
from router_service.decode import Ask, PoolOf, Prompt, fixed_pool, token_ids
from router_service.hints import HintStore
from router_service.ports import ModelInfo
from router_service.scoring import Predictor, Scoring


class Intake:
    """Knows no grpc. Raises PagerErrors that name the field at fault."""

    def __init__(self, model: ModelInfo, scoring: Scoring, predictor: Predictor, hints: HintStore) -> None:
        self._model = model
        self._scoring = scoring
        self._predictor = predictor
        self._hints = hints

    async def request(self, ask: Ask, tenant: str, deadline_unix_s: float | None) -> GenerateRequest:
        prompt = await self.prompt(ask.prompt)
        return GenerateRequest(
            id=ask.id,
            tenant=tenant,
            prompt_token_ids=prompt,
            sampling=self._sampling(ask, len(prompt)),
            pool=await self.policy(ask.pool, tenant),
            deadline_unix_s=deadline_unix_s,
        )

    async def prompt(self, prompt: Prompt) -> tuple[int, ...]:
        if not isinstance(prompt, str):
            return prompt
        return token_ids(await self._scoring.encode(prompt), self._model, "text")

    async def policy(self, pool: PoolPolicy | PoolOf, tenant: str) -> PoolPolicy:
        if isinstance(pool, PoolPolicy):
            return pool
        found = await self._hints.find_pool([self._predictor.named(tenant, pool.digest)])
        if found is None:
            raise UnknownPool(
                f"pool {pool.digest} is not remembered for this tenant; give its experts instead", field="pool.digest"
            )
        return fixed_pool(found)

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
