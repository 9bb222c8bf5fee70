"""The routes of the HTTP front: OpenAI's and Anthropic's methods, the tokenizer, the model and health."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from pager.errors import InvalidRequest, PagerError
from pager.observe.logs import request_id
from pager.types import TokenChunk
from router_service import anthropic, openai
from router_service.access_log import AuditLog, CallRecorder, tell
from router_service.chat import ChatTemplate, TokenTexts, ToolCall, forced_call, tool_parser
from router_service.http import (
    Boundary,
    Endpoint,
    ErrorBody,
    Exchange,
    GuardedPage,
    Handler,
    new_call,
    not_found,
    run_all,
    until_gone,
)
from router_service.keys import Gate
from router_service.openai import Choice
from router_service.playground import Playground
from router_service.requests import Ask
from router_service.service import Call, Pipeline

WithTools = openai.ChatRequest | openai.ResponsesRequest | anthropic.MessagesRequest
STARTED_UNIX_S = int(time.time())


def openai_error(error: PagerError, status: int) -> dict[str, Any]:
    """Returns an error as OpenAI's clients read it; `code` is ErrorInfo's reason."""
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    message, param = openai.in_json(error)
    return {"error": {"message": message, "type": kind, "param": param, "code": error.reason.lower()}}


class Api:
    """The methods over HTTP. Reads requests, calls the pipeline and writes the answers; owns no state."""

    def __init__(
        self,
        pipeline: Pipeline,
        texts: TokenTexts | None,
        template: ChatTemplate | None,
        write_timeout_s: float,
        *,
        gate: Gate | None = None,
        audit: AuditLog | None = None,
    ) -> None:
        self._pipeline = pipeline
        self._texts = texts
        self._template = template
        self._parse_tools = None if template is None else tool_parser(template)
        self._audit = audit
        recorder = CallRecorder(pipeline.metrics, audit)
        self._boundary = Boundary(recorder, gate or Gate(), pipeline.stores.quotas, write_timeout_s)

    def app(self, *more: Route) -> Starlette:
        """Makes the application; `more` routes follow its own: pages that require a role."""
        for page in more:
            page.app = GuardedPage(page.path, page.app, self._boundary.gate, self._audit)
        posts: Mapping[str, tuple[str, Handler, ErrorBody]] = {
            "/v1/completions": ("Completions", self.completions, openai_error),
            "/v1/chat/completions": ("ChatCompletions", self.chat, openai_error),
            "/v1/responses": ("Responses", self.responses, openai_error),
            "/v1/messages": ("Messages", self.messages, anthropic.error_body),
            "/v1/messages/count_tokens": ("CountTokens", self.count_tokens, anthropic.error_body),
            "/tokenize": ("Tokenize", self.tokenize, openai_error),
            "/detokenize": ("Detokenize", self.detokenize, openai_error),
        }
        gets: Mapping[str, tuple[str, Handler]] = {
            "/v1/models": ("Models", self.models),
            "/v1/models/{name:path}": ("Models", self.one_model),
        }
        routes: list[BaseRoute] = [Route(path, self._endpoint(*each), methods=["POST"]) for path, each in posts.items()]
        routes += [Route(path, self._endpoint(*each, openai_error), methods=["GET"]) for path, each in gets.items()]
        playground = Playground(self._pipeline).endpoints()
        routes += [
            Route(path, self._endpoint(name, handler, openai_error), methods=[method])
            for path, (method, name, handler) in playground.items()
        ]
        routes += [Route("/health", self.health, methods=["GET"]), *more]
        paths = [*posts, "/v1/models", "/health", *(route.path for route in more)]
        handler = not_found(paths)
        return Starlette(routes=routes, exception_handlers={HTTPException: handler})

    def _endpoint(self, method: str, handler: Handler, error_body: ErrorBody) -> Endpoint:
        return Endpoint(method, handler, error_body, self._boundary)

    # --- completions --------------------------------------------------------------------------------------------------

    async def completions(self, exchange: Exchange, tenant: str) -> None:
        """Answers POST /v1/completions."""
        asked = openai.CompletionRequest.read(await exchange.json())
        asked.check()
        call, answers = new_call(exchange, tenant), max(asked.n or 1, asked.best_of or 1)
        _tell_user(asked.user_digest)
        prompts: list[str | Sequence[int]] = list(asked.prompts())
        if len(prompts) * answers > openai.MAX_CHOICES:
            raise InvalidRequest(
                f"{len(prompts)} prompts of {answers} answers are more than the {openai.MAX_CHOICES} of a request",
                field="prompt",
            )
        if asked.echo or asked.counts_as_it_goes:  # the prompt's tokens are shown, or counted before the end
            prompts = [await self._ids(call, prompt) for prompt in prompts]
        asks = self._asks(asked, prompts, answers, call)
        choices = [
            Choice(
                index,
                index // answers,
                prompts[index // answers] if asked.echo else (),  # type: ignore[arg-type]
                len(prompts[index // answers]) if asked.counts_as_it_goes else 0,
            )
            for index in range(len(prompts) * answers)
        ]
        id_, model = openai.new_id("cmpl"), asked.model
        if not asked.stream:
            await until_gone(exchange, run_all(self._pipeline, call, asks, _into(choices)))
            kept = _best(choices, answers, asked.n or 1) if asked.best_of else choices

            def whole() -> dict[str, Any]:
                made = [self._completion(asked, choice, index) for index, choice in enumerate(kept)]
                usage = openai.usage_of(choices)
                return openai.head("text_completion", id_, model) | {"choices": made, "usage": usage}

            await exchange.answer(200, whole if any(choice.is_large for choice in kept) else whole())
            return

        async def seen(index: int, chunk: TokenChunk) -> None:
            choice = choices[index]
            is_first = not choice.texts
            part = choice.part(chunk)
            choice.add(chunk)

            def event() -> dict[str, Any]:
                made = [self._completion(asked, part, index, is_first=is_first)]
                return openai.head("text_completion", id_, model) | {"choices": made} | usage

            usage = {"usage": choice.usage_so_far} if asked.counts_as_it_goes else {}
            await exchange.event(event if part.is_large else event())

        async def work() -> None:
            await run_all(self._pipeline, call, asks, seen)
            await self._end_stream(exchange, asked, openai.head("text_completion", id_, model), choices)

        await until_gone(exchange, work())

    def _completion(
        self,
        asked: openai.CompletionRequest,
        choice: Choice,
        index: int,
        *,
        is_first: bool = True,
    ) -> dict[str, Any]:
        """Returns a choice as it is sent: whole, or only the part that a chunk brought."""
        texts = self._known_texts() if asked.echo or asked.logprobs is not None else None
        is_dropped = asked.max_tokens == 0
        text = "" if is_dropped else choice.text
        logprobs = None
        if asked.logprobs is not None and texts is not None:
            of_answer = () if is_dropped else choice.logprobs
            shows_prompt = bool(asked.echo) and is_first and bool(choice.prompt_ids)
            first = choice.prompt_ids[0] if shows_prompt else None
            logprobs = openai.completion_logprobs(texts, [*choice.prompt_logprobs, *of_answer], first)
        if asked.echo and is_first and texts is not None:
            text = texts.decode(choice.prompt_ids) + text
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": choice.finish_reason}

    # --- chat ---------------------------------------------------------------------------------------------------------

    async def chat(self, exchange: Exchange, tenant: str) -> None:
        """Answers POST /v1/chat/completions."""
        asked = openai.ChatRequest.read(await exchange.json())
        asked.check()
        call = new_call(exchange, tenant)
        _tell_user(asked.user_digest)
        prompt = await self._rendered(call, lambda: asked.prompt(self._template))
        answers = asked.n or 1
        asks = self._asks(asked, [prompt], answers, call)
        choices = [Choice(index, 0, prompt_tokens=len(prompt)) for index in range(answers)]
        id_ = openai.new_id("chatcmpl")
        if not asked.stream:
            await until_gone(exchange, run_all(self._pipeline, call, asks, _into(choices)))

            def whole() -> dict[str, Any]:
                made = [self._message(asked, choice) for choice in choices]
                usage = openai.usage_of(choices)
                return openai.head("chat.completion", id_, asked.model) | {"choices": made, "usage": usage}

            await exchange.answer(200, whole if any(choice.is_large for choice in choices) else whole())
            return
        holds_back = self._holds_back(asked)

        async def delta(index: int, delta: dict[str, Any], reason: str | None = None, logprobs: Any = None) -> None:
            choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
            usage = {"usage": choices[index].usage_so_far} if asked.counts_as_it_goes else {}
            await exchange.event(openai.head("chat.completion.chunk", id_, asked.model) | {"choices": [choice]} | usage)

        async def seen(index: int, chunk: TokenChunk) -> None:
            choice = choices[index]
            if not choice.texts:
                await delta(index, {"role": "assistant", "content": ""})
            choice.add(chunk)
            logprobs = openai.chat_logprobs(self._known_texts(), chunk.logprobs) if asked.logprobs else None
            if (chunk.text or chunk.logprobs) and not holds_back:
                await delta(index, {"content": chunk.text}, logprobs=logprobs)
            if chunk.usage is not None:
                content, calls, reason = self._answer_of(asked, choice)
                if holds_back and content:
                    await delta(index, {"content": content})
                for number, each in enumerate(calls):
                    await delta(index, {"tool_calls": [{"index": number, **_call(each)}]})
                await delta(index, {}, reason)

        async def work() -> None:
            await run_all(self._pipeline, call, asks, seen)
            await self._end_stream(exchange, asked, openai.head("chat.completion.chunk", id_, asked.model), choices)

        await until_gone(exchange, work())

    def _holds_back(self, asked: WithTools) -> bool:
        """Tells whether the text of a stream waits for its end, because calls of tools may be in it."""
        return bool(asked.shown_tools()) and (asked.is_tool_forced or self._parse_tools is not None)

    def _answer_of(self, asked: WithTools, choice: Choice) -> tuple[str, list[ToolCall], str]:
        """Returns the text of an answer, the tool calls in it, and why it ended."""
        text, calls, reason = choice.text, [], choice.finish_reason or "stop"
        if asked.is_tool_forced:
            call = forced_call(text)
            if call is not None:
                text, calls = "", [call]
        elif asked.shown_tools() and self._parse_tools is not None:
            text, calls = self._parse_tools(text)
        return text, calls, "tool_calls" if calls and reason == "stop" else reason

    def _message(self, asked: openai.ChatRequest, choice: Choice) -> dict[str, Any]:
        text, calls, reason = self._answer_of(asked, choice)
        message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
        if calls:
            message["tool_calls"] = [_call(each) for each in calls]
        logprobs = openai.chat_logprobs(self._known_texts(), choice.logprobs) if asked.logprobs else None
        return {"index": choice.index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    # --- responses ----------------------------------------------------------------------------------------------------

    async def responses(self, exchange: Exchange, tenant: str) -> None:
        """Answers POST /v1/responses."""
        asked = openai.ResponsesRequest.read(await exchange.json())
        call = new_call(exchange, tenant)
        _tell_user(asked.user_digest)
        prompt = await self._rendered(call, lambda: asked.prompt(self._template), "input")
        ask = self._ask(asked, asked.sampling_of(self._pipeline.model.token_limit), prompt, call)
        choice, id_ = Choice(0, 0), openai.new_id("resp")
        if not asked.stream:
            await until_gone(exchange, run_all(self._pipeline, call, [ask], _into([choice])))
            await exchange.answer(200, self._response(asked, id_, choice))
            return
        holds_back = self._holds_back(asked)
        events = openai.ResponseEvents(id_, lambda: self._response(asked, id_, choice), holds_back=holds_back)

        async def send(found: list[openai.Event]) -> None:
            for name, event in found:
                await exchange.event(event, name)

        async def seen(_: int, chunk: TokenChunk) -> None:
            if not choice.texts:
                await send(events.begin())
            choice.add(chunk)
            if chunk.text and not holds_back:
                await send(events.delta(chunk.text))

        async def work() -> None:
            await run_all(self._pipeline, call, [ask], seen)
            await send(events.end())
            await exchange.end()

        await until_gone(exchange, work())

    def _response(self, asked: openai.ResponsesRequest, id_: str, choice: Choice) -> dict[str, Any]:
        text, calls, reason = self._answer_of(asked, choice)
        return openai.response(asked, id_, choice, text, [_call(each) for each in calls], reason)

    # --- Anthropic's methods ------------------------------------------------------------------------------------------

    async def messages(self, exchange: Exchange, tenant: str) -> None:
        """Answers POST /v1/messages."""
        asked = anthropic.MessagesRequest.read(await exchange.json())
        call = new_call(exchange, tenant)
        if asked.metadata is not None and asked.metadata.user_id is not None:
            _tell_user(openai.digest(asked.metadata.user_id))
        prompt = await self._rendered(call, lambda: asked.prompt(self._template))
        ask = self._ask(asked, asked.sampling(), prompt, call)
        choice, id_ = Choice(0, 0), openai.new_id("msg").replace("-", "_")
        body: dict[str, Any] = {"id": id_, "type": "message", "role": "assistant", "model": asked.model}
        body["stop_sequence"] = None
        if not asked.stream:
            await until_gone(exchange, run_all(self._pipeline, call, [ask], _into([choice])))
            text, calls, _ = self._answer_of(asked, choice)
            assert choice.usage is not None
            content = [{"type": "text", "text": text}] if text or not calls else []
            body |= {
                "content": [*content, *map(anthropic.tool_use, calls)],
                "stop_reason": anthropic.stop_reason(choice.usage, bool(calls)),
                "usage": anthropic.usage_of(choice.usage),
            }
            await exchange.answer(200, body)
            return
        holds_back = self._holds_back(asked)

        async def event(name: str, **fields: Any) -> None:
            await exchange.event({"type": name, **fields}, name)

        async def block(index: int, start: dict[str, Any], delta: dict[str, Any]) -> None:
            await event("content_block_start", index=index, content_block=start)
            await event("content_block_delta", index=index, delta=delta)
            await event("content_block_stop", index=index)

        async def seen(_: int, chunk: TokenChunk) -> None:
            if not choice.texts:
                usage = {"input_tokens": 0, "output_tokens": 0}  # the counts are known at the end
                await event("message_start", message=body | {"content": [], "stop_reason": None, "usage": usage})
                if not holds_back:
                    await event("content_block_start", index=0, content_block={"type": "text", "text": ""})
            choice.add(chunk)
            if chunk.text and not holds_back:
                await event("content_block_delta", index=0, delta={"type": "text_delta", "text": chunk.text})

        async def work() -> None:
            await run_all(self._pipeline, call, [ask], seen)
            assert choice.usage is not None
            text, calls, _ = self._answer_of(asked, choice)
            if not holds_back:
                await event("content_block_stop", index=0)
            elif text:
                await block(0, {"type": "text", "text": ""}, {"type": "text_delta", "text": text})
            for index, each in enumerate(calls, int(bool(text))):
                start = anthropic.tool_use(each) | {"input": {}}
                await block(index, start, {"type": "input_json_delta", "partial_json": each.arguments})
            reason = {"stop_reason": anthropic.stop_reason(choice.usage, bool(calls)), "stop_sequence": None}
            await event("message_delta", delta=reason, usage=anthropic.usage_of(choice.usage))
            await event("message_stop")
            await exchange.end()

        await until_gone(exchange, work())

    async def count_tokens(self, exchange: Exchange, tenant: str) -> None:
        """Answers POST /v1/messages/count_tokens."""
        asked = anthropic.CountRequest.read(await exchange.json())
        openai.model_and_pool(asked.model, None, None, self._pipeline.model, self._pipeline.default_pool)
        ids = await self._rendered(new_call(exchange, tenant), lambda: asked.prompt(self._template))
        await exchange.answer(200, {"input_tokens": len(ids)})

    # --- the tokenizer and the model ----------------------------------------------------------------------------------

    async def tokenize(self, exchange: Exchange, tenant: str) -> None:
        """Answers POST /tokenize."""
        asked = openai.TokenizeRequest.read(await exchange.json())
        self._pipeline.get_model(asked.model)
        call = new_call(exchange, tenant)
        ids = await self._pipeline.tokenize(call, asked.prompt, add_special_tokens=asked.add_special_tokens)
        limit = self._pipeline.model.token_limit
        await exchange.answer(200, {"count": len(ids), "max_model_len": limit, "tokens": list(ids)})

    async def detokenize(self, exchange: Exchange, tenant: str) -> None:
        """Answers POST /detokenize."""
        asked = openai.DetokenizeRequest.read(await exchange.json())
        model = self._pipeline.get_model(asked.model)
        if len(asked.tokens) > model.token_limit:
            raise InvalidRequest(
                f"`tokens` has {len(asked.tokens)} ids, and at most {model.token_limit} fit", field="tokens"
            )
        if any(not 0 <= token < model.vocab_size for token in asked.tokens):
            raise InvalidRequest(f"`tokens` has ids outside of the vocabulary of {model.vocab_size}", field="tokens")
        text = await asyncio.to_thread(self._known_texts().decode, asked.tokens)
        await exchange.answer(200, {"prompt": text})

    async def models(self, exchange: Exchange, tenant: str) -> None:
        """Answers GET /v1/models with the model, and the tenant's named pools as models whose parent it is."""
        listing = await self._pipeline.list_pools(tenant)
        names = [named.name for named in listing.pools]
        await exchange.answer(200, {"object": "list", "data": [self._card(None), *map(self._card, names)]})

    async def one_model(self, exchange: Exchange, tenant: str) -> None:
        """Answers GET /v1/models/NAME."""
        name = exchange.path_parameter("name")
        model_name, colon, pool_name = name.partition(":")
        self._pipeline.get_model(model_name)
        if colon:
            await self._pipeline.get_pool(tenant, pool_name)
        await exchange.answer(200, self._card(pool_name if colon else None))

    def _card(self, pool: str | None) -> dict[str, Any]:
        model = self._pipeline.model
        name = model.name if pool is None else f"{model.name}:{pool}"
        parent = None if pool is None else model.name
        return {
            "id": name,
            "object": "model",
            "created": STARTED_UNIX_S,
            "owned_by": "expert-pager",
            "root": model.name,
            "parent": parent,
            "max_model_len": model.token_limit,
        }

    async def health(self, _: Request) -> Response:
        """Answers GET /health: 200 when a worker is ready."""
        is_ready = any(worker.state == "ready" for worker in self._pipeline.cluster.workers())
        return JSONResponse({"status": "ready" if is_ready else "not ready"}, 200 if is_ready else 503)

    # --- helpers of several methods -----------------------------------------------------------------------------------

    def _asks(
        self,
        asked: openai.CompletionRequest | openai.ChatRequest,
        prompts: Sequence[str | Sequence[int]],
        answers: int,
        call: Call,
    ) -> list[Ask]:
        """Returns one ask per prompt, with all of its answers; one per answer where answers may drift, which each does
        by itself. Several answers to a prompt have consecutive seeds.
        """
        sampling = replace(asked.sampling_of(self._pipeline.model.token_limit), n=answers)
        made = [self._ask(asked, sampling, prompt, call) for prompt in prompts]
        if answers > 1 and made[0].pool.drift is not None:
            seeds = [None if sampling.seed is None else sampling.seed + number for number in range(answers)]
            made = [replace(ask, sampling=replace(sampling, n=1, seed=seed)) for ask in made for seed in seeds]
        if len(made) == 1:
            return made
        return [replace(ask, id=f"{ask.id[:120]}-{number}") for number, ask in enumerate(made)]

    def _ask(self, asked: Any, sampling: Any, prompt: str | Sequence[int], call: Call) -> Ask:
        model, default = self._pipeline.model, self._pipeline.default_pool
        return Ask(
            id=request_id.get(),
            prompt=prompt,
            sampling=openai.checked(sampling, model, asked),
            has_max_tokens=asked.has_max_tokens,
            pool=openai.model_and_pool(asked.model, asked.pool, asked.drift, model, default),
        )

    async def _ids(self, call: Call, prompt: str | Sequence[int]) -> Sequence[int]:
        return await self._pipeline.tokenize(call, prompt) if isinstance(prompt, str) else prompt

    async def _rendered(self, call: Call, render: Callable[[], str], field: str = "messages") -> Sequence[int]:
        """Returns the tokens of a rendered template, which already contains the special tokens that it needs. Errors
        name the `field` that was rendered.
        """
        text = await asyncio.to_thread(render)
        try:
            return await self._pipeline.tokenize(call, text, add_special_tokens=False)
        except PagerError as error:
            error.field = field if error.field == "text" else error.field
            raise

    def _known_texts(self) -> TokenTexts:
        if self._texts is None:
            raise InvalidRequest("this model has no tokenizer; texts cannot be shown", field="model")
        return self._texts

    async def _end_stream(self, exchange: Exchange, asked: openai.Sampled, head: dict[str, Any], choices: Any) -> None:
        if asked.stream_options is not None and asked.stream_options.include_usage:
            await exchange.event(head | {"choices": [], "usage": openai.usage_of(choices)})
        await exchange.event("[DONE]")
        await exchange.end()


def metrics_route(registry: CollectorRegistry) -> Route:
    """Returns the route of GET /metrics, as on the metrics port."""

    async def answer(_: Request) -> Response:
        return Response(await asyncio.to_thread(generate_latest, registry), 200, media_type=CONTENT_TYPE_LATEST)

    return Route("/metrics", answer, methods=["GET"])


def _into(choices: Sequence[Choice]) -> Callable[[int, TokenChunk], Any]:
    async def seen(index: int, chunk: TokenChunk) -> None:
        choices[index].add(chunk)

    return seen


def _best(choices: Sequence[Choice], answers: int, kept: int) -> list[Choice]:
    """Returns the answers of each prompt whose tokens were likeliest."""
    found = []
    for start in range(0, len(choices), answers):
        ranked = sorted(choices[start : start + answers], key=lambda choice: -choice.mean_logprob)
        found += ranked[:kept]
    return found


def _call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _tell_user(digest: str | None) -> None:
    if digest is not None:
        tell(user=digest)
