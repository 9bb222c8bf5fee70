"""The Open Inference Protocol: with Triton's client, and for what that client does not send."""

from __future__ import annotations

import asyncio
import json
import struct
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
from expert_pager.inference import open_inference_pb2 as pb
from expert_pager.inference import open_inference_pb2_grpc as pb_grpc

from pager.types import Count
from tests.router_service.conftest import MODEL, Running
from tests.support.calls import details, failure, reason
from tests.support.waiting import eventually

TRITON_CALLS = Path(__file__).with_name("triton_calls.py")


def stub(service: Running) -> Any:
    return pb_grpc.GRPCInferenceServiceStub(service.channel)


def a_request(text: bytes = b"abc", **fields: Any) -> pb.ModelInferRequest:
    tensor = pb.ModelInferRequest.InferInputTensor(name="text_input", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append(text)
    return pb.ModelInferRequest(**{"model_name": "tiny", "inputs": [tensor], **fields})


async def test_tritons_client_works_as_it_is(service: Running) -> None:
    address = f"127.0.0.1:{service.server.port}"
    process = await asyncio.create_subprocess_exec(
        sys.executable, TRITON_CALLS, address, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    assert process.returncode == 0
    seen = json.loads(output)
    assert (seen["live"], seen["ready"], seen["model_ready"]) == (True, True, [True, False])
    assert seen["server"]["name"] == "expert-pager"
    assert seen["model"]["versions"] == [MODEL.fingerprint]
    assert seen["model"]["inputs"] == [{"name": "text_input", "datatype": "BYTES", "shape": ["1"]}]
    expected = {"id": "r1", "text": "abcab", "finish_reason": "length", "completion_tokens": 5, "mode": "pool"}
    assert seen["answer"] == expected
    assert seen["unknown_model"]["status"] == "StatusCode.NOT_FOUND"
    for name, word in (("unknown_parameter", "colour"), ("no_choices", "`n`"), ("too_long", "bytes"), ("tenant", "id")):
        assert seen[name]["status"] == "StatusCode.INVALID_ARGUMENT", name
        assert word in seen[name]["message"], name
    parts = seen["parts"]
    assert "".join(part["text"] for part in parts if part.get("id") == "one") == "one"
    assert "".join(part["text"] for part in parts if part.get("id") == "two") == "two"
    assert [part["final"] for part in parts if part.get("id") == "two"] == [False, False, True]
    assert ["colour" in part["error"] for part in parts if "error" in part] == [True]
    assert service.pipeline.admission.num_requests == 0
    assert service.metric("requests_total", method="ModelStreamInfer", code="OK") == 2
    assert service.metric("requests_total", method="ModelStreamInfer", code="INVALID_ARGUMENT") == 1


async def test_contents_that_are_not_raw_are_answered_in_kind(service: Running) -> None:
    reply = await stub(service).ModelInfer(a_request(parameters={"max_tokens": pb.InferParameter(int64_param=2)}))
    assert list(reply.outputs[0].contents.bytes_contents) == [b"ab"]
    assert not reply.raw_output_contents
    assert reply.id
    raw = a_request(raw_input_contents=[struct.pack("<I", 3) + b"xyz"])
    raw.inputs[0].ClearField("contents")
    assert (await stub(service).ModelInfer(raw)).raw_output_contents[0][4:].startswith(b"xyz")


async def test_parameters_are_the_fields_of_completions(service: Running) -> None:
    parameters = {
        "max_tokens": pb.InferParameter(int64_param=2),
        "temperature": pb.InferParameter(double_param=0.5),
        "stop": pb.InferParameter(string_param='["x", "y"]'),
        "logit_bias": pb.InferParameter(string_param='{"7": 1.5}'),
        "ignore_eos": pb.InferParameter(bool_param=True),
        "seed": pb.InferParameter(uint64_param=3),
        "pool": pb.InferParameter(string_param="3"),
    }
    await stub(service).ModelInfer(a_request(parameters=parameters))
    [(_, request)] = service.cluster.received
    sampling = request.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.seed) == (2, 0.5, 3)
    assert (sampling.stop, sampling.logit_bias, sampling.ignore_eos) == (("x", "y"), ((7, 1.5),), True)
    assert request.pool.size == Count(3)


@pytest.mark.parametrize(
    ("wire", "field"),
    [
        (pb.ModelInferRequest(model_name="tiny"), "inputs"),
        (a_request(b"\xff"), "text_input"),
        (a_request(b""), "text_input"),
        (a_request(raw_input_contents=[b"\x09\x00\x00\x00abc"]), "raw_input_contents"),
        (a_request(parameters={"logit_bias": pb.InferParameter(string_param="{")}), "logit_bias"),
        (a_request(parameters={"echo": pb.InferParameter(bool_param=True)}), "echo"),
        (a_request(outputs=[pb.ModelInferRequest.InferRequestedOutputTensor(name="logits")]), "outputs"),
        (a_request(id="two words"), "request_id"),
    ],
)
async def test_what_is_wrong_is_named(service: Running, wire: pb.ModelInferRequest, field: str) -> None:
    error = await failure(stub(service).ModelInfer(wire))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    [bad] = [each for kind, each in details(error).items() if kind.__name__ == "BadRequest"]
    assert bad.field_violations[0].field == field
    assert service.cluster.received == []


async def test_another_version_of_the_model_is_not_there(service: Running) -> None:
    assert reason(await failure(stub(service).ModelInfer(a_request(model_version="7")))) == "UNKNOWN_MODEL"
    assert (await stub(service).ModelInfer(a_request(model_version=MODEL.fingerprint))).model_version
    ready = await stub(service).ModelReady(pb.ModelReadyRequest(name="tiny", version="7"))
    assert not ready.ready


async def test_a_service_that_drains_is_live_and_not_ready(service: Running) -> None:
    service.pipeline.admission.close()
    assert (await stub(service).ServerLive(pb.ServerLiveRequest())).live
    assert not (await stub(service).ServerReady(pb.ServerReadyRequest())).ready


async def test_a_cancelled_stream_ends_all_its_requests(service: Running) -> None:
    service.cluster.hold[1] = asyncio.Event()
    call = stub(service).ModelStreamInfer()
    for index in range(3):
        await call.write(a_request(id=f"r{index}"))
    await eventually(lambda: len(service.cluster.open) == 3)
    call.cancel()
    await eventually(lambda: not service.pipeline.admission.num_requests)
    assert sorted(service.cluster.cancelled) == ["r0", "r1", "r2"]


async def test_a_damaged_message_of_a_stream_fails_by_itself(service: Running) -> None:
    path = "/inference.GRPCInferenceService/ModelStreamInfer"
    channel: Any = service.channel
    call = channel.stream_stream(path, response_deserializer=pb.ModelStreamInferResponse.FromString)()
    await call.write(b"\x07\xff")
    assert "cannot be parsed" in (await call.read()).error_message
    await call.write(
        a_request(id="good", parameters={"max_tokens": pb.InferParameter(int64_param=1)}).SerializeToString()
    )
    assert (await call.read()).infer_response.id == "good"
    await call.done_writing()
    assert await call.code() is grpc.StatusCode.OK
