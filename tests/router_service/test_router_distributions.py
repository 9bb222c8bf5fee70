"""The two distributions: what is in each, and the client installed alone, in an environment without torch."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

import pager

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CLIENT, MAIN = "expert_pager_client", "expert_pager"

ASK = """
import importlib.util, json, sys
from importlib.metadata import version
from pager import Client, Count, SamplingParams
from pager.errors import UnknownPool
from pager.types import PoolAsk

with Client(sys.argv[1], timeout_s=60) as client:
    client.wait_until_ready(60)
    answer = client.generate("hi", SamplingParams(max_tokens=4), Count(4))
    text = answer.text()
    try:
        client.route("hi", PoolAsk(name="law"))
    except UnknownPool as error:
        refusal = str(error)
heavy = ("torch", "numpy", "transformers", "ray", "pager.engine")
absent = [name for name in heavy if not importlib.util.find_spec(name)]
print(json.dumps([text, answer.usage.pool.num_experts, refusal, absent, version("protobuf"), version("grpcio")]))
"""


def run(*command: object, cwd: Path | None = None) -> str:
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=own, capture_output=True, text=True, timeout=280)
    if "No matching distribution found for hatchling" in done.stderr:
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both wheels by name."""
    folder = tmp_path_factory.mktemp("wheels")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, ROOT / "client", ROOT)
    return {path.name.split("-")[0]: path for path in folder.glob("*.whl")}


def names(wheel: Path) -> set[str]:
    """The files of a wheel, but for those about it."""
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


def test_no_file_is_in_two_distributions_and_none_is_left_out(wheels: dict[str, Path]) -> None:
    client, main = names(wheels[CLIENT]), names(wheels[MAIN])
    assert not client & main
    expected = set()
    for folder, root in (("pager", ROOT), ("router_service", ROOT), ("expert_pager", ROOT / "protos")):
        paths = (path for path in (root / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        expected |= {str(path.relative_to(root)) for path in paths}
    assert client | main == expected
    assert {name for name in client if name.startswith("pager/")} == {
        f"pager/{name}" for name in ("__init__.py", "client.py", "errors.py", "py.typed", "types.py", "wire.py")
    }


def test_both_have_one_version_and_licence(wheels: dict[str, Path]) -> None:
    for name, wheel in wheels.items():
        assert wheel.name.startswith(f"{name}-{pager.__version__}-")
        with zipfile.ZipFile(wheel) as archive:
            licence = archive.read(f"{name}-{pager.__version__}.dist-info/licenses/LICENSE")
        assert licence == (ROOT / "LICENSE").read_bytes()


def test_the_library_asks_for_the_client_of_its_own_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"expert-pager-client=={pager.__version__}" in project["dependencies"]


@pytest.mark.parametrize("protobuf", ["protobuf==6.*", "protobuf==7.*"])
async def test_the_client_alone_asks_a_service(
    wheels: dict[str, Path], service: Any, tmp_path: Path, protobuf: str
) -> None:
    def installed() -> Path:
        venv.create(tmp_path / "venv", with_pip=True)
        python = tmp_path / "venv" / "bin" / "python"
        run(python, "-m", "pip", "install", "--quiet", wheels[CLIENT], protobuf)
        return python

    python = await asyncio.to_thread(installed)
    said = await asyncio.to_thread(run, python, "-c", ASK, f"127.0.0.1:{service.server.port}", cwd=tmp_path)
    text, num_experts, refusal, absent, version, _ = json.loads(said)
    assert (text, num_experts) == ("hihi", 8)
    assert "no pool 'law'" in refusal
    assert absent == ["torch", "numpy", "transformers", "ray", "pager.engine"]
    assert version.startswith(protobuf.removeprefix("protobuf==").rstrip("*"))
