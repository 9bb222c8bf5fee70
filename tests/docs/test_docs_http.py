"""docs/http.md has the fields that requests have, and its first example is the README's, which a test runs."""

from __future__ import annotations

import re
from pathlib import Path

from docs.http_reference import PAGE, page

EXAMPLE = re.compile(r"```python\n(from openai import OpenAI\n.*?)```", re.DOTALL)


def test_the_tables_are_made_from_the_classes() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text == page(text), "run make docs"


def test_the_example_is_that_of_the_readme() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert EXAMPLE.findall(PAGE.read_text(encoding="utf-8")) == EXAMPLE.findall(readme) != []
