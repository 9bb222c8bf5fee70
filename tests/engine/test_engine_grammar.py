"""Answers held to a grammar are what it says, and a grammar that cannot be had fails its own request."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from tokenizers import Tokenizer

from pager.engine import grammar as grammar_module
from pager.errors import InvalidRequest, PagerError
from pager.types import Grammar, GrammarKind

EMO_TINY = Path(__file__).parents[2] / "models" / "emo-tiny"
NUM_GRAMMARS = 200
BOMB = "root ::= r0\n" + "\n".join(f'r{i} ::= r{i + 1} r{i + 1} | "x"' for i in range(2000)) + "\nr2000 ::= [a-z]*"


@pytest.fixture(scope="module")
def lasting_driver(make_lasting_driver: Callable[..., Any]) -> Iterator[Any]:
    """emo-tiny, whose answers are words, with its own tokenizer; the process that compiles its grammars lasts, too."""
    tokenizer = Tokenizer.from_file(str(EMO_TINY / "tokenizer.json"))
    made = make_lasting_driver(800, path=EMO_TINY, kv_memory="64MiB", tokenizer=tokenizer)
    yield made
    made.engine.stop()


@pytest.fixture
def driver(lasting_driver: Any) -> Any:
    lasting_driver.failures.clear()
    return lasting_driver


def finish(driver: Any) -> None:
    """Also waits for grammars that are being compiled, for as long as that takes."""
    give_up_s = time.monotonic() + 240
    while driver.engine.status().running + driver.engine.status().waiting:
        assert time.monotonic() < give_up_s, "nothing ends"
        if not driver.engine.step():
            time.sleep(0.002)


class RandomGrammars:
    """Small schemas and expressions whose answers end."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def schema(self) -> dict[str, Any]:
        number = self._random.random()
        if number < 0.6:
            return self._object(2)
        if number < 0.7:
            nested = {"type": "object", "properties": {"next": {"$ref": "#/$defs/leaf"}}, "required": ["next"]}
            return {"$defs": {"leaf": self._leaf()}, **nested}
        return self._any(2)

    def _any(self, depth: int) -> dict[str, Any]:
        if depth == 0:
            return self._leaf()
        kind = self._random.choice(["leaf", "object", "array", "anyOf"])
        if kind == "object":
            return self._object(depth)
        if kind == "array":
            least = self._random.randint(0, 2)
            most = least + self._random.randint(0, 2)
            return {"type": "array", "items": self._any(depth - 1), "minItems": least, "maxItems": most}
        if kind == "anyOf":
            return {"anyOf": [self._leaf() for _ in range(self._random.randint(1, 3))]}
        return self._leaf()

    def _object(self, depth: int) -> dict[str, Any]:
        names = self._random.sample(
            ["name", "of the", "größe", "n", "is-it", 'a"b', "tags"], self._random.randint(1, 4)
        )
        required = [name for name in names if self._random.random() < 0.6]
        properties = {name: self._any(depth - 1) for name in names}
        return {"type": "object", "properties": properties, "required": required}

    def _leaf(self) -> dict[str, Any]:
        least = self._random.randint(-300, 300)
        length = self._random.randint(0, 5)
        return self._random.choice(
            [
                {"type": "integer", "minimum": least, "maximum": least + self._random.randint(0, 2000)},
                {"type": "string", "minLength": length, "maxLength": length + self._random.randint(0, 9)},
                {"type": "string", "pattern": f"^{self.regex(1)}$"},
                {"type": "string", "enum": self._random.sample(["red", "green", "blue", "no colour"], 2)},
                {"type": "boolean"},
                {"type": "null"},
                {"const": self._random.choice([1, "one", True, None, [1, 2], {"a": 1}])},
                {"enum": [1, "one", None]},
            ]
        )

    def regex(self, depth: int = 2) -> str:
        if depth == 0:
            return self._random.choice(["[a-z]", r"\d", "[^x-z]", "the", "A|B", "[A-Z][a-z]", "ü", r"\."]).join(
                ("(", ")")
            )
        parts = []
        for _ in range(self._random.randint(1, 3)):
            most = self._random.randint(1, 4)
            parts.append(f"({self.regex(depth - 1)})" + self._random.choice(["", "?", f"{{{most}}}", f"{{0,{most}}}"]))
        joined = "".join(parts)
        return f"({joined}|{self.regex(depth - 1)})" if self._random.random() < 0.3 else joined


@pytest.mark.slow
def test_answers_to_two_hundred_random_schemas_and_expressions_are_valid(driver: Any) -> None:
    """Greedy and sampled, of several in one batch, beside others without a grammar."""
    makes, free, asked = RandomGrammars(0), [], {}
    for number in range(NUM_GRAMMARS):
        grammar = (
            Grammar(GrammarKind.JSON_SCHEMA, json.dumps(makes.schema()))
            if number % 2
            else Grammar(GrammarKind.REGEX, makes.regex())
        )
        sampling = {"temperature": 1.0, "seed": number} if number % 4 < 2 else {}
        asked[driver.submit([50 + number, 60], max_tokens=400, ignore_eos=False, grammar=grammar, **sampling)] = grammar
        if number % 50 == 0:
            free.append(driver.submit([9, 10, 11], max_tokens=20))
    finish(driver)
    assert not driver.failures
    for request_id, grammar in asked.items():
        text = driver.text(request_id)
        assert driver.usage(request_id).finish_reason == "stop", (grammar, text)
        if grammar.kind is GrammarKind.REGEX:
            assert re.fullmatch(grammar.text, text, re.DOTALL), (grammar, text)
        else:
            jsonschema.validate(json.loads(text), json.loads(grammar.text))
    assert len({tuple(driver.tokens(each)) for each in free}) == 1
    driver.assert_nothing_held()


def test_a_sequence_gets_the_same_tokens_alone_and_in_company(driver: Any) -> None:
    grammar = Grammar(GrammarKind.EBNF, 'root ::= word (", " word){3}\nword ::= [a-z]{1,6}')
    options = {"max_tokens": 60, "ignore_eos": False, "grammar": grammar, "temperature": 0.9, "seed": 5}
    alone = driver.submit([70, 71], **options)
    finish(driver)
    together = [driver.submit([70, 71], **options) for _ in range(2)]
    driver.submit([5, 6], max_tokens=60, temperature=1.0, frequency_penalty=1.0)
    driver.submit([5, 6], max_tokens=60, ignore_eos=False, grammar=Grammar(GrammarKind.JSON_OBJECT))
    finish(driver)
    assert re.fullmatch(r"[a-z]{1,6}(, [a-z]{1,6}){3}", driver.text(alone))
    assert all(driver.tokens(each) == driver.tokens(alone) for each in together)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (GrammarKind.REGEX, "a(b", "regex"),
        (GrammarKind.EBNF, "root ::= (", "ebnf"),
        (GrammarKind.EBNF, 'other ::= "a"', "root"),
        (GrammarKind.EBNF, BOMB, "takes more than"),
    ],
)
def test_a_grammar_that_cannot_be_compiled_fails_its_own_request(
    driver: Any, monkeypatch: pytest.MonkeyPatch, kind: GrammarKind, text: str, message: str
) -> None:
    other = driver.submit([9, 10], max_tokens=5)
    bad = driver.submit([9, 10], max_tokens=5, ignore_eos=False, grammar=Grammar(kind, text))
    finish(driver)
    error = driver.failures.pop(bad)
    assert isinstance(error, InvalidRequest)
    assert message in str(error)
    assert error.field == f"sampling.{kind}"
    good = driver.submit([9, 10], max_tokens=50, ignore_eos=False, grammar=Grammar(GrammarKind.REGEX, "(ab){2}"))
    finish(driver)
    assert driver.text(good) == "abab"
    assert len(driver.tokens(other)) == 5
    assert not driver.failures
    driver.assert_nothing_held()


def test_a_request_can_be_cancelled_while_its_grammar_is_compiled(driver: Any) -> None:
    unseen = BOMB.replace('"x"', '"y"')  # the engine remembers what it has refused
    request_id = driver.submit([9], ignore_eos=False, grammar=Grammar(GrammarKind.EBNF, unseen))
    driver.engine.step()
    assert driver.engine.cancel(request_id, "t")
    driver.engine.step()
    assert driver.failures[request_id].reason == "CANCELLED"
    driver.assert_nothing_held()


@pytest.mark.slow
def test_a_helper_that_was_killed_is_replaced(driver: Any) -> None:
    def ask(text: str) -> str:
        asked: str = driver.submit([9], max_tokens=9, ignore_eos=False, grammar=Grammar(GrammarKind.REGEX, text))
        finish(driver)
        return asked

    assert driver.text(ask("ab")) == "ab"
    driver.engine._grammars._helper._process.kill()
    driver.engine._grammars._helper._process.wait()
    assert driver.text(ask("cd")) == "cd"


def test_an_answer_whose_grammar_takes_too_long_to_follow_ends_alone(
    driver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_module, "MASK_S", 0.0)
    bad = driver.submit([9], ignore_eos=False, grammar=Grammar(GrammarKind.REGEX, "[a-z]{40}"))
    other = driver.submit([9], max_tokens=5, temperature=1.0, seed=1)
    finish(driver)
    assert "less ambiguous" in str(driver.failures[bad])
    assert len(driver.tokens(other)) == 5


def test_a_grammar_whose_state_is_lost_fails_its_request_alone(driver: Any) -> None:
    bad = driver.submit([9], max_tokens=40, ignore_eos=False, grammar=Grammar(GrammarKind.REGEX, "[a-z]{40}"))
    other = driver.submit([9], max_tokens=40, temperature=1.0, seed=1)
    while not driver.tokens(bad):
        driver.engine.step()
    live = {each.asked.id: each for each in driver.engine._inbox.live()}
    live[bad].output_ids.append(0)  # an end of sequence that the grammar does not allow there
    finish(driver)
    assert isinstance(driver.failures[bad], PagerError)
    assert "not one that its grammar allows" in str(driver.failures[bad])
    assert len(driver.tokens(other)) == 40


def test_what_leaves_no_token_is_said_so(driver: Any) -> None:
    bad = driver.submit([9], ignore_eos=False, min_tokens=20, grammar=Grammar(GrammarKind.REGEX, "ab"))
    finish(driver)
    assert isinstance(driver.failures[bad], InvalidRequest)
    assert "min_tokens" in str(driver.failures[bad])


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("{", "no JSON"),
        ("[" * 60000, "nested too deep"),
        ("3", "a JSON object"),
        ('{"type": "array", "uniqueItems": true}', "'uniqueItems'"),
        ('{"properties": {"a": {"not": {}}}}', "'not'"),
        ('{"$ref": "#/$defs/a", "minLength": 3, "$defs": {"a": {}}}', "'minLength' beside"),
        ('{"type": "object", "required": ["a"]}', "requires 'a'"),
    ],
)
def test_a_schema_that_answers_would_not_be_held_to_is_refused_at_once(driver: Any, schema: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(message)) as caught:
        driver.submit([9], ignore_eos=False, grammar=Grammar(GrammarKind.JSON_SCHEMA, schema))
    assert caught.value.field == "sampling.json_schema"


def test_names_of_properties_and_values_are_no_rules(driver: Any) -> None:
    schema = {
        "type": "object",
        "properties": {"not": {"const": {"oneOf": 1}}, "required": {"type": "null", "default": {"if": 1}}},
        "required": ["not", "required"],
    }
    asked = driver.submit(
        [9], max_tokens=60, ignore_eos=False, grammar=Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema))
    )
    finish(driver)
    assert json.loads(driver.text(asked)) == {"not": {"oneOf": 1}, "required": None}


def test_a_worker_without_xgrammar_says_what_to_install(driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_module, "find_spec", lambda _: None)
    with pytest.raises(InvalidRequest, match=r"expert-pager\[grammar\]"):
        driver.submit([9], ignore_eos=False, grammar=Grammar(GrammarKind.JSON_OBJECT))


def test_each_of_several_answers_follows_the_grammar_by_itself(driver: Any) -> None:
    grammar = Grammar(GrammarKind.REGEX, "(red|green|blue) [0-9]{2}")
    asked = driver.submit([1, 2, 3], n=4, temperature=1.0, seed=3, max_tokens=20, ignore_eos=False, grammar=grammar)
    finish(driver)
    assert not driver.failures
    texts = ["".join(chunk.text for chunk in driver.chunks[asked] if chunk.index == index) for index in range(4)]
    assert all(re.fullmatch(grammar.text, text) for text in texts)
    assert len(set(texts)) > 1
