"""Which sampling parameters are legal. No torch in here: the router refuses with the same rules as the engine."""

from __future__ import annotations

import math

from pager.errors import InvalidRequest
from pager.types import SamplingParams

MAX_TEMPERATURE = 100.0
MAX_TOKENS = 2**31 - 1
MAX_SEED = 2**64 - 1
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256


def check_sampling(params: SamplingParams) -> None:
    """Raises InvalidRequest, with the name of the field at fault, for the first value that is out of its range."""
    _check_integer("max_tokens", params.max_tokens, 1, MAX_TOKENS)
    _check_number("temperature", params.temperature, 0.0, MAX_TEMPERATURE, "0 is greedy")
    _check_number("top_p", params.top_p, 0.0, 1.0, "1 restricts nothing")
    if params.top_p == 0:
        raise _refusal("top_p", params.top_p, "must lie above 0; for the likeliest token use temperature 0")
    _check_integer("top_k", params.top_k, 0, MAX_TOKENS)
    if params.seed is not None:
        _check_integer("seed", params.seed, 0, MAX_SEED)
    _check_stops(params.stop)


def _check_number(name: str, value: float, least: float, most: float, hint: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _refusal(name, value, "must be a finite number")
    if not least <= value <= most:
        raise _refusal(name, value, f"must lie between {least:g} and {most:g}; {hint}")


def _check_integer(name: str, value: int, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _refusal(name, value, "must be a whole number")
    if not least <= value <= most:
        raise _refusal(name, value, f"must lie between {least} and {most}")


def _check_stops(stops: tuple[str, ...]) -> None:
    if len(stops) > MAX_STOPS:
        raise _refusal("stop", len(stops), f"strings are too many; give at most {MAX_STOPS}")
    for stop in stops:
        # The text of a stop string is the user's: errors give its length only.
        if not isinstance(stop, str) or not 1 <= len(stop) <= MAX_STOP_CHARACTERS:
            length = len(stop) if isinstance(stop, str) else type(stop).__name__
            raise _refusal("stop", length, f"each stop string has 1 to {MAX_STOP_CHARACTERS} characters")


def _refusal(name: str, value: object, rule: str) -> InvalidRequest:
    return InvalidRequest(f"sampling.{name} = {value!r}: {rule}", field=f"sampling.{name}")
