"""Runs workers as Ray actors, supervises them and carries their tokens: `Cluster`. No other package imports ray."""

import os

# Ray and gRPC read these when they are imported.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray sends no usage statistics to its makers
os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # log every worker's lines, rather than "repeated 3x across cluster"
# a worker that stops closes its streams with GOAWAY, which is not worth a log line
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
# How long Ray waits for a process that it has started: its defaults of 30 and 60 s are too short for a busy machine.
os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "180")
os.environ.setdefault("RAY_worker_register_timeout_seconds", "180")
# The workers are the service: at Ray's default niceness of 15, anything else on a busy machine would come first.
os.environ.setdefault("RAY_worker_niceness", "0")
# One arena of malloc for all threads of a worker, the one that grows in place. In those of other threads, which grow by
# heaps of 64 MiB, the buffers that a step takes anew may begin a heap, which is given back and mapped again each time.
os.environ.setdefault("MALLOC_ARENA_MAX", "1")
