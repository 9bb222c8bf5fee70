"""Regenerates the Python code of every .proto in here: `python protos/generate.py [OUTPUT_DIRECTORY]`."""

from __future__ import annotations

import sys
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent


def generate(output: Path) -> None:
    """Writes `*_pb2.py` and, for files with a service, `*_pb2_grpc.py`, each with its stub, below `output`."""
    for proto in sorted(ROOT.glob("expert_pager/**/*.proto")):
        arguments = [
            "protoc",
            f"-I{ROOT}",
            f"-I{files('grpc_tools') / '_proto'}",
            f"--python_out={output}",
            f"--pyi_out={output}",
        ]
        if "\nservice " in proto.read_text(encoding="utf-8"):
            arguments += [
                f"--grpc_python_out={output}",
                f"--plugin=protoc-gen-mypy_grpc={Path(sys.executable).parent / 'protoc-gen-mypy_grpc'}",
                f"--mypy_grpc_out=quiet:{output}",
            ]
        if protoc.main([*arguments, str(proto)]) != 0:
            raise SystemExit(f"protoc failed on {proto.relative_to(ROOT)}")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
