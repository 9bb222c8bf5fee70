"""Reads settings from a TOML file, the environment and flags, each overriding the one before. Knows no single setting.

Everything that is wrong is found in one reading, and says where it stands.
"""

from __future__ import annotations

import difflib
import re
import tomllib
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from pager.reading import read_bounded, reason_of

Check = Callable[[Any], str | None]  # what was expected, when the value is not it

MAX_FILE_BYTES = 1 << 16  # every setting there is takes a few kilobytes
MAX_DOTS = 250  # of a line: the parser needs memory in the square of a key's parts
ENV_PREFIX = "EXPERT_PAGER_"
ENV_FILE = "EXPERT_PAGER_CONFIG"  # names the file, where no path is given
_KIND_NAMES: dict[type, str] = {str: "a text", int: "a whole number", float: "a number"}
_SERVICE_LINK = re.compile(r"_SERVICE_(HOST|PORT)(_|$)|_PORT_\d+_(TCP|UDP)(_|$)")


@dataclass(frozen=True, slots=True)
class Setting:
    """A value, and where it was given: a file, an environment variable or a flag."""

    value: Any
    origin: str


@dataclass(slots=True)
class Reading:
    """What was given, by key ("workers.count"), and all that is wrong with it, a sentence each."""

    settings: dict[str, Setting] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def value(self, key: str) -> Any:
        """None where it was not given."""
        return self.settings[key].value if key in self.settings else None


class Schema:
    """Sections of settings, a dataclass each; a field's metadata may have a `check`."""

    def __init__(self, sections: Mapping[str, type[Any]]) -> None:
        self.sections = sections
        self.fields: dict[str, Field[Any]] = {}
        self._hints: dict[str, Any] = {}
        for name, section in sections.items():
            hints = get_type_hints(section)
            for each in fields(section):
                self.fields[f"{name}.{each.name}"] = each
                self._hints[f"{name}.{each.name}"] = hints[each.name]
        self._by_variable = {ENV_PREFIX + key.replace(".", "_").upper(): key for key in self.fields}

    def read(
        self,
        path: Path | None,
        env: Mapping[str, str],
        overrides: Mapping[str, Any],
        flags: Mapping[str, str],
    ) -> Reading:
        """`overrides` by key, None for one that is not given; `flags` says how the user gave it."""
        reading = Reading()
        if path is None and env.get(ENV_FILE):
            path = Path(env[ENV_FILE])
        if path is not None:
            self._read_file(path, reading)
        self._read_environment(env, reading)
        for key, value in overrides.items():
            if value is not None and self._is_known(key, "option", reading):
                said = flags.get(key, key)
                self.take(key, value, said, said, reading)
        return reading

    def _read_file(self, path: Path, reading: Reading) -> None:
        try:
            document = _parse_toml(read_bounded(path, MAX_FILE_BYTES))
        except OSError as error:
            reading.problems.append(f"config file {path} cannot be read: {reason_of(error)}")
            return
        except ValueError as error:
            reading.problems.append(f"config file {path} is not TOML: {error}")
            return
        for section, entries in document.items():
            if section not in self.sections or not isinstance(entries, dict):
                reading.problems.append(_unknown(section, self.sections, f"section in {path}"))
                continue
            for name, value in entries.items():
                key = f"{section}.{name}"
                if self._is_known(key, f"key in {path}", reading):
                    self.take(key, value, f"{key} in {path}", str(path), reading)

    def _read_environment(self, env: Mapping[str, str], reading: Reading) -> None:
        for variable, text in env.items():
            if not variable.startswith(ENV_PREFIX) or variable == ENV_FILE or _is_service_link(variable, text):
                continue
            if variable not in self._by_variable:
                reading.problems.append(_unknown(variable, self._by_variable, "environment variable"))
            elif text.strip():  # an empty variable is one that is not set
                key = self._by_variable[variable]
                self.take(key, _from_text(text.strip(), self._hints[key]), variable, variable, reading)

    def _is_known(self, key: str, what: str, reading: Reading) -> bool:
        if key not in self.fields:
            reading.problems.append(_unknown(key, self.fields, what))
        return key in self.fields

    def take(self, key: str, value: Any, said: str, origin: str, reading: Reading) -> None:
        """Adds a setting to `reading`, or what is wrong with it."""
        kinds = _kinds(self._hints[key])
        if isinstance(value, int) and not isinstance(value, bool) and float in kinds and int not in kinds:
            value = float(value)
        check: Check | None = self.fields[key].metadata.get("check")
        expected = None
        if type(value) not in kinds:
            expected = " or ".join(_KIND_NAMES[kind] for kind in kinds if kind in _KIND_NAMES)
        elif check is not None:
            expected = check(value)
        if expected:
            reading.problems.append(f"{said} must be {expected}, not {shown(value)}")
        else:
            reading.settings[key] = Setting(value, origin)


def _parse_toml(data: bytes) -> dict[str, Any]:
    """Raises ValueError, also for what takes the parser a stack or a memory without end."""
    text = data.decode("utf-8")
    for number, line in enumerate(text.splitlines(), start=1):
        if line.count(".") > MAX_DOTS:
            raise ValueError(f"line {number} has more than {MAX_DOTS} dots")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def shown(value: Any) -> str:
    """As a message may have it: a file's content, given where its name belongs, may be a secret."""
    return "a text of several lines" if isinstance(value, str) and "\n" in value.strip() else repr(value)


def _is_service_link(variable: str, text: str) -> bool:
    """Kubernetes gives every pod EXPERT_PAGER_PORT=tcp://… and the like when a Service is called expert-pager."""
    return text.startswith(("tcp://", "udp://")) or _SERVICE_LINK.search(variable) is not None


def _from_text(text: str, hint: Any) -> Any:
    """`text` as the first of int, float and str that the key takes; `take` refuses what is none of them."""
    for kind in (int, float):
        if kind in _kinds(hint):
            try:
                return kind(text)
            except ValueError:
                continue
    return text


def _kinds(hint: Any) -> tuple[type, ...]:
    return get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _unknown(name: str, known: Iterable[str], what: str) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else "known: " + ", ".join(sorted(known))
    return f"unknown {what}: {name!r}; {hint}"
