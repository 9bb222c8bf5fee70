"""The rules for legal sampling parameters, without torch: router and engine refuse by the same ones."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

from pager.errors import InvalidRequest
from pager.reading import parse_json
from pager.types import DRAWN_BY, GrammarKind, SamplingParams

MAX_TEMPERATURE = 100.0
MAX_TOKENS = 2**31 - 1
MAX_SEED = 2**64 - 1
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_STOP_TOKENS = 64
MAX_PENALTY = 2.0
MAX_REPETITION_PENALTY = 100.0
MAX_BIAS = 100.0
MAX_BIASED_TOKENS = 1024
MAX_LOGPROBS = 20
MAX_GRAMMAR_BYTES = 64 * 2**10
MAX_ANSWERS = 32
TOP_K_WHERE_DRAWN = 50
"""What transformers' `generate` takes where `do_sample` is set and neither the model nor the caller says otherwise."""
MAX_PROMPT_LOGPROBS = 2**19
"""Numbers that a request may have reported of its prompt: tokens times one more than the alternatives to each."""


_NOT_APPLIED = {
    "bad_words_ids": None, "begin_suppress_tokens": None, "encoder_repetition_penalty": 1.0, "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0, "exponential_decay_length_penalty": None, "forced_bos_token_id": None,
    "forced_eos_token_id": None, "guidance_scale": 1.0, "min_length": 0, "min_new_tokens": 0,
    "no_repeat_ngram_size": 0, "num_beams": 1, "sequence_bias": None, "stop_strings": None, "top_h": None,
    "typical_p": 1.0,
}  # fmt: skip
"""Settings of a model that change answers of transformers' `generate` alone, each with the value that changes none."""


def not_applied(generation_config: Any) -> list[str]:
    """Returns the settings of a model's generation_config.json that would change answers, and do not here."""
    found = ((name, getattr(generation_config, name, None)) for name in _NOT_APPLIED)
    return [name for name, value in found if value not in (None, _NOT_APPLIED[name])]


def default_sampling(generation_config: Any) -> SamplingParams:
    """Returns what holds where a request says nothing, by a model's generation_config.json: as in transformers, where
    `do_sample` decides whether anything is drawn. Raises InvalidRequest for values that no request may have.
    """
    drawn = DRAWN_BY if getattr(generation_config, "do_sample", None) else ("repetition_penalty",)
    given = {name: value for name in drawn if (value := getattr(generation_config, name, None)) is not None}
    if "temperature" in drawn:
        given = {"temperature": 1.0, "top_k": TOP_K_WHERE_DRAWN} | given
    params = SamplingParams(**given)
    check_sampling(params)
    return params


def filled(params: SamplingParams, unset: Collection[str], defaults: SamplingParams) -> SamplingParams:
    """Returns `params` with what the model's settings say for those fields that a request has left unset."""
    return replace(params, **{name: getattr(defaults, name) for name in DRAWN_BY if name in unset})


def check_sampling(params: SamplingParams) -> None:
    """Raises InvalidRequest, with the name of the field at fault, for the first value that is out of its range."""
    _check_integer("max_tokens", params.max_tokens, 1, MAX_TOKENS)
    _check_number("temperature", params.temperature, 0.0, MAX_TEMPERATURE, "0 is greedy")
    _check_number("top_p", params.top_p, 0.0, 1.0, "1 restricts nothing")
    if params.top_p == 0:
        raise _refusal("top_p", params.top_p, "must lie above 0; for the likeliest token use temperature 0")
    _check_integer("top_k", params.top_k, 0, MAX_TOKENS)
    _check_integer("n", params.n, 1, MAX_ANSWERS)
    if params.seed is not None:
        _check_integer("seed", params.seed, 0, MAX_SEED + 1 - params.n)
    _check_stops(params.stop)
    _check_number("min_p", params.min_p, 0.0, 1.0, "0 restricts nothing")
    _check_number("presence_penalty", params.presence_penalty, -MAX_PENALTY, MAX_PENALTY, "0 changes nothing")
    _check_number("frequency_penalty", params.frequency_penalty, -MAX_PENALTY, MAX_PENALTY, "0 changes nothing")
    _check_number("repetition_penalty", params.repetition_penalty, 0.0, MAX_REPETITION_PENALTY, "1 changes nothing")
    if params.repetition_penalty == 0:
        raise _refusal("repetition_penalty", params.repetition_penalty, "must lie above 0; 1 changes nothing")
    _check_integer("min_tokens", params.min_tokens, 0, MAX_TOKENS)
    if params.min_tokens > params.max_tokens:
        raise _refusal("min_tokens", params.min_tokens, f"must not exceed max_tokens, which is {params.max_tokens}")
    for name in ("logprobs", "prompt_logprobs"):
        wanted = getattr(params, name)
        if wanted is not None:
            _check_integer(name, wanted, 0, MAX_LOGPROBS)
    _check_tokens(params)
    _check_grammar(params)


def check_vocabulary(params: SamplingParams, vocab_size: int) -> None:
    """Raises InvalidRequest for a token id that the model does not have."""
    named = (("logit_bias", [token_id for token_id, _ in params.logit_bias]), ("stop_token_ids", params.stop_token_ids))
    for name, ids in named:
        if ids and max(ids) >= vocab_size:
            raise _refusal(name, max(ids), f"is not in the vocabulary of {vocab_size} tokens")


def check_prompt_logprobs(params: SamplingParams, prompt_tokens: int) -> None:
    """Raises InvalidRequest for more numbers than a request may have reported of its prompt."""
    wanted = params.prompt_logprobs
    if wanted is not None and prompt_tokens * (1 + wanted) > MAX_PROMPT_LOGPROBS:
        most = MAX_PROMPT_LOGPROBS // prompt_tokens - 1
        rule = f"for a prompt of {prompt_tokens} tokens at most {most} alternatives to each are reported"
        if most < 0:
            rule = f"log-probabilities are reported of prompts of up to {MAX_PROMPT_LOGPROBS} tokens"
        raise _refusal("prompt_logprobs", wanted, rule)


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
        if not isinstance(stop, str):
            raise InvalidRequest(f"sampling.stop holds a {type(stop).__name__}; give strings", field="sampling.stop")
        if not 1 <= len(stop) <= MAX_STOP_CHARACTERS:
            raise InvalidRequest(
                f"sampling.stop holds a string of {len(stop)} characters; each has 1 to {MAX_STOP_CHARACTERS}",
                field="sampling.stop",
            )


def _check_tokens(params: SamplingParams) -> None:
    if len(params.stop_token_ids) > MAX_STOP_TOKENS:
        raise _refusal(
            "stop_token_ids", len(params.stop_token_ids), f"ids are too many; give at most {MAX_STOP_TOKENS}"
        )
    for token_id in params.stop_token_ids:
        _check_integer("stop_token_ids", token_id, 0, MAX_TOKENS)
    if len(params.logit_bias) > MAX_BIASED_TOKENS:
        raise _refusal("logit_bias", len(params.logit_bias), f"ids are too many; give at most {MAX_BIASED_TOKENS}")
    for token_id, bias in params.logit_bias:
        _check_integer("logit_bias", token_id, 0, MAX_TOKENS)
        _check_number("logit_bias", bias, -MAX_BIAS, MAX_BIAS, "0 changes nothing")
    if len({token_id for token_id, _ in params.logit_bias}) < len(params.logit_bias):
        raise _refusal("logit_bias", len(params.logit_bias), "a token id may have one bias")


def _check_grammar(params: SamplingParams) -> None:
    """Checks a grammar. Errors do not repeat its text, which is the user's."""
    grammar = params.grammar
    if grammar is None:
        return
    name, num_bytes = grammar.kind.value, len(grammar.text.encode(errors="replace"))
    if grammar.kind is not GrammarKind.JSON_OBJECT and not num_bytes:
        raise _refusal(name, grammar.text, "is empty; leave it out for an answer without a grammar")
    if num_bytes > MAX_GRAMMAR_BYTES:
        raise InvalidRequest(
            f"sampling.{name} has {num_bytes} bytes; a grammar has at most {MAX_GRAMMAR_BYTES}",
            field=f"sampling.{name}",
        )
    if params.ignore_eos:
        raise InvalidRequest(
            f"sampling.{name} and ignore_eos exclude each other: an answer ends when its grammar is complete",
            field="sampling.ignore_eos",
        )
    if grammar.kind is GrammarKind.JSON_SCHEMA:
        _check_schema(grammar.text)


# What a schema may say that an answer is not held to: it would be ignored.
_NOT_HELD_TO = {
    *("allOf", "contains", "dependencies", "dependentRequired", "dependentSchemas", "else", "if", "maxContains"),
    *("minContains", "multipleOf", "not", "oneOf", "patternProperties", "propertyNames", "then", "uniqueItems"),
    "$dynamicRef",
}
# Each replaces everything beside it that would restrict the value further.
_ALONE: dict[str, set[str]] = {
    "$ref": set(),
    "anyOf": set(),
    "const": {"type"},
    "enum": {"type"},
    "pattern": {"type"},
}
_ANNOTATIONS = {
    *("$anchor", "$comment", "$defs", "$id", "$schema", "default", "definitions", "deprecated", "description"),
    *("discriminator", "examples", "format", "readOnly", "title", "writeOnly"),
}
_DATA = ("const", "default", "enum", "examples", "required", "type")
_NAMED_SCHEMAS = ("$defs", "definitions", "properties")


def _check_schema(text: str) -> None:
    """Raises InvalidRequest for a text that is no JSON schema, and for rules that an answer would not be held to."""
    try:
        schema = parse_json(text)
    except ValueError as error:
        raise _bad_schema(f"is no JSON ({error})") from None
    if not isinstance(schema, dict | bool):
        raise _bad_schema("is a JSON object, or true")
    for each in _subschemas(schema):
        ignored = sorted(_NOT_HELD_TO & each.keys())
        if ignored:
            raise _bad_schema(f"uses {ignored[0]!r}, which answers cannot be held to; leave it out")
        for name, beside in _ALONE.items():
            others = sorted(each.keys() - {name} - beside - _ANNOTATIONS)
            if name in each and others:
                raise _bad_schema(
                    f"has {others[0]!r} beside {name!r}, which answers cannot be held to; give one of them"
                )
        required, properties = each.get("required"), each.get("properties")
        if isinstance(required, list):
            absent = sorted(set(map(str, required)) - set(properties if isinstance(properties, dict) else ()))
            if absent:
                raise _bad_schema(f"requires {absent[0]!r}, which is not among its properties; describe it there")


def _subschemas(schema: Any) -> Iterator[dict[str, Any]]:
    """Every schema within a schema, and the schema itself."""
    left = [schema]
    while left:
        each = left.pop()
        if isinstance(each, list):
            left += each
        elif isinstance(each, dict):
            yield each
            for name, value in each.items():
                if name in _NAMED_SCHEMAS and isinstance(value, dict):
                    left += value.values()
                elif name not in _DATA:
                    left.append(value)


def _bad_schema(what: str) -> InvalidRequest:
    return InvalidRequest(f"sampling.json_schema {what}", field="sampling.json_schema")


def _refusal(name: str, value: object, rule: str) -> InvalidRequest:
    return InvalidRequest(f"sampling.{name} = {value!r}: {rule}", field=f"sampling.{name}")
