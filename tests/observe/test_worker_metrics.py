"""The worker's metrics: names, labels and values as a scraper reads them over HTTP."""

import contextlib
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pager.errors import PortInUse
from pager.observe.metrics import MAX_CONNECTIONS, MetricsServer
from pager.observe.worker_metrics import OUTCOMES, LeastServed, TierBytes, WorkerMetrics
from pager.types import Account, DriftReport, ExpertPool, FinishReason, PagingCounts, Usage

pytestmark = pytest.mark.slow


@pytest.fixture
def metrics() -> WorkerMetrics:
    return WorkerMetrics()


@pytest.fixture
def server(metrics: WorkerMetrics) -> Iterator[MetricsServer]:
    server = MetricsServer(metrics.registry, "127.0.0.1")
    yield server
    server.close()


def scrape(server: MetricsServer) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    with urllib.request.urlopen(f"http://{server.address}/metrics") as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def test_facts_become_series(metrics: WorkerMetrics, server: MetricsServer) -> None:
    described = {"version": "1", "model": "m", "dtype": "float32", "device": "cpu", "fingerprint": "f", "plan": "p"}
    metrics.describe_model(described)
    status = SimpleNamespace(running=3, waiting=4, kv_blocks_used=2, kv_blocks_cached=5, kv_blocks_total=7)
    metrics.watch_engine(lambda: status, 1000)
    metrics.watch_tiers(lambda: {"device": TierBytes(capacity=400, resident=300, pinned=200, reserved=100)})
    metrics.lookups("device", "hit", 5)
    metrics.transferred("disk", "device", 4096, 0.25)
    metrics.transferred("disk", "host", 100, 0.5)
    metrics.evicted("demand", 2)
    metrics.paged("lease", 7, again=3)
    metrics.prefetched(used=5, wasted=2)
    metrics.stalled(0.5, "lease")
    metrics.quarantined("disk")
    paging = PagingCounts(bytes_from_disk=30, bytes_from_host=40)
    usage = Usage(
        mode="pool",
        finish_reason=FinishReason.STOP,
        prompt_tokens=10,
        completion_tokens=20,
        pool=ExpertPool(((1, 2, 3, 4), (), (5, 6))),
        paging=paging,
        out_of_pool_mass=0.125,
        predicted_recall=None,
        queue_s=0.5,
        time_to_first_token_s=1.0,
        model_fingerprint="f",
        drift=DriftReport(0.7, widenings=2, experts_added=30, exact_from=9),
        cached_prompt_tokens=8,
    )
    metrics.ended("stop", usage.account, usage, 0.25)
    metrics.ended("cancelled", Account(1), None, None)
    found = scrape(server)

    def value(name: str, **labels: str) -> float:
        return found["expert_pager_" + name, tuple(sorted(labels.items()))]

    assert value("lookups_total", tier="device", result="hit") == 5
    assert value("transfer_bytes_total", source="disk", destination="device") == 4096
    assert value("page_in_seconds_sum", source="disk") == 0.25
    assert value("evictions_total", cause="demand") == 2
    assert value("stall_seconds_sum", cause="lease") == 0.5
    assert value("quarantined_total", tier="disk") == 1
    assert (value("requests_running"), value("requests_waiting")) == (3, 4)
    assert (value("kv_used_bytes"), value("kv_cached_bytes"), value("kv_capacity_bytes")) == (2000, 5000, 7000)
    assert (value("prefix_hits_total"), value("cached_prompt_tokens_total")) == (1, 8)
    assert (value("pool_experts_sum"), value("pool_experts_count")) == (3, 1)
    assert value("out_of_pool_mass_ratio_sum") == 0.125
    assert (value("drift_widenings_total"), value("drift_experts_total"), value("drift_exact_total")) == (2, 30, 1)
    assert (value("prompt_tokens_total"), value("completion_tokens_total")) == (11, 20)
    assert (value("charged_bytes_total", source="disk"), value("charged_bytes_total", source="host")) == (30, 40)
    assert value("requests_total", outcome="stop") == value("requests_total", outcome="cancelled") == 1
    assert value("time_per_output_token_seconds_sum") == 0.25
    assert value("model_info", **described) == 1
    assert (value("page_ins_total", cause="lease"), value("paged_again_total", cause="lease")) == (7, 3)
    assert (value("prefetches_total", result="used"), value("prefetches_total", result="wasted")) == (5, 2)
    tiers = [value(f"{name}_bytes", tier="device") for name in ("capacity", "resident", "pinned", "reserved")]
    assert tiers == [400, 300, 200, 100]
    assert value("capacity_bytes", tier="host") == 0


def test_series_exist_before_anything_happened_and_labels_are_closed(
    metrics: WorkerMetrics, server: MetricsServer
) -> None:
    metrics.watch_tiers(dict)
    before = set(scrape(server))
    metrics.ended("an outcome nobody has heard of", Account(), None, None)
    for outcome in OUTCOMES:
        metrics.ended(outcome, Account(), None, None)
    for tier in ("host", "device"):
        metrics.lookups(tier, "hit_in_flight", 1)
    for cause in ("lease", "demand", "prefetch"):
        metrics.stalled(0.1, cause)
        metrics.evicted(cause, 1)
    metrics.transferred("host", "device", 1, 0.1)
    assert set(scrape(server)) == before
    labels = {name for _, pairs in before for name, _ in pairs}
    assert labels == {
        "tier", "result", "source", "destination", "cause", "outcome", "reason", "tenant", "le",
        "implementation", "major", "minor", "patchlevel", "version",
    }  # fmt: skip


def test_the_process_is_measured_too(server: MetricsServer) -> None:
    assert scrape(server)["process_resident_memory_bytes", ()] > 0


def test_a_port_in_use_is_refused_by_name(metrics: WorkerMetrics, server: MetricsServer) -> None:
    port = int(server.address.rpartition(":")[2])
    with pytest.raises(PortInUse, match=str(port)):
        MetricsServer(metrics.registry, "127.0.0.1", port)


# --- the port ---------------------------------------------------------------------------------------------------------


def status_of(server: MetricsServer, path: str) -> int:
    try:
        with urllib.request.urlopen(f"http://{server.address}{path}", timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


@contextlib.contextmanager
def half_asked(server: MetricsServer, count: int) -> Iterator[list[socket.socket]]:
    """So many connections whose requests never end."""
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(socket.create_connection(("127.0.0.1", server.port))) for _ in range(count)]
        for each in opened:
            each.sendall(b"GET /metrics HTTP/1.1\r\nX: ")
        yield opened


def wait_until(condition: Callable[[], bool]) -> None:
    give_up_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < give_up_s
        time.sleep(0.01)


def num_bytes_left(connection: socket.socket) -> int:
    """What can still be read until its end."""
    connection.settimeout(60)
    count = 0
    with contextlib.suppress(ConnectionResetError):
        while data := connection.recv(2**20):
            count += len(data)
    return count


def has_ended(connection: socket.socket) -> bool:
    connection.settimeout(60)
    with contextlib.suppress(ConnectionResetError):
        return connection.recv(1) == b""
    return True


def test_only_what_is_mounted_is_answered(server: MetricsServer) -> None:
    paths = ("/", "/metricsx", "/ui", "/favicon.ico", "/etc/passwd", "/metrics/", "/metrics/x")
    assert [status_of(server, path) for path in paths] == [404] * len(paths)
    server.mount("/ui", lambda environ, start_response: (start_response("200 OK", []), [b"hello"])[1])
    assert [status_of(server, path) for path in ("/metrics", "/ui", "/ui/x", "/uix")] == [200, 200, 200, 404]


def test_connections_that_never_ask_take_a_bounded_number_of_threads_and_nobodys_scrape(server: MetricsServer) -> None:
    before = threading.active_count()
    with half_asked(server, 5 * MAX_CONNECTIONS) as opened:
        for _ in range(5):
            assert status_of(server, "/metrics") == 200
            assert threading.active_count() - before <= MAX_CONNECTIONS
        assert has_ended(opened[0])


def test_a_request_that_comes_byte_by_byte_has_an_end(server: MetricsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(threading.enumerate())  # of which some may be connections that have not quite ended
    with half_asked(server, 1) as (slow,):
        wait_until(lambda: bool(set(threading.enumerate()) - before))
        monkeypatch.setattr("pager.observe.metrics.REQUEST_TIMEOUT_S", 0.2)

        def is_ended() -> bool:
            with contextlib.suppress(OSError):
                slow.sendall(b"x")
            return not set(threading.enumerate()) - before

        wait_until(is_ended)
    assert status_of(server, "/metrics") == 200


@pytest.mark.slow
def test_clients_that_read_nothing_give_their_threads_back(
    server: MetricsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pager.observe.metrics.CONNECTION_TIMEOUT_S", 1e9)
    server.mount("/ui", lambda environ, start_response: (start_response("200 OK", []), [b"x" * 2**26])[1])
    with contextlib.ExitStack() as stack:
        opened = []
        for _ in range(MAX_CONNECTIONS):
            opened.append(stack.enter_context(socket.create_connection(("127.0.0.1", server.port))))
            opened[-1].sendall(b"GET /ui HTTP/1.0\r\n\r\n")
        # All at once, however long a busy machine takes to accept them; only then is their time over.
        wait_until(lambda: len(server._server._connections) == MAX_CONNECTIONS)
        monkeypatch.setattr("pager.observe.metrics.CONNECTION_TIMEOUT_S", 2.0)
        wait_until(lambda: not server._server._connections)
        assert status_of(server, "/metrics") == 200
        assert all(num_bytes_left(each) < 2**26 for each in opened), "each was ended before its answer was sent whole"


def test_what_a_client_does_is_no_traceback_on_standard_error(
    server: MetricsServer, capfd: pytest.CaptureFixture[str]
) -> None:
    for data in (
        b"",
        b"\x16\x03\x01\x02\x00",
        b"GET /metrics HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n",
        b"G\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(data)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    assert status_of(server, "/metrics") == 200
    assert capfd.readouterr().err == ""


def test_the_tenant_that_is_served_least_is_seen_whoever_it_is() -> None:
    now_s = 0.0
    least = LeastServed(lambda: now_s)
    assert least.ratio() == 1.0
    least.add("small", 0, 400)
    assert least.ratio() == 1.0, "too little to tell"
    for _ in range(30):
        now_s += 1
        least.add("starved", 10, 100)
        least.add("flooding", 190, 100)
    assert least.ratio() == pytest.approx(0.1)
    now_s += 300
    for _ in range(100):
        now_s += 1
        least.add("starved", 100, 100)
    assert 0.7 < least.ratio() < 0.95, "what was is forgotten"
    now_s += 61
    assert least.ratio() == 1.0, "nobody is in line"
    for number in range(3 * LeastServed.MOST_TENANTS):
        least.add(f"t{number}", 1, 1000)
    assert least.ratio() == pytest.approx(0.001)
    assert len(least._tenants) == LeastServed.MOST_TENANTS


def test_a_tenant_that_metrics_do_not_name_is_in_the_least_ratio() -> None:
    metrics = WorkerMetrics(("acme",))
    metrics.shared_out("nobody", 100.0, 1000.0)
    metrics.shared_out("acme", 1000.0, 1000.0)
    assert metrics.registry.get_sample_value("expert_pager_tenant_least_served_ratio") == pytest.approx(0.1)
