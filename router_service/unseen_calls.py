"""Calls that gRPC ends before the service sees them, from the books that its core keeps (channelz)."""

from __future__ import annotations

import json
from collections import deque

from grpc._cython import cygrpc  # type: ignore[attr-defined]

NUM_LOOKS = 40

# Of a server that is watched: without it the core keeps no books.
WATCHED = ("grpc.enable_channelz", 1)


def watched_servers() -> set[int]:
    """The ids of all servers of this process that are watched and have not ended."""
    found: set[int] = set()
    while True:
        page = json.loads(cygrpc.channelz_get_servers(max(found, default=0) + 1))
        found |= {int(server["ref"]["serverId"]) for server in page.get("server", ())}
        if page.get("end", True):
            return found


class UnseenCalls:
    """Counts what a server's core has started and the service never saw.

    A call that still waits for the event loop is no such call: one counts when it was missing at `NUM_LOOKS` looks in a
    row. Calls that waited for longer and were counted all the same are set off against those that come after them.
    """

    def __init__(self, server_id: int) -> None:
        self._server_id = server_id
        self._missing: deque[int] = deque(maxlen=NUM_LOOKS)
        self._num_counted = 0

    def look(self, num_seen: int) -> int:
        """How many are new. `num_seen`: how many calls the service has seen until now."""
        server = json.loads(cygrpc.channelz_get_server(self._server_id))["server"]
        self._missing.append(int(server["data"].get("callsStarted", 0)) - num_seen)
        if len(self._missing) < NUM_LOOKS:
            return 0
        num_new = max(0, min(self._missing) - self._num_counted)
        self._num_counted += num_new
        return num_new
