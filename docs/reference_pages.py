"""A hook of mkdocs that makes the reference pages from the code, each time the site is built.

The commands are described by Typer, the gRPC interface by the comments of its .proto file, the configuration by the
schema in pager/config.py.
"""

from __future__ import annotations

import sys
import tempfile
from importlib.resources import files as package_files
from pathlib import Path

import typer
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor_pb2 import DescriptorProto, EnumDescriptorProto, FieldDescriptorProto
from grpc_tools import protoc
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from typer.cli import get_docs_for_click
from typer.main import get_command

DOCS = Path(__file__).resolve().parent
PROTOS = DOCS.parent / "protos"
PUBLIC = "expert_pager/v1/expert_pager.proto"


# --- commands -------------------------------------------------------------------------------------------------------


def cli_page() -> str:
    from pager.cli import app

    command = get_command(app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command, info_name="expert-pager"), name="expert-pager")
    return text.replace("# `expert-pager`\n", "# Command line\n", 1)


# --- configuration --------------------------------------------------------------------------------------------------


def configuration_page() -> str:
    # A hook's own folder is not a package that it could import from.
    sys.path.insert(0, str(DOCS.parent))
    from docs.config_reference import page

    return page()


# --- gRPC -----------------------------------------------------------------------------------------------------------


def grpc_page() -> str:
    described = _described(PUBLIC)
    comments = _Comments(described)
    lines = ["# gRPC interface", "", comments.of_file(), "", f"The file is `protos/{PUBLIC}`.", ""]
    for index, service in enumerate(described.service):
        lines += [f"## {service.name}", ""]
        for number, method in enumerate(service.method):
            answer = f"{'stream of ' if method.server_streaming else ''}{_link(method.output_type)}"
            lines += [f"### {method.name}", "", f"{_link(method.input_type)} → {answer}", ""]
            lines += [comments.of(6, index, 2, number), ""]
    lines += ["## Messages", ""]
    for index, message in enumerate(described.message_type):
        lines += _message(message, comments, index)
    for index, enum in enumerate(described.enum_type):
        lines += _enum(enum, comments, index)
    return "\n".join(lines).rstrip() + "\n"


class _Comments:
    """The comments of a .proto file, by the path of what they describe (descriptor.proto explains the numbers)."""

    def __init__(self, described: descriptor_pb2.FileDescriptorProto) -> None:
        self._of = {tuple(place.path): place for place in described.source_code_info.location}

    def of(self, *path: int) -> str:
        place = self._of.get(path)
        if place is None:
            return ""
        return " ".join(line.strip() for line in (place.leading_comments + place.trailing_comments).splitlines())

    def of_file(self) -> str:
        detached = self._of[(12,)].leading_comments  # what stands above `syntax`
        return "\n".join(line.strip() for line in detached.splitlines())


def _described(proto: str) -> descriptor_pb2.FileDescriptorProto:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "described"
        includes = [f"-I{PROTOS}", f"-I{package_files('grpc_tools') / '_proto'}"]
        if protoc.main(["protoc", *includes, "--include_source_info", f"--descriptor_set_out={output}", proto]) != 0:
            raise SystemExit(f"protoc failed on {proto}")
        return descriptor_pb2.FileDescriptorSet.FromString(output.read_bytes()).file[-1]


def _message(message: DescriptorProto, comments: _Comments, index: int) -> list[str]:
    lines = [f"### {message.name}", ""]
    if comment := comments.of(4, index):
        lines += [comment, ""]
    if not message.field:
        return lines
    lines += ["| field | number | type | |", "|---|---|---|---|"]
    for number, field in enumerate(message.field):
        notes = [comments.of(4, index, 2, number)]
        if field.HasField("oneof_index") and not field.proto3_optional:
            notes.insert(0, f"one of `{message.oneof_decl[field.oneof_index].name}`.")
        lines.append(f"| `{field.name}` | {field.number} | {_type(field)} | {_cell(' '.join(notes))} |")
    return [*lines, ""]


def _enum(enum: EnumDescriptorProto, comments: _Comments, index: int) -> list[str]:
    lines = [f"### {enum.name}", ""]
    if comment := comments.of(5, index):
        lines += [comment, ""]
    lines += ["| value | number | |", "|---|---|---|"]
    for number, value in enumerate(enum.value):
        lines.append(f"| `{value.name}` | {value.number} | {_cell(comments.of(5, index, 2, number))} |")
    return [*lines, ""]


def _type(field: FieldDescriptorProto) -> str:
    if field.type_name:
        name = _link(field.type_name)
    else:
        name = FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated {name}"
    return f"optional {name}" if field.proto3_optional else name


def _link(type_name: str) -> str:
    name = type_name.rsplit(".", 1)[-1]
    return f"[{name}](#{name.lower()})"


def _cell(text: str) -> str:
    return text.strip().replace("|", "\\|")


# --- the hook -------------------------------------------------------------------------------------------------------


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages to the site."""
    made = {"cli": cli_page, "configuration": configuration_page, "grpc": grpc_page}
    for name, make in made.items():
        files.append(File.generated(config, f"reference/{name}.md", content=make()))
    return files
