"""The Open Inference Protocol over gRPC, for clients of KServe and Triton: its messages, read and written.

A parameter of a request is a field of /v1/completions, read by the same class, so that both fronts accept the same
values and refuse them in the same words.
"""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import grpc
from expert_pager.inference import open_inference_pb2 as pb
from expert_pager.inference import open_inference_pb2_grpc as pb_grpc

from pager import __version__
from pager.cluster.placement import WorkerState
from pager.errors import InvalidRequest, PagerError, SlowReader, UnknownModel
from pager.observe import tracing
from pager.observe.logs import request_id
from pager.types import ModelInfo, TokenChunk, Usage
from router_service import openai, requests
from router_service.metrics import INFER
from router_service.requests import Ask
from router_service.service import Call, Pipeline

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
RECORDED = INFER  # the other methods are called by probes, again and again
INPUT, OUTPUT = "text_input", "text_output"
FINAL = "triton_final_response"
MAX_IN_FLIGHT = 128  # in one stream; further requests are read when earlier ones have ended
# the last part of an answer is always marked, whether or not it has text
_IGNORED = ("triton_enable_empty_final_response",)
_OF_JSON = ("logit_bias", "response_format", "stop_token_ids")
_REFUSED = ("model", "prompt", "n", "best_of", "echo", "logprobs", "stream", "stream_options", "suffix", "user")

Context = grpc.aio.ServicerContext[Any, Any]
CallOf = Callable[[Context], Call]
OneOfStream = Callable[
    [bytes, Context, Callable[[pb.ModelInferRequest], Awaitable[None]]], Awaitable[PagerError | None]
]
"""Runs one message of a stream as a call of its own, and returns the error that it ended with."""


class InferenceService(pb_grpc.GRPCInferenceServiceServicer):
    """The Open Inference Protocol's methods, on the same pipeline as the others."""

    def __init__(self, pipeline: Pipeline, write_timeout_s: float, call_of: CallOf, one_of_stream: OneOfStream) -> None:
        self._pipeline = pipeline
        self._write_timeout_s = write_timeout_s
        self._call_of = call_of
        self._one_of_stream = one_of_stream

    async def ServerLive(self, wire: pb.ServerLiveRequest, context: Context) -> pb.ServerLiveResponse:  # noqa: N802
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, wire: pb.ServerReadyRequest, context: Context) -> pb.ServerReadyResponse:  # noqa: N802
        return pb.ServerReadyResponse(ready=self._is_ready)

    async def ModelReady(self, wire: pb.ModelReadyRequest, context: Context) -> pb.ModelReadyResponse:  # noqa: N802
        try:
            _check_model(wire.name, wire.version, self._pipeline.model)
        except UnknownModel:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=self._is_ready)

    async def ServerMetadata(  # noqa: N802
        self, wire: pb.ServerMetadataRequest, context: Context
    ) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(name="expert-pager", version=__version__, extensions=("model_stream_infer",))

    async def ModelMetadata(  # noqa: N802
        self, wire: pb.ModelMetadataRequest, context: Context
    ) -> pb.ModelMetadataResponse:
        model = self._pipeline.model
        _check_model(wire.name, wire.version, model)
        tensor = pb.ModelMetadataResponse.TensorMetadata
        return pb.ModelMetadataResponse(
            name=wire.name or model.name,
            versions=[model.fingerprint],
            platform="expert-pager",
            inputs=[tensor(name=INPUT, datatype="BYTES", shape=[1])],
            outputs=[tensor(name=OUTPUT, datatype="BYTES", shape=[1])],
        )

    async def ModelInfer(self, wire: pb.ModelInferRequest, context: Context) -> pb.ModelInferResponse:  # noqa: N802
        ask = self._ask(wire)
        choice = openai.Choice(0, 0)

        async def add(chunk: TokenChunk) -> None:
            choice.add(chunk)

        await self._pipeline.generate(self._call_of(context), ask, add)
        return _response(wire, ask.id, self._pipeline.model, choice.text, choice.usage)

    # Its messages arrive as bytes: each is checked and parsed as a call of its own, whose error is an answer.
    async def ModelStreamInfer(  # type: ignore[override] # noqa: N802
        self, messages: AsyncIterator[bytes], context: Context
    ) -> None:
        room, writing = asyncio.Semaphore(MAX_IN_FLIGHT), asyncio.Lock()

        async def write(answer: pb.ModelStreamInferResponse) -> None:
            try:
                async with writing, asyncio.timeout(self._write_timeout_s):
                    await context.write(answer)
            except TimeoutError:
                raise SlowReader(f"the client read nothing for {self._write_timeout_s:g} s; read faster") from None

        async def run(data: bytes) -> None:
            ids: list[str] = []

            async def answer(wire: pb.ModelInferRequest) -> None:
                ids.append(wire.id)
                await self._stream(wire, context, write)

            error = await self._one_of_stream(data, context, answer)
            if isinstance(error, SlowReader):
                raise error
            if error is not None:
                failed = pb.ModelInferResponse(id=ids[0] if ids else "")
                await write(pb.ModelStreamInferResponse(error_message=error.message, infer_response=failed))

        async with asyncio.TaskGroup() as group:
            async for data in messages:
                await room.acquire()
                group.create_task(run(data)).add_done_callback(lambda _: room.release())

    async def _stream(
        self,
        wire: pb.ModelInferRequest,
        context: Context,
        write: Callable[[pb.ModelStreamInferResponse], Awaitable[None]],
    ) -> None:
        ask = self._ask(wire)

        async def send(chunk: TokenChunk) -> None:
            response = _response(wire, ask.id, self._pipeline.model, chunk.text, chunk.usage)
            response.parameters[FINAL].bool_param = chunk.usage is not None
            await write(pb.ModelStreamInferResponse(infer_response=response))

        await self._pipeline.generate(self._call_of(context), ask, send)

    @property
    def _is_ready(self) -> bool:
        workers = self._pipeline.cluster.workers()
        return not self._pipeline.admission.is_closed and any(each.state == WorkerState.READY for each in workers)

    def _ask(self, wire: pb.ModelInferRequest) -> Ask:
        """Reads a request. Raises InvalidRequest, UnknownModel, PoolTooSmall or PromptTooLong."""
        id_ = requests.request_id(wire.id) if wire.id else requests.new_id()
        request_id.set(id_)
        tracing.note(request_id=id_)
        model, default = self._pipeline.model, self._pipeline.default_pool
        name = wire.model_name or model.name
        _check_model(name, wire.model_version, model)
        _check_outputs(wire)
        text = _text(wire)
        asked = openai.CompletionRequest.read({"model": name, "prompt": text, **_parameters(wire.parameters)})
        return Ask(
            id=id_,
            prompt=text,
            sampling=openai.checked(asked.sampling_of(model.token_limit), model, asked),
            has_max_tokens=asked.has_max_tokens,
            pool=openai.model_and_pool(name, asked.pool, asked.drift, model, default),
        )


def _check_model(name: str, version: str, model: ModelInfo) -> None:
    """Raises UnknownModel for another model, or another version of it."""
    requests.check_model(name.partition(":")[0], model)
    if version and version != model.fingerprint:
        raise UnknownModel(
            f"version {version[:100]!r} of {model.name!r} is not served here; leave it empty for {model.fingerprint!r}",
            field="model_version",
        )


def _check_outputs(wire: pb.ModelInferRequest) -> None:
    for each in wire.outputs:
        if each.name != OUTPUT:
            raise InvalidRequest(f"there is no output {each.name[:100]!r}; ask for `{OUTPUT}`", field="outputs")
        for name in each.parameters:
            raise InvalidRequest(f"an output has no parameter {name[:100]!r} here; leave it out", field="outputs")


def _text(wire: pb.ModelInferRequest) -> str:
    """Returns the prompt. Raises InvalidRequest for anything but one text."""
    names = [each.name for each in wire.inputs]
    if names != [INPUT]:
        raise InvalidRequest(
            f"the inputs are {', '.join(names)[:200] or 'none'}; give one, `{INPUT}`, and the rest as parameters",
            field="inputs",
        )
    [tensor] = wire.inputs
    if tensor.datatype != "BYTES" or list(tensor.shape) not in ([1], [1, 1]):
        shape = ", ".join(map(str, tensor.shape[:8]))
        raise InvalidRequest(
            f"`{INPUT}` is {tensor.datatype[:20]} of shape [{shape}]; give one prompt as BYTES of shape [1]",
            field=INPUT,
        )
    for name in tensor.parameters:
        raise InvalidRequest(f"an input has no parameter {name[:100]!r} here; leave it out", field=INPUT)
    if wire.raw_input_contents:
        return requests.text(_element(wire.raw_input_contents), INPUT, "the prompt")
    if len(tensor.contents.bytes_contents) != 1:
        raise InvalidRequest(
            f"`{INPUT}` has {len(tensor.contents.bytes_contents)} elements in its contents; give one", field=INPUT
        )
    return requests.text(tensor.contents.bytes_contents[0], INPUT, "the prompt")


def _element(raw: Any) -> bytes:
    """Returns the one element of the one tensor in raw contents. Raises InvalidRequest."""
    data: bytes = raw[0]
    if len(raw) != 1 or len(data) < 4 or struct.unpack_from("<I", data)[0] != len(data) - 4:
        raise InvalidRequest(
            f"the raw contents of `{INPUT}` are not one element: its length in 4 bytes, little endian, and its bytes",
            field="raw_input_contents",
        )
    return data[4:]


def _parameters(given: Mapping[str, pb.InferParameter]) -> dict[str, Any]:
    """Returns the fields of a completion. Raises InvalidRequest for fields that this protocol has no answer for."""
    fields: dict[str, Any] = {}
    for name, parameter in given.items():
        if name in _REFUSED:
            raise InvalidRequest(f"`{name}` is not a parameter here: one text has one answer", field=name)
        kind = parameter.WhichOneof("parameter_choice")
        if name in _IGNORED or kind is None:
            continue
        value = getattr(parameter, kind)
        if name in _OF_JSON or (name == "stop" and isinstance(value, str) and value.startswith("[")):
            try:
                value = json.loads(value)
            except (TypeError, ValueError):
                raise InvalidRequest(f"the parameter `{name}` is not JSON in a string", field=name) from None
        fields[name] = value
    return fields


def _response(
    wire: pb.ModelInferRequest, id_: str, model: ModelInfo, text: str, usage: Usage | None
) -> pb.ModelInferResponse:
    """Returns an answer or a part of it; its contents are raw where the request's were."""
    tensor = pb.ModelInferResponse.InferOutputTensor(name=OUTPUT, datatype="BYTES", shape=[1])
    response = pb.ModelInferResponse(model_name=wire.model_name or model.name, model_version=model.fingerprint, id=id_)
    data = text.encode("utf-8", "replace")
    if wire.raw_input_contents:
        response.raw_output_contents.append(struct.pack("<I", len(data)) + data)
    else:
        tensor.contents.bytes_contents.append(data)
    response.outputs.append(tensor)
    if usage is not None:
        tokens = {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens}
        facts = {"finish_reason": openai.finish_reason(usage), **tokens, **(openai.paged([usage]) or {})}
        for name, value in facts.items():
            _set(response.parameters, name, value)
    return response


def _set(parameters: Any, name: str, value: str | int | float | None) -> None:
    """Sets a parameter of a response, unless its value is unknown."""
    if isinstance(value, str):
        parameters[name].string_param = value
    elif isinstance(value, int):
        parameters[name].int64_param = value
    elif value is not None:
        parameters[name].double_param = value
