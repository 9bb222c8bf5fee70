"""Bundles of options: a command that takes one offers each of its fields, and gets them checked and together."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from pager.cli.options import AnswerPoolOptions, PoolOptions, PromptOptions, bundled
from pager.cli.pools import Place, ServerOptions
from pager.types import Count, PoolSource


@dataclass(frozen=True, kw_only=True)
class Address:
    host: Annotated[str, typer.Option(help="Where it is.")] = "here"


@dataclass(frozen=True, kw_only=True)
class Peer(Address):
    port: Annotated[int, typer.Option("--port", "-p")] = 1


def test_a_bundle_s_fields_are_options_with_their_defaults() -> None:
    app = typer.Typer()
    seen: list[tuple[str, Peer, bool]] = []

    @app.command()
    @bundled
    def call(word: Annotated[str, typer.Argument()], peer: Peer, loud: bool = False) -> None:
        seen.append((word, peer, loud))

    runner = CliRunner()
    assert runner.invoke(app, ["hi", "-p", "7", "--loud"]).exit_code == 0
    assert runner.invoke(app, ["hi", "--host", "there"]).exit_code == 0
    assert seen == [("hi", Peer(host="here", port=7), True), ("hi", Peer(host="there", port=1), False)]
    assert runner.invoke(app, ["hi", "--peer", "x"]).exit_code == 2, "the bundle itself is no option"


def test_the_options_of_a_pool_make_one_ask() -> None:
    assert PoolOptions(pool="4").ask().size == Count(4)
    ask = AnswerPoolOptions(pool="4", pool_source=PoolSource.PREDICTION, drift="0.3").ask()
    assert (ask.size, ask.source) == (Count(4), PoolSource.PREDICTION)
    assert ask.drift is not None
    with pytest.raises(typer.BadParameter, match="--pool and --pool-name name different pools"):
        PoolOptions(pool="4", pool_name="law").ask()
    with pytest.raises(typer.BadParameter, match="names a pool"):
        AnswerPoolOptions(pool_digest="ab", pool_source=PoolSource.PREFILL).ask()


def test_options_that_can_take_no_effect_are_refused() -> None:
    Place(model=Path("m"), dtype="float32").check({"--router": "trunk"})
    for options, named in (
        (Place(), "say where to run it"),
        (Place(model=Path("m"), server="s"), "say where to run it"),
        (Place(model=Path("m"), timeout=1.0), "--timeout .* goes with --server"),
        (Place(server="s", dtype="float32"), "--dtype .* goes with --model"),
        (ServerOptions(tls_ca=Path("ca")), "--tls-ca .* goes with --server"),
        (ServerOptions(server="s", tls_identity=Path("me")), "--tls-identity .* goes with --tls-ca"),
    ):
        with pytest.raises(typer.BadParameter, match=named):
            options.check()
    with pytest.raises(typer.BadParameter, match=r"--router .* goes with --model"):
        Place(server="s").check({"--router": "trunk"})


def test_a_prompt_is_given_once() -> None:
    assert PromptOptions(prompt="hi").read() == "hi"
    assert PromptOptions(token_ids="1, 2").read() == (1, 2)
    with pytest.raises(typer.BadParameter, match="give the prompt exactly once"):
        PromptOptions(prompt="hi", token_ids="1").read()


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [[], ["generate", "--help"]])
def test_help_is_shown_without_loading_what_runs_models(arguments: list[str]) -> None:
    program = (
        "import sys; from pager.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'huggingface_hub', 'ray', 'grpc', 'redis'}\n"
        "print('loaded', sorted(heavy & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "loaded []", done.stderr
    assert len(done.stdout.splitlines()) > 1
