"""The Python client, blocking and for asyncio, against a router service and against strangers."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client import CollectorRegistry

from pager import AsyncClient, Client, Count, DriftPolicy, ExpertPool, PoolAsk, SamplingParams
from pager.cluster.placement import WorkerView
from pager.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    NotReady,
    PagerError,
    PoolNameInUse,
    PromptTooLong,
    ServiceUnreachable,
    UnknownPool,
    WorkerLost,
)
from pager.observe.metrics import MetricsServer
from pager.types import ModelInfo, PoolSource, RoutingFacts
from tests.router_service.conftest import InProcessCluster, Running

ROOT = Path(__file__).parents[2]
WAIT_S = 60.0
TWO = SamplingParams(max_tokens=2)


@pytest.fixture
async def call(service: Any) -> Any:
    """`await call(use)`: what `use(client)` returns for a blocking client of the service, in another thread."""

    async def call(use: Callable[[Client], Any], **options: Any) -> Any:
        def run() -> Any:
            with Client(f"127.0.0.1:{service.server.port}", timeout_s=WAIT_S, **options) as client:
                return use(client)

        return await asyncio.to_thread(run)

    return call


@pytest.fixture
async def client(service: Any) -> Any:
    async with AsyncClient(f"127.0.0.1:{service.server.port}", timeout_s=WAIT_S) as client:
        yield client


async def until(holds: Callable[[], Any]) -> None:
    end_s = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < end_s
        await asyncio.sleep(0.01)


# --- answers --------------------------------------------------------------------------------------------------------


async def test_an_answer_comes_chunk_by_chunk_and_ends_with_its_usage(service: Running, call: Any) -> None:
    def use(client: Client) -> Any:
        answer = client.generate("hi", SamplingParams(max_tokens=3), Count(4))
        return list(answer), answer.usage

    chunks, usage = await call(use, tenant="acme")
    assert [(chunk.text, chunk.token_ids) for chunk in chunks] == [("h", (104,)), ("i", (105,)), ("h", (104,))]
    assert [chunk.usage for chunk in chunks] == [None, None, usage]
    assert (usage.mode, usage.completion_tokens, usage.pool.num_experts) == ("pool", 3, 8)
    [(_, request)] = service.cluster.received
    assert (request.tenant, request.pool.size) == ("acme", Count(4))


async def test_the_service_chooses_a_length_where_none_is_given(service: Running, client: Any) -> None:
    assert len(await client.generate("hi").text()) == 46  # what is left of its 48
    assert len(await client.generate("hi", SamplingParams(top_k=1), has_max_tokens=False).text()) == 46
    with pytest.raises(PromptTooLong):
        await client.generate("hi", SamplingParams(max_tokens=128)).text()


async def test_everything_that_is_asked_arrives(service: Running, client: Any) -> None:
    fixed = ExpertPool(((), (1, 3), (0, 7)))
    drift = DriftPolicy(0.25, window=8)
    sampling = SamplingParams(max_tokens=1, temperature=0.5, top_p=0.75, top_k=3, seed=9, stop=("x",), ignore_eos=True)
    await client.generate([1, 2], sampling, PoolAsk(fixed=fixed, drift=drift), request_id="mine").text()
    [(_, request)] = service.cluster.received
    assert (request.id, request.prompt_token_ids, request.sampling) == ("mine", (1, 2), sampling)
    assert (request.pool.fixed, request.pool.source, request.pool.drift) == (fixed, PoolSource.FIXED, drift)


async def test_log_probabilities_are_asked_for_and_arrive(service: Running, client: Any) -> None:
    await client.generate("hi", SamplingParams(max_tokens=1, logprobs=2, logit_bias=((5, 1.5),))).text()
    [(_, request)] = service.cluster.received
    assert (request.sampling.logprobs, request.sampling.logit_bias) == (2, ((5, 1.5),))


async def test_several_answers_come_apart(service: Running, client: Any) -> None:
    sampling = SamplingParams(max_tokens=3, n=2)
    assert await client.generate("hi", sampling).texts() == ["hih", "ihi"]
    assert await client.generate("hi", sampling).text() == "hih"
    chunks = [chunk async for chunk in client.generate("hi", sampling)]
    assert [(chunk.index, chunk.usage is not None) for chunk in chunks] == [
        *[(0, False), (1, False)] * 2,
        *[(0, True), (1, True)],
    ]
    assert [request.sampling.n for _, request in service.cluster.received] == [2, 2, 2]
    assert service.pipeline.admission.num_tokens == 0
    with pytest.raises(InvalidRequest, match=r"sampling\.n"):
        await client.generate("hi", SamplingParams(n=33)).text()


async def test_leaving_the_block_ends_the_request(service: Running, client: Any) -> None:
    service.cluster.hold[1] = asyncio.Event()
    async with client.generate("hi", TWO) as answer:
        assert (await anext(aiter(answer))).text == "h"
    await until(lambda: service.cluster.cancelled == [answer.request_id])
    with pytest.raises(Cancelled):
        await answer.text()


async def test_a_request_is_aborted_by_its_id(service: Running, client: Any, call: Any) -> None:
    service.cluster.hold[1] = asyncio.Event()
    answer = client.generate("hi", TWO)
    assert (await anext(aiter(answer))).text == "h"
    assert await call(lambda other: other.abort(answer.request_id)) is True
    assert await client.abort("nobody") is False


# --- the other methods ----------------------------------------------------------------------------------------------


async def test_the_model_is_read_with_its_facts(client: Any, model: ModelInfo, facts: RoutingFacts) -> None:
    found = await client.model()
    assert found.facts.routed_per_layer == facts.routed_per_layer
    assert (found.name, found.token_limit, found.num_slots) == (model.name, model.token_limit, 16)


async def test_residency_has_a_mask_a_layer(service: Running, client: Any, call: Any) -> None:
    service.cluster.change("w1", resident=(0, 0b101, 0b10000000), state="draining", waiting=3)
    first, second = await client.residency()
    assert (first.id, first.state, first.num_resident) == ("w0", "ready", 0)
    assert (second.state, second.waiting, second.resident, second.num_resident) == ("draining", 3, (0, 5, 128), 3)
    assert await call(lambda client: client.residency()) == (first, second)


async def test_a_route_has_scores_a_pool_and_a_place(client: Any, call: Any, facts: RoutingFacts) -> None:
    answer = await client.route("hi", Count(4))
    assert (answer.source, answer.num_tokens, answer.worker) == ("trunk", 2, "w0")
    assert tuple(map(len, answer.scores)) == facts.routed_per_layer
    assert answer.missing_bytes == 1000 * answer.pool.num_experts == 8000
    assert await call(lambda client: client.route([104, 105], Count(4))) == answer


async def test_a_named_pool_is_made_used_listed_and_deleted(service: Running, client: Any, call: Any) -> None:
    named = await client.calibrate("law", ["hello", [1, 2, 3]], Count(4))
    assert (named.name, named.num_examples, named.num_tokens) == ("law", 2, 8)
    with pytest.raises(PoolNameInUse):
        await client.calibrate("law", ["hello"], Count(4))
    again = await call(lambda client: client.calibrate("law", ["hello"], Count(4), method="trunk", replaces=True))
    assert (await client.list_pools()).pools == (again,)
    await client.generate("hi", TWO, PoolAsk(name="law")).text()
    assert service.cluster.received[0][1].pool.fixed == again.pool
    assert await call(lambda client: client.delete_pool("law")) is True
    assert await client.delete_pool("law") is False


# --- errors ---------------------------------------------------------------------------------------------------------


async def test_an_error_is_of_its_class_with_what_it_says(service: Running, client: Any, call: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"top_p = 7") as caught:
        await call(lambda client: client.generate("hi", SamplingParams(top_p=7.0)).text())
    assert (caught.value.field, caught.value.status) == ("sampling.top_p", "INVALID_ARGUMENT")
    with pytest.raises(UnknownPool, match="no pool 'law'") as unknown:
        await client.route("hi", PoolAsk(name="law"))
    assert (unknown.value.field, unknown.value.status) == ("pool.name", "NOT_FOUND")
    service.cluster.fail = {worker: [(1, WorkerLost("it died", retry_after_s=0.5))] for worker in ("w0", "w1")}
    with pytest.raises(WorkerLost, match="it died") as lost:
        await client.generate("hi", TWO).text()
    assert (lost.value.retry_after_s, lost.value.retryable) == (0.5, True)


async def test_a_deadline_that_passes_is_one(service: Running, client: Any) -> None:
    service.cluster.hold[0] = asyncio.Event()
    with pytest.raises(DeadlineExceeded, match="allow more time"):
        await client.generate("hi", TWO, timeout_s=0.2).text()


@pytest.mark.parametrize("tenant", ["jörg", "a\nb"])
def test_a_tenant_that_no_header_can_hold_is_refused(tenant: str) -> None:
    with pytest.raises(InvalidRequest, match="has characters beyond"):
        Client("localhost:1", tenant=tenant)


@pytest.mark.parametrize("prompt", [[-1], [2**32], ["1"], "\ud800"], ids=repr)
async def test_what_no_message_can_hold_is_refused(client: Any, prompt: list[int] | list[str] | str) -> None:
    with pytest.raises(InvalidRequest, match="cannot hold"):
        await client.generate(prompt).text()
    with pytest.raises(InvalidRequest, match="cannot hold"):
        await client.calibrate("law", [prompt])


# --- readiness ------------------------------------------------------------------------------------------------------


async def test_waiting_ends_when_a_worker_is_ready(
    serve: Callable[..., Any],
    make_cluster: type[InProcessCluster],
    make_worker: Callable[..., WorkerView],
) -> None:
    cluster = make_cluster({"w0": make_worker("w0", state="starting")})
    async with serve(cluster) as service:
        address = f"127.0.0.1:{service.server.port}"

        def wait(timeout_s: float) -> None:
            with Client(address) as blocking:
                blocking.wait_until_ready(timeout_s)

        async with AsyncClient(address) as client:
            for refused in (client.wait_until_ready(0.1), asyncio.to_thread(wait, 0.1)):
                with pytest.raises(NotReady, match=r"not ready within 0\.1 s"):
                    await refused
            waiting = asyncio.gather(client.wait_until_ready(WAIT_S), asyncio.to_thread(wait, WAIT_S))
            cluster.change("w0", state="ready")
            await waiting


def test_waiting_for_nothing_ends() -> None:
    with ExitStack() as stack, Client(nothing(stack)) as client, pytest.raises(NotReady, match="not ready within"):
        client.wait_until_ready(0.3)


# --- strangers ------------------------------------------------------------------------------------------------------


def http(stack: ExitStack) -> str:
    """The metrics port of a service is the likeliest mistake."""
    server = MetricsServer(CollectorRegistry(), "127.0.0.1")
    stack.callback(server.close)
    return server.address


def other_grpc(stack: ExitStack) -> str:
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("[::1]:0")
    server.start()
    stack.callback(server.stop, 0)
    return f"[::1]:{port}"


def nothing(stack: ExitStack) -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def hangs_up(stack: ExitStack) -> str:
    """As Redis with TLS does, and many others."""
    server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    threads = stack.enter_context(ThreadPoolExecutor(1))

    def refuse_all() -> None:
        try:
            while True:
                server.accept()[0].close()
        except OSError:
            return

    threads.submit(refuse_all)
    stack.callback(server.shutdown, socket.SHUT_RDWR)
    return f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.mark.parametrize(
    ("listen", "kind", "message"),
    [
        (
            http,
            ServiceUnreachable,
            "no service answers at {}: another program, or a service that takes TLS, has that port (",
        ),
        (other_grpc, PagerError, "what answers at {} is no expert-pager service, or one of another version ("),
        (nothing, ServiceUnreachable, "no service answers at {}: ("),
        (hangs_up, ServiceUnreachable, "no service answers at {}: ("),
    ],
)
def test_what_is_no_service_of_ours_is_said_to_be_that(
    stack: ExitStack, listen: Callable[[ExitStack], str], kind: type[PagerError], message: str
) -> None:
    address = listen(stack)
    with Client(address, timeout_s=WAIT_S) as client:
        for call in (lambda: client.generate("hi").text(), client.list_pools):
            with pytest.raises(PagerError) as caught:
                call()
            assert type(caught.value) is kind
            assert caught.value.message.startswith(message.format(address)), caught.value.message


# --- imports --------------------------------------------------------------------------------------------------------

ALONE = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        allowed = ("pager", "pager.client", "pager.errors", "pager.types", "pager.wire")
        is_ours = name.split(".")[0] == "pager" and name not in allowed
        if is_ours or name.split(".")[0] in ("torch", "numpy", "transformers", "ray", "psutil", "grpc_status"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name == "pager.engine" else found(name)
from pager import AsyncClient, Client, PoolAsk, Share
Client("localhost:1").close()
try:
    from pager import load_model
except ImportError as error:
    assert "only expert-pager-client is installed" in str(error), error
else:
    raise SystemExit("load_model came from nowhere")
"""


def test_the_client_needs_nothing_of_the_engine() -> None:
    path = os.pathsep.join([str(ROOT), str(ROOT / "protos")])
    command = [sys.executable, "-c", ALONE]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
