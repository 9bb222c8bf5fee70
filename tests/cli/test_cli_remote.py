"""A client that calls what is no service of ours, or one that wants to be spoken to in another way."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import grpc
import pytest
from prometheus_client import CollectorRegistry

from pager.cli.options import PoolAsk
from pager.cli.remote import Service
from pager.errors import PagerError
from pager.observe.metrics import MetricsServer
from pager.types import SamplingParams


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
    ("listen", "message"),
    [
        (http, "no service answers at {}: another program, or a service that takes TLS, has that port ("),
        (other_grpc, "what answers at {} is no expert-pager service, or one of another version ("),
        (nothing, "no service answers at {}: ("),
        (hangs_up, "no service answers at {}: ("),
    ],
)
def test_what_is_no_service_of_ours_is_said_to_be_that(
    stack: ExitStack, listen: Callable[[ExitStack], str], message: str
) -> None:
    address = listen(stack)
    with Service(address, "default", 60.0) as client:
        for call in (
            lambda: list(client.generate("hi", SamplingParams(max_tokens=1), PoolAsk())),
            client.named_pools,
        ):
            with pytest.raises(PagerError) as caught:
                call()
            assert caught.value.message.startswith(message.format(address)), caught.value.message
