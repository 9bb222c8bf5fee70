"""Workers as Ray actors, their supervision, and the way of tokens. The only package that imports ray; see `Cluster`."""

import os

# Ray and gRPC read these when they are imported.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing about a service is reported to anybody
os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # every worker's log lines, not "repeated 3x across cluster"
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # a worker that stops says goodbye on its streams; that is no news
# How long Ray waits for a process that it has started: the 30 and 60 s of its own are too short for a busy machine.
os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "180")
os.environ.setdefault("RAY_worker_register_timeout_seconds", "180")
# Workers are the service: at the 15 that Ray gives them, anything else on a busy machine comes first.
os.environ.setdefault("RAY_worker_niceness", "0")
