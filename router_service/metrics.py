"""What the router measures. The only module of the router that imports prometheus_client.

No request, prompt, tenant or expert id is ever a label.
"""

from __future__ import annotations

import errno
from threading import Thread
from wsgiref.simple_server import WSGIServer

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    start_http_server,
)

from pager.errors import ConfigError, PortInUse

FIRST_TOKEN_BUCKETS_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560
)  # fmt: skip
OUTPUT_TOKEN_BUCKETS_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
ROUTE_BUCKETS_S = (0.0001, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
RECALL_BUCKETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1)


class RouterMetrics:
    """Owns a registry of its own, so that two routers in one process do not meet."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"expert_pager_router_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"expert_pager_router_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"expert_pager_router_{name}", text, labels, buckets=buckets, registry=registry)

        self.requests = counter("requests", "Calls that ended, by method and gRPC status code.", "method", "code")
        self.requests_in_flight = gauge("requests_in_flight", "Admitted requests that have not ended.")
        self.tokens_in_flight = gauge("tokens_in_flight", "Prompt plus max_tokens of the admitted requests.")
        self.rejections = counter("admission_rejections", "Requests refused before any work, by reason.", "reason")
        self.first_token_seconds = histogram(
            "time_to_first_token_seconds", "From the call's arrival to its first token.", FIRST_TOKEN_BUCKETS_S
        )
        self.output_token_seconds = histogram(
            "time_per_output_token_seconds", "Mean gap between the tokens of an answer.", OUTPUT_TOKEN_BUCKETS_S
        )
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of finished answers.")
        self.generated_tokens = counter("generated_tokens", "Generated tokens of finished answers.")
        self.route_seconds = histogram(
            "route_seconds", "Time to predict a pool, by what predicted it.", ROUTE_BUCKETS_S, "source"
        )
        self.recall = histogram(
            "recall_ratio",
            "Share of the prefill's pool that was predicted, by what predicted it.",
            RECALL_BUCKETS,
            "source",
        )
        self.escalations = counter(
            "escalations", "Prompts for which a source was expected to recall too little.", "from", "to"
        )
        self.hint_lookups = counter("hint_lookups", "Look-ups of an observed pool by prompt prefix.", "result")
        self.replacements = counter("replacements", "Requests placed again because their worker was lost.")
        self.redis_degraded = gauge("redis_degraded", "1 while Redis is configured and does not answer.")
        self.workers = gauge("workers", "Workers by state.", "state")
        self._server: tuple[WSGIServer, Thread] | None = None

    def serve(self, host: str, port: int) -> int:
        """Answers on http://host:port/metrics and returns the port (port 0 takes a free one). Raises PortInUse."""
        try:
            self._server = start_http_server(port, addr=host, registry=self.registry)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise PortInUse(
                    f"metrics port {port} on {host} is in use; choose another (router.metrics_port)"
                ) from None
            raise ConfigError(f"metrics can not listen on {host}:{port}: {error.strerror or error}") from None
        return int(self._server[0].server_port)

    def close(self) -> None:
        if self._server is not None:
            server, thread = self._server
            server.shutdown()
            server.server_close()
            thread.join()
            self._server = None
