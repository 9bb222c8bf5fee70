"""Byte sizes and shares as people write them: `"64MiB"`, `"1.5GB"`, `268435456`, `"25%"`, `0.25`."""

from __future__ import annotations

import re

from pager.errors import ConfigError

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_BYTES = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*$")


def parse_bytes(value: str | int) -> int:
    """Returns the bytes of `value`. Raises ConfigError for anything but a positive size."""
    if isinstance(value, int) and not isinstance(value, bool):
        if value <= 0:
            raise ConfigError(f"a size must be positive, not {value}; write bytes or something like '64MiB'")
        return value
    match = _BYTES.match(str(value))
    if match is None or match[2].lower() not in _UNITS:
        raise ConfigError(f"{value!r} is not a size; write bytes or something like '64MiB', '1.5GB'")
    size = int(float(match[1]) * _UNITS[match[2].lower()])
    if size <= 0:
        raise ConfigError(f"a size must be positive, not {value!r}; write bytes or something like '64MiB'")
    return size


def parse_bytes_or_share(value: str | int | float, whole: int) -> int:
    """Returns the bytes of `value`; `"25%"` and a float in (0, 1] mean that share of `whole` bytes, rounded down."""
    share: float | None = None
    if isinstance(value, float):
        share = value
    elif isinstance(value, str) and value.strip().endswith("%"):
        try:
            share = float(value.strip()[:-1]) / 100
        except ValueError:
            raise ConfigError(f"{value!r} is not a share; write something like '12.5%'") from None
    if share is None:
        return parse_bytes(value)  # type: ignore[arg-type]
    if not 0 < share <= 1:
        raise ConfigError(f"a share of the experts lies above 0 and at most at 100%, not {value!r}{or_percent(value)}")
    return int(share * whole)


def or_percent(value: object) -> str:
    """Returns the end of a message about a `value` that reads like percent (25, 25.0 or "25"); else nothing."""
    try:
        number = float(str(value))
    except ValueError:
        return ""
    return f"; did you mean '{number:g}%'?" if 1 < number <= 100 else ""


def format_bytes(size: int) -> str:
    """Formats `size` in the largest binary unit that keeps a leading digit: 1536 → '1.5 KiB'."""
    amount = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(amount) < 1024 or unit == "GiB":
            return f"{int(amount)} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    raise AssertionError("unreachable")


def format_address(host: str, port: int) -> str:
    """Formats HOST:PORT, with the brackets that an IPv6 address must have."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
