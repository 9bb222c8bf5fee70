"""Turns of a conversation over HTTP, in a service whose pools come from the codebook, as they do by default."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai

SAID = {  # and whether a codeword covers it
    "Which hotel is open near the lake, and how was the breakfast there? The staff were friendly.": True,
    "fn main() { let x: Vec<u32> = Vec::new(); }": False,
}
FOLLOWING = ("SELECT name FROM users WHERE id = 3", "The patient received 20 mg daily.", "Where?")


def test_a_conversation_keeps_its_pool_and_reads_only_what_is_new(
    tmp_path: Path, serve: Callable[..., Any], model: Path
) -> None:
    """Whether a codeword covers it or not, and whatever else comes up in it."""
    options = ("--dtype", "float32", "--expert-memory", "25%", "--pool", "12.5%")
    with (
        serve(tmp_path / "service", model, *options, EXPERT_PAGER_POOLS_DEFAULT_SOURCE="auto") as service,
        openai.OpenAI(base_url=f"{service.ready['http_url']}/v1", api_key="none", max_retries=0, timeout=120) as client,
    ):
        for said, is_covered in SAID.items():
            messages: Any = [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": said}]
            pools, before = set(), 0
            for following in FOLLOWING:
                answer = client.chat.completions.create(
                    model="emo-tiny", messages=messages, max_tokens=24, temperature=0
                )
                usage, content = answer.usage, answer.choices[0].message.content
                assert usage is not None
                assert usage.model_extra is not None
                assert usage.prompt_tokens_details is not None
                paged = usage.model_extra["expert_pager"]
                assert (paged["codeword"] is not None) is is_covered
                pools.add(paged["pool"])
                assert (usage.prompt_tokens_details.cached_tokens or 0) >= before - before % 16
                before = usage.prompt_tokens
                messages += [{"role": "assistant", "content": content}, {"role": "user", "content": following}]
            assert len(pools) == 1
