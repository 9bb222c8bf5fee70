"""Calls of a service as tritonclient makes them: `python triton_calls.py HOST:PORT`; prints what came back as JSON.

In a process of its own: tritonclient brings messages of the same names as the service's.
"""

from __future__ import annotations

import json
import queue
import sys
from typing import Any

import numpy as np
import tritonclient.grpc as triton  # type: ignore[import-untyped]
from tritonclient.utils import InferenceServerException  # type: ignore[import-untyped]

MODEL = "tiny"


def text_input(text: str) -> Any:
    tensor = triton.InferInput("text_input", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([text.encode()], dtype=np.object_))
    return tensor


def parameter(response: Any, name: str) -> Any:
    value = response.parameters[name]
    return getattr(value, value.WhichOneof("parameter_choice"))


def infer(client: Any, text: str = "abc", model: str = MODEL, **options: Any) -> dict[str, Any]:
    try:
        result = client.infer(model, [text_input(text)], **options)
    except InferenceServerException as error:
        return {"status": error.status(), "message": error.message()}
    response = result.get_response()
    return {
        "id": response.id,
        "text": result.as_numpy("text_output")[0].decode(),
        **{name: parameter(response, name) for name in ("finish_reason", "completion_tokens", "mode")},
    }


def stream(client: Any, *texts: str) -> list[dict[str, Any]]:
    """The parts that come for several requests on one stream; the id of each is its text."""
    parts: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
    client.start_stream(lambda result, error: parts.put((result, error)))
    for text in texts:
        sampling = {"max_tokens": 3} if text != "bad" else {"max_tokens": 3, "colour": "red"}
        client.async_stream_infer(
            MODEL, [text_input(text)], request_id=text, parameters=sampling, enable_empty_final_response=True
        )
    seen: list[dict[str, Any]] = []
    while sum(part.get("final", False) or "error" in part for part in seen) < len(texts):
        result, error = parts.get(timeout=60)
        if error is not None:
            seen.append({"error": error.message()})
            continue
        response = result.get_response()
        final = parameter(response, "triton_final_response")
        seen.append({"id": response.id, "text": result.as_numpy("text_output")[0].decode(), "final": final})
    client.stop_stream()
    return seen


def main(address: str) -> None:
    client = triton.InferenceServerClient(address)
    metadata = client.get_model_metadata(MODEL, as_json=True)
    json.dump(
        {
            "live": client.is_server_live(),
            "ready": client.is_server_ready(),
            "model_ready": [client.is_model_ready(MODEL), client.is_model_ready("other")],
            "server": client.get_server_metadata(as_json=True),
            "model": metadata,
            "answer": infer(client, request_id="r1", parameters={"max_tokens": 5, "temperature": 0, "pool": "2"}),
            "unknown_model": infer(client, model="other"),
            "unknown_parameter": infer(client, parameters={"colour": "red"}),
            "no_choices": infer(client, parameters={"n": 2}),
            "too_long": infer(client, text="x" * 100_000),
            "tenant": infer(client, headers={"x-tenant-id": "no tenant!"}),
            "parts": stream(client, "one", "bad", "two"),
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main(sys.argv[1])
