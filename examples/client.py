"""Call a running service: what it serves, an answer as it comes, a named pool, many requests at once.

Start one with `expert-pager serve models/emo-tiny --expert-memory 25%`, then run `python examples/client.py [ADDRESS]`.
It needs `pip install ./client`, and neither torch nor transformers.
"""

from __future__ import annotations

import asyncio
import sys

from pager import AsyncClient, Client, PoolAsk, SamplingParams, Share
from pager.errors import PagerError

EXAMPLES = (
    "-- Which team has more than 20 points?\nSELECT TEAM FROM table WHERE POINTS > 20 ;",
    "SELECT COUNT(*) FROM t",
)
PROMPTS = ("SELECT name FROM users WHERE", "SELECT MAX(points) FROM table WHERE", "-- How many are there?\nSELECT")
SAMPLING = SamplingParams(max_tokens=24)


def main(address: str = "localhost:50051") -> None:
    with Client(address, timeout_s=120) as client:
        client.wait_until_ready()
        model = client.model()
        print(f"{model.name} with {sum(model.facts.routed_per_layer)} routed experts, {model.num_slots} slots")

        with client.generate(PROMPTS[0], SAMPLING, Share(0.125)) as answer:
            for chunk in answer:
                print(chunk.text, end="", flush=True)
        usage = answer.usage
        assert usage is not None, "the last chunk brings it"
        print(f"\n{usage.paging.experts_hit} experts were loaded, {usage.paging.experts_missed} were paged in")

        named = client.calibrate("sql", EXAMPLES, Share(0.125), replaces=True)
        print(f"pool {named.name!r} of {named.pool.num_experts} experts, from {named.num_tokens} tokens")
    asyncio.run(ask_all(address))


async def ask_all(address: str) -> None:
    """Asks all prompts at once, each within the named pool."""
    async with AsyncClient(address, timeout_s=120) as client:
        answers = [client.generate(prompt, SAMPLING, PoolAsk(name="sql")) for prompt in PROMPTS]
        for prompt, text in zip(PROMPTS, await asyncio.gather(*(answer.text() for answer in answers)), strict=True):
            print(f"{prompt}{text}")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except PagerError as error:
        sys.exit(f"{error}")
