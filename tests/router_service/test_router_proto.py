"""The generated code that is checked in is what the .proto files say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PROTOS = Path(__file__).parents[2] / "protos"
# Which release of the generator wrote a file is no part of what it says.
_RELEASE = re.compile(r"# Protobuf Python Version: .*|^    \d+,$|GRPC_GENERATED_VERSION = .*", re.MULTILINE)


def generated(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): _RELEASE.sub("", path.read_text(encoding="utf-8"))
        for path in root.glob("expert_pager/**/*_pb2*")
        if path.suffix in (".py", ".pyi")
    }


def test_generated_code_is_up_to_date(tmp_path):
    subprocess.run([sys.executable, PROTOS / "generate.py", tmp_path], check=True)
    fresh, checked_in = generated(tmp_path), generated(PROTOS)
    assert len(fresh) >= 6
    assert sorted(fresh) == sorted(checked_in)
    for name, text in fresh.items():
        assert checked_in[name] == text, f"{name} is stale; run `python protos/generate.py`"
