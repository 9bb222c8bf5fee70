"""The configuration reference and `docs/service.example.toml`, from the schema: `python -m docs.config_reference`."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator

from pager.config import ENV_PREFIX, SCHEMA, Check

WIDTH = 100

_HEADER = """\
Every setting of `expert-pager serve --config FILE` with its default. Made by `make docs` from pager/config.py; a test
compares. What is commented out has no default. A key of a section is a variable in the environment as well:
`{prefix}WORKERS_COUNT` is workers.count.
"""
_INTRO = """\
# Configuration

Settings are read from a TOML file (`--config`, or `{prefix}CONFIG`), then from the environment, then from the flags of
`expert-pager serve`, each overriding the one before. Every key is a variable in the environment: `workers.count` is
`{prefix}WORKERS_COUNT`. `docs/service.example.toml` is a file with all of them.

`expert-pager config --check` reports everything that is wrong, and `expert-pager config --print` shows what is in force
and where each value comes from. The address of Redis is a secret and is read from the environment alone: from
`REDIS_URL`, or from the file that `REDIS_URL_FILE` names.
"""


def example_file() -> str:
    """A configuration file that sets every key to its default."""
    lines = _comment(_HEADER.format(prefix=ENV_PREFIX))
    for section in SCHEMA.sections:
        lines += ["", *_comment(_about_section(section)), f"[{section}]", ""]
        for key in _keys_of(section):
            lines += [*_comment(_described(key)), _assignment(key), ""]
        lines.pop()
    return "\n".join(lines) + "\n"


def page() -> str:
    """The page of the documentation site, in Markdown."""
    lines = [_INTRO.format(prefix=ENV_PREFIX)]
    for section in SCHEMA.sections:
        lines += [f"## {section}", "", _about_section(section), "", "| key | default | what it is |", "|---|---|---|"]
        for key in _keys_of(section):
            default = SCHEMA.fields[key].default
            shown = "not set" if default is None else f"`{_toml(default)}`"
            lines.append(f"| `{key}` | {shown} | {_described(key)} |")
        lines.append("")
    return "\n".join(lines)


def _keys_of(section: str) -> Iterator[str]:
    return (key for key in SCHEMA.fields if key.startswith(f"{section}."))


def _about_section(section: str) -> str:
    return " ".join((inspect.getdoc(SCHEMA.sections[section]) or "").split())


def _described(key: str) -> str:
    """What the key is, and which values it takes where its type does not say it."""
    metadata = SCHEMA.fields[key].metadata
    check: Check | None = metadata["check"]
    return f"{metadata['about']} Must be {check.expected}." if check is not None else str(metadata["about"])


def _assignment(key: str) -> str:
    """`key = default`; commented out where there is no default."""
    field, name = SCHEMA.fields[key], key.partition(".")[2]
    example = field.metadata["example"]
    if field.default is None:
        return f"# {name} = {_toml(example)}"
    return f"{name} = {_toml(field.default if example is None else example)}"


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(" ".join(text.split()), WIDTH - 2, break_on_hyphens=False)]


if __name__ == "__main__":
    print(example_file(), end="")
