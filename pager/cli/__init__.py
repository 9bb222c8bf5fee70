"""`expert-pager`: the commands, and the one place where errors become a line and an exit status."""

from __future__ import annotations

import io
import logging
import os
import sys
from typing import Annotated

import typer

from pager import __version__
from pager.cli import checkpoint, generate, lab, pools, serve
from pager.cli.keys import keys_app
from pager.cli.options import print_error
from pager.cli.pools import pools_app
from pager.errors import PagerError
from pager.store.hub import keep_offline

app = typer.Typer(
    name="expert-pager",
    help="Serve mixture-of-experts models with only the experts in memory that a request needs.",
    epilog="Start with: expert-pager inspect MODEL, then expert-pager generate 'a prompt' --model MODEL.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
app.command("serve")(serve.serve)
app.command("config", context_settings=serve.PASS_ON)(serve.check_config)
app.command("generate")(generate.generate)
app.command("route")(generate.route)
app.command("calibrate")(pools.calibrate)
app.add_typer(pools_app, name="pools")
app.add_typer(keys_app, name="keys")
app.command("status")(serve.status)
app.command("drain")(serve.drain)
app.command("inspect")(checkpoint.inspect)
app.command("fit-router")(lab.fit_router)
app.command("clusters")(lab.clusters)
app.command("eval")(lab.evaluate)
app.command("pack")(checkpoint.pack)
app.command("verify")(checkpoint.verify)
app.command("slice")(checkpoint.slice_model)
app.command("replay")(lab.replay)
app.command("simulate")(lab.simulate)

_debug = False


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"expert-pager {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an unexpected error came from.")] = False,
) -> None:
    global _debug
    _debug = debug


def main() -> None:
    """Runs a command. Exit status: 0 done, 1 failed (one line on stderr says why), 2 wrong usage, 130 interrupted."""
    # Except for a model that is named as on the hub, everything is read from local files; libraries that would look
    # further, or print progress on stderr, are configured not to.
    keep_offline()
    for name, value in (
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("TOKENIZERS_PARALLELISM", "false"),
        ("RUST_BACKTRACE", "0"),
    ):
        os.environ.setdefault(name, value)
    # A file's name may not be valid text; printing it must not fail.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # A failure is one line, the last one; what was logged before shows only where a command sets logging up.
    for name in ("pager", "expert_pager"):
        logging.getLogger(name).addHandler(logging.NullHandler())
    try:
        app(prog_name="expert-pager")
    except PagerError as error:
        if _debug:
            raise
        # Not the message alone: the user of the command line may know the file at fault.
        print_error(f"{error} [{error.status}]" if error.status else str(error))
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # The reader of the output has closed it, as `| head` does; stdout must not be flushed again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        if _debug:
            raise
        print_error(f"unexpected {type(error).__name__}: {error}; `expert-pager --debug …` shows where it came from")
        sys.exit(1)
