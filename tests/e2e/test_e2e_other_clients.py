"""The service as the README starts it, and its calls word for word: from Python, Node, curl and buf. guidellm, too."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from expert_pager.v1 import expert_pager_pb2 as pb

from tests.support.files import EMO_TINY
from tests.support.processes import program_of

ROOT = Path(__file__).parents[2]
PROMPT = "SELECT name FROM users WHERE"


@pytest.fixture(scope="module")
def started(serve: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The service that the README starts."""
    (command,) = (block for block in blocks("README.md", "console") if "expert-pager serve models/emo-tiny --" in block)
    model, *options = command.split()[3:]
    folder, env = tmp_path_factory.mktemp("readme") / "service", {"EXPERT_PAGER_POOLS_DEFAULT_SOURCE": "codebook"}
    with serve(folder, ROOT / model, *options, **env) as running:
        yield running


def blocks(page: str, language: str) -> list[str]:
    """The examples of a page in a language."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def here(example: str, service: Any) -> str:
    """The example, which calls the service at its usual address, as a call of this one."""
    http = urlsplit(service.ready["http_url"]).netloc
    return example.replace("localhost:50051", service.ready["address"]).replace("localhost:8080", http)


def output(*arguments: object, **env: str) -> str:
    done = subprocess.run(
        list(map(str, arguments)), cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def shell(example: str, service: Any) -> str:
    """What a command of a page prints."""
    path = f"{program_of('buf-bin', 'buf').parent}{os.pathsep}{os.environ['PATH']}"
    return output("bash", "-c", here(example.removeprefix("$ "), service), PATH=path)


def commands(program: str) -> list[str]:
    pages = ("README.md", "docs/http.md")
    return [each for page in pages for each in blocks(page, "console") if each.startswith(f"$ {program} ")]


def test_the_python_client_of_the_readme(started: Any, capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = (block for block in blocks("README.md", "python") if block.startswith("from pager import Client"))
    exec(here(example, started), {})
    text, facts = capsys.readouterr().out.rsplit("\n", 2)[:2]
    expected = started.generate(PROMPT, max_tokens=24, ignore_eos=False)
    assert text == expected.text
    # The first request of the service pages what the page shows; the text depends on how a CPU rounds bfloat16.
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\d+ experts, .* bytes paged$", readme, re.MULTILINE) == [facts]
    assert int(facts.split()[0]) == expected.usage.pool.num_experts


def test_the_node_client_of_the_readme(node: tuple[Path, Path], started: Any) -> None:
    program, packages = node
    (example,) = blocks("README.md", "js")
    printed = output(program, "-e", here(example, started), NODE_PATH=str(packages))
    assert printed == started.generate(PROMPT, max_tokens=24, ignore_eos=False).text


def test_openai_in_node(node: tuple[Path, Path], started: Any) -> None:
    program, packages = node
    asked = {"model": "emo-tiny", "prompt": PROMPT, "max_tokens": 24, "temperature": 0, "pool": "12.5%", "stream": True}
    script = f"""
        const OpenAI = require("openai")
        const client = new OpenAI({{ baseURL: "{started.ready["http_url"]}/v1", apiKey: "none" }})
        client.completions.create({json.dumps(asked)}).then(async (answer) => {{
            for await (const part of answer) process.stdout.write(part.choices[0].text)
        }})
    """
    printed = output(program, "-e", script, NODE_PATH=str(packages))
    pool = pb.PoolPolicy(share=0.125)
    assert printed == started.generate(PROMPT, max_tokens=24, ignore_eos=False, pool=pool).text


def test_the_commands_of_the_documentation(started: Any) -> None:
    (by_grpc,) = commands("buf")
    expected = started.generate(PROMPT, max_tokens=24, ignore_eos=False)
    assert json.loads(shell(by_grpc, started))["text"] == expected.text
    completion, streamed, message = commands("curl")
    pool = pb.PoolPolicy(share=0.125)
    expected = started.generate(PROMPT, max_tokens=24, ignore_eos=False, pool=pool)
    assert json.loads(shell(completion, started))["choices"][0]["text"] == expected.text
    lines = shell(streamed, started).split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    parts = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert "".join(part["choices"][0]["delta"].get("content", "") for part in parts)
    assert json.loads(shell(message, started))["content"][0]["text"]


@pytest.mark.slow
def test_the_table_of_guidellm_agrees_with_the_metrics(guidellm: Path, started: Any, tmp_path: Path) -> None:
    count, names = 24, ("prompt_tokens_total", "generated_tokens_total", "time_to_first_token_seconds_sum")

    def metrics() -> list[float]:
        found = started.metrics("router")
        return [found.total(f"expert_pager_router_{name}") for name in names]

    before = metrics()
    asked = {
        "backend": f"kind=openai_http,target={started.ready['http_url']},model=emo-tiny",
        "profile": "kind=concurrent,streams=4",
        "constraint": f"kind=max_requests,count={count}",
        "tokenizer": f"kind=hf_auto,model={EMO_TINY}",
        "data": "kind=synthetic_text,prompt_tokens=32,output_tokens=16",
        "output": f"kind=json,path={tmp_path / 'table.json'}",
    }
    options = [each for name, value in asked.items() for each in (f"--{name}", value)]
    output(guidellm, "run", *options, "--disable-console", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hf"))
    (benchmark,) = json.loads((tmp_path / "table.json").read_text())["benchmarks"]
    table = benchmark["metrics"]
    assert table["request_totals"] == {"successful": count, "errored": 0, "incomplete": 0, "total": count}
    prompts, answers, first_token_s = (after - was for after, was in zip(metrics(), before, strict=True))
    assert table["prompt_token_count"]["successful"]["total_sum"] == prompts
    assert table["output_token_count"]["successful"]["total_sum"] == answers == 16 * count
    seen_s = table["time_to_first_token_ms"]["successful"]["total_sum"] / 1000
    assert first_token_s <= seen_s, "a client waits for as long as the service does, and for the way there and back"
    assert table["inter_token_latency_ms"]["successful"]["count"] == 15 * count
