"""Make a named pool from examples, generate within it, and see in the service's metrics what that saved.

Start a service with `expert-pager serve models/emo-tiny --expert-memory 25%`, then run
`python examples/named_pool.py [ADDRESS] [METRICS_URL]`. It needs `pip install ./client`.
"""

from __future__ import annotations

import re
import sys
import urllib.request

from pager import Client, PoolAsk, SamplingParams, Share
from pager.errors import PagerError

EXAMPLES = (
    "SELECT name, price FROM products WHERE price > 10 ORDER BY price",
    "SELECT count(*) FROM orders JOIN users ON orders.user_id = users.id",
    "CREATE TABLE invoices (id INTEGER PRIMARY KEY, total NUMERIC NOT NULL)",
)
PROMPTS = ("SELECT id FROM", "SELECT max(total) FROM", "SELECT sum(price) FROM")


def main(address: str = "localhost:50051", metrics_url: str = "http://localhost:9464/metrics") -> None:
    with Client(address, timeout_s=120) as client:
        client.wait_until_ready()
        named = client.calibrate("sql", EXAMPLES, Share(0.125), replaces=True)
        print(f"pool {named.name!r}: {named.pool.num_experts} experts, chosen by {named.method}")
        print("kept:", ", ".join(pool.name for pool in client.list_pools().pools))
        for prompt in PROMPTS:
            before = paged_bytes(metrics_url)
            answer = client.generate(prompt, SamplingParams(max_tokens=24), PoolAsk(name="sql"))
            text = answer.text()
            usage = answer.usage
            assert usage is not None, "the last chunk brings it"
            print(f"\n{prompt}{text}")
            print(
                f"{usage.paging.experts_hit} experts hit, {usage.paging.experts_missed} missed; "
                f"by the metrics, {paged_bytes(metrics_url) - before} bytes paged"
            )


def paged_bytes(metrics_url: str) -> int:
    """The bytes of experts that workers have read for requests so far, from the router's /metrics."""
    with urllib.request.urlopen(metrics_url, timeout=10) as page:
        text = page.read().decode()
    values = re.findall(r"^expert_pager_router_paged_bytes_total\{.*?\} (\S+)$", text, re.MULTILINE)
    return int(sum(map(float, values)))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except PagerError as error:
        sys.exit(f"{error}")
