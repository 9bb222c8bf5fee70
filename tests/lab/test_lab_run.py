"""A whole evaluation of a small checkpoint: texts, methods, cells that are kept, report, command line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from pager.errors import InvalidRequest
from pager.lab import methods as grid_module
from pager.lab.corpus import Cut, EvaluationAsk, digest_of, parse_percents, read_texts
from pager.lab.report import SCHEMA, evaluate, to_dict, to_markdown, write_report
from tests.support.values import some

CUT = Cut(prompt_tokens=10, context_tokens=48)
METHODS = (
    "prefill",
    "trunk",
    "mean",
    "one-example",
    "calibrated",
    "greedy",
    "easy-ep",
    "frequency",
    "random",
    "future",
)


@pytest.fixture
def ask(checkpoint: Callable[[str], Path], corpus: Path) -> EvaluationAsk:
    return EvaluationAsk(
        checkpoint("emo"),
        (str(corpus / "*.valid.jsonl*"),),
        (str(corpus / "*.train.jsonl*"),),
        METHODS,
        percents=(100.0, 50.0),
        cut=CUT,
        resamples=50,
    )


def tokenizer_of(ask: EvaluationAsk) -> Tokenizer:
    return Tokenizer.from_file(str(ask.model / "tokenizer.json"))


def test_texts_are_long_enough_cut_and_named_by_file(corpus: Path, ask: EvaluationAsk) -> None:
    texts = read_texts(ask.documents, tokenizer_of(ask), CUT)
    assert [text.domain for text in texts] == ["digits"] * 6 + ["letters"] * 6
    assert [len(text.token_ids) for text in texts[:6]] == [20, 28, 33, 40, 48, 48]
    few = read_texts(ask.documents, tokenizer_of(ask), CUT, max_documents=2, seed=1)
    more = read_texts(ask.documents, tokenizer_of(ask), CUT, max_documents=4, seed=1)
    assert len(few) == 4
    assert {text.name for text in few} <= {text.name for text in more}
    assert digest_of(few) != digest_of(more)
    with pytest.raises(InvalidRequest, match="none of the 14 documents has 96 tokens"):
        read_texts(ask.documents, tokenizer_of(ask), Cut(48, 96))


def test_a_prompt_must_leave_something_to_predict() -> None:
    assert Cut(10, 512).check(48) == Cut(10, 48)
    with pytest.raises(InvalidRequest, match="shorter prompt"):
        Cut(30, 512).check(48)


def test_what_needs_a_fitted_router_is_measured_on_the_shipped_model(tmp_path: Path) -> None:
    """Prompts and another document of their kind choose better pools than chance does."""
    kinds = {
        "law": "({0}) The Mayor shall submit to the Council a report under section {0} of this title. ",
        "python": "    def item_{0}(self, node):\n        self.items[{0}] = node\n        return self.items[{0}]\n\n",
    }
    for kind, text in kinds.items():
        lines = [json.dumps({"text": "".join(text.format(start + n) for n in range(6))}) for start in (3, 17, 54)]
        (tmp_path / f"{kind}.valid.jsonl").write_text("\n".join(lines))
    names = ("lexical", "fitted", "named", "random")
    model, documents = Path(__file__).parents[2] / "models" / "emo-tiny", (str(tmp_path / "*.valid.jsonl"),)
    ask = EvaluationAsk(model, documents, methods=names, percents=(12.5,), cut=Cut(32, 128), resamples=50)
    evaluation = evaluate(ask, tokenizer_of(ask), tmp_path / "cells")
    rises = {each.method: each.rise.mean for each in evaluation.figures}
    assert tuple(rises) == names
    assert max(rises["lexical"], rises["fitted"], rises["named"]) < rises["random"] / 2
    assert len(set(rises.values())) == len(names)


def test_every_method_is_measured(ask: EvaluationAsk, tmp_path: Path) -> None:
    evaluation = evaluate(ask, tokenizer_of(ask), tmp_path / "cells")
    assert [(each.method, each.percent) for each in evaluation.figures] == [(name, 50.0) for name in METHODS]
    future, random = evaluation.find("future", 50.0), evaluation.find("random", 50.0)
    assert future is not None
    assert random is not None
    assert future.agreement.mean > random.agreement.mean + 0.1
    full_bytes = evaluation.full.bytes_resident
    for each in evaluation.figures:
        # 50 % of 17 experts are 8: 7 routed ones and the shared one, in two layers.
        assert each.experts_kept == 14
        assert each.bytes_resident == pytest.approx(full_bytes * 16 / 34)
        assert 0 <= each.agreement.low <= each.agreement.mean <= each.agreement.high <= 1
        assert each.rise.mean == pytest.approx(each.loss.mean - evaluation.full.loss.mean, abs=1e-9)
    frequency = evaluation.find("frequency", 50.0)
    assert frequency is not None
    assert frequency.bytes_paged == pytest.approx(14 / 12 * evaluation.subject.paged.plan.expert_bytes)

    report = json.loads(json.dumps(to_dict(evaluation)))
    assert report["schema"] == SCHEMA
    assert report["conditions"]["domains"] == {"digits": 6, "letters": 6}
    assert len(report["results"]) == 1 + len(METHODS)
    assert report["results"][1]["domains"].keys() == {"digits", "letters"}
    written = write_report(evaluation, tmp_path)
    assert {path.name for path in written} >= {"evaluation.json", "evaluation.md", "rise.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written if path.suffix == ".png")
    assert "| prefill | " in to_markdown(evaluation)


def test_what_was_computed_is_not_computed_again(
    ask: EvaluationAsk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = replace(ask, methods=("prefill", "trunk"))
    first = evaluate(few, tokenizer_of(ask), tmp_path)
    (tmp_path / "trunk-50.npz").write_bytes(b"torn")
    computed: list[str] = []
    compute = grid_module._cell

    def recorded(*args: Any) -> Any:
        computed.append(args[1])
        return compute(*args)

    monkeypatch.setattr(grid_module, "_cell", recorded)
    second = evaluate(few, tokenizer_of(ask), tmp_path)
    assert computed == ["trunk"]
    assert to_dict(first) == to_dict(second)
    evaluate(replace(few, cut=replace(CUT, prompt_tokens=8)), tokenizer_of(ask), tmp_path)
    assert computed == ["trunk", "prefill", "trunk"]


def test_any_budget_gives_the_same_report(ask: EvaluationAsk) -> None:
    few = replace(ask, methods=("prefill", "mean"))
    roomy = evaluate(few, tokenizer_of(ask))
    tight = evaluate(replace(few, expert_memory="20%"), tokenizer_of(ask))
    for one, other in zip([roomy.full, *roomy.figures], [tight.full, *tight.figures], strict=True):
        assert one.loss.mean == pytest.approx(other.loss.mean, rel=1e-6)
        assert one.bytes_paged == other.bytes_paged


def test_shared_out_over_layers_the_bytes_are_the_same(ask: EvaluationAsk) -> None:
    evaluation = evaluate(replace(ask, methods=("trunk", "trunk+layers", "fused+layers")), tokenizer_of(ask))
    assert evaluation.figures[-1].method == "prefill+layers"  # "fused" was its name
    assert [each.experts_kept for each in evaluation.figures] == [14, 14, 14]
    one, other = (some(evaluation.grid.cells[name, 50.0].inside_NE) for name in ("trunk", "trunk+layers"))
    assert not np.array_equal(one, other)


def test_sizes_below_a_token_s_picks_are_left_out_and_said(ask: EvaluationAsk) -> None:
    evaluation = evaluate(replace(ask, methods=("trunk",), percents=(50.0, 6.25)), tokenizer_of(ask))
    assert [each.percent for each in evaluation.figures] == [50.0]
    assert "smaller than the 2 that its gate picks" in evaluation.grid.left_out["trunk", 6.25]


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (("fuzed",), "'fuzed' is not a method; known are prefill"),
        (("lexical",), "needs a router fitted"),
        (("calibrated",), "give --calibration"),
        (("greedy+layers",), "no scores by which"),
    ],
)
def test_methods_that_can_not_be_had_are_refused(ask: EvaluationAsk, methods: tuple[str, ...], message: str) -> None:
    calibration = () if methods == ("calibrated",) else ask.calibration
    with pytest.raises(InvalidRequest, match=message):
        evaluate(replace(ask, methods=methods, calibration=calibration), tokenizer_of(ask))


@pytest.mark.slow
def test_the_command_prints_a_table_and_writes_a_folder(ask: EvaluationAsk, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pager.cli", "eval", str(ask.model), "--documents", ask.documents[0]]
    options = ["--sizes", "50", "--methods", "prefill,random", "--prompt-tokens", "10", "--context-tokens", "48"]
    done = subprocess.run([*command, *options, "--out", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "prefill 50 %" in done.stdout
    assert json.loads((tmp_path / "evaluation.json").read_text())["schema"] == SCHEMA


@pytest.mark.parametrize("text", ["0", "120", "", "a,b", "50,-1"])
def test_sizes_are_percentages(text: str) -> None:
    assert parse_percents("100,50%,6.25") == (100.0, 50.0, 6.25)
    with pytest.raises(InvalidRequest, match="not a list of percentages"):
        parse_percents(text)
