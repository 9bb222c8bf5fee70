"""What is measured, under which names. The only package below the router that imports prometheus_client."""

from pager.metrics.server import MetricsServer
from pager.metrics.worker import EngineLoad, TierBytes, WorkerMetrics
from pager.metrics.worker_families import OUTCOMES

__all__ = ["OUTCOMES", "EngineLoad", "MetricsServer", "TierBytes", "WorkerMetrics"]
