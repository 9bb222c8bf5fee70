"""Grammars that constrain answers: compiled by a separate process, then a mask for every token.

xgrammar compiles them. A grammar of a few bytes can take hours and all memory, and C++ code cannot be interrupted. So a
helper process compiles; the system ends it when one grammar has taken too much, and the request with that grammar
fails. The helper is started for the first grammar and ends when none has come for a while. It receives the vocabulary
and grammars, nothing else.

Run as a program, this module is that helper.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import select
import signal
import subprocess
import sys
import time
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np

from pager.errors import InvalidRequest, NotReady, PagerError
from pager.tokenizing import TokenTexts
from pager.types import Grammar, GrammarKind

if TYPE_CHECKING:
    import xgrammar

log = logging.getLogger(__name__)

COMPILE_CPU_S = 5.0
COMPILE_BYTES = 512 * 2**20
COMPILED_BYTES = 32 * 2**20
MASK_S = 10.0  # for one answer, all its masks together
IDLE_S = 60.0
_WALL_S = 120.0  # wall-clock time on a machine that is otherwise busy
_KEPT = 64
_KEPT_BYTES = 64 * 2**20
_MESSAGE_CHARACTERS = 300
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "HOME", "LANG", "TMPDIR")


class Grammars:
    """Compiles grammars for one vocabulary, one after the other, and keeps those that were used last.

    `compile` is for any thread and returns at once. Failures are kept too, so that they are tried once.
    """

    def __init__(self, texts: TokenTexts, vocab_size: int, eos_ids: frozenset[int]) -> None:
        self._texts = texts
        self._vocab_size = vocab_size
        self._eos_ids = eos_ids
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammars")  # the only thread that uses the following
        self._kept: OrderedDict[Grammar, xgrammar.CompiledGrammar | InvalidRequest] = OrderedDict()
        self._kept_bytes = 0
        self._vocabulary: xgrammar.TokenizerInfo | None = None
        self._helper: _Helper | None = None

    def compile(self, grammar: Grammar) -> Future[xgrammar.CompiledGrammar]:
        """Returns a future of the compiled grammar, InvalidRequest, or NotReady for a failure that may be retried.

        Raises InvalidRequest for what can be known at once, NotReady once it is closed. A grammar that is cancelled
        before its turn is not compiled.
        """
        field = f"sampling.{grammar.kind}"
        if find_spec("xgrammar") is None:
            raise InvalidRequest(
                "this worker cannot constrain answers by a grammar, because xgrammar is missing; install "
                "expert-pager[grammar]",
                field=field,
            )
        if not self._eos_ids or not self._texts.tokenizer.get_vocab_size():
            raise InvalidRequest(
                "this model has no tokenizer or no end of sequence, which an answer to a grammar needs", field=field
            )
        try:
            return self._thread.submit(self._compile, grammar)
        except RuntimeError:  # it is closed
            raise NotReady("this worker is shutting down; send the request to another", retry_after_s=1.0) from None

    def close(self) -> None:
        """Ends the helper. Idempotent."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        if self._helper is not None:
            self._helper.end()

    def _compile(self, grammar: Grammar) -> xgrammar.CompiledGrammar:
        found = self._kept.get(grammar)
        if found is None:
            found = self._kept[grammar] = self._compile_anew(grammar)
            self._kept_bytes += _bytes_of(found)
        self._kept.move_to_end(grammar)
        while len(self._kept) > _KEPT or self._kept_bytes > _KEPT_BYTES:
            self._kept_bytes -= _bytes_of(self._kept.popitem(last=False)[1])
        if isinstance(found, InvalidRequest):
            raise found
        return found

    def _compile_anew(self, grammar: Grammar) -> xgrammar.CompiledGrammar | InvalidRequest:
        import xgrammar

        if self._vocabulary is None:
            self._vocabulary = self._read_vocabulary()
        if self._helper is None or not self._helper.is_alive:
            if self._helper is not None:
                self._helper.end()
            self._helper = _Helper(self._vocabulary.serialize_json())
        started_s = time.monotonic()
        reply = self._helper.compile(grammar)
        log.info("a grammar of %d characters: %.3f s", len(grammar.text), time.monotonic() - started_s)
        if "compiled" not in reply:
            kind = grammar.kind
            return InvalidRequest(f"sampling.{kind} cannot be compiled: {reply['error']}", field=f"sampling.{kind}")
        return xgrammar.CompiledGrammar.deserialize_json(reply["compiled"], self._vocabulary)

    def _read_vocabulary(self) -> xgrammar.TokenizerInfo:
        import xgrammar
        from transformers import PreTrainedTokenizerFast

        ends = sorted(self._eos_ids)
        as_read = xgrammar.TokenizerInfo.from_huggingface(
            PreTrainedTokenizerFast(tokenizer_object=self._texts.tokenizer),
            vocab_size=self._vocab_size,
            stop_token_ids=ends,
        )
        # A grammar does not see tokens that have no text in an answer.
        tokens = [self._texts.token(token_id) or "" for token_id in range(self._vocab_size)]
        return xgrammar.TokenizerInfo(
            tokens,
            as_read.vocab_type,
            vocab_size=self._vocab_size,
            stop_token_ids=ends,
            add_prefix_space=as_read.add_prefix_space,
        )


def _bytes_of(found: xgrammar.CompiledGrammar | InvalidRequest) -> int:
    return 0 if isinstance(found, InvalidRequest) else int(found.memory_size_bytes)


class GrammarMask:
    """The tokens that the grammar of one answer allows next. Mutable; owned by the answer's request."""

    def __init__(self, compiled: xgrammar.CompiledGrammar, grammar: Grammar) -> None:
        import xgrammar

        self._field = f"sampling.{grammar.kind}"
        self._matcher = xgrammar.GrammarMatcher(compiled)
        self._vocab_size = int(compiled.tokenizer_info.vocab_size)
        self._bits = np.zeros((1, -(-self._vocab_size // 32)), np.int32)
        self._num_seen = 0
        self._spent_s = 0.0

    def allowed(self, output_ids: Sequence[int]) -> np.ndarray:
        """Returns [V] bools. Raises InvalidRequest once the grammar has taken too long to follow."""
        started_s = time.perf_counter()
        for token_id in output_ids[self._num_seen :]:
            if not self._matcher.accept_token(token_id):
                raise PagerError(f"token {self._num_seen} of the answer is not one that its grammar allows")
            self._num_seen += 1
        self._matcher.fill_next_token_bitmask(self._bits)
        self._spent_s += time.perf_counter() - started_s
        if self._spent_s > MASK_S:
            raise InvalidRequest(
                f"{self._num_seen} tokens of {self._field} have taken {self._spent_s:.0f} s to follow, and an answer "
                f"has {MASK_S:g}; make it less ambiguous",
                field=self._field,
            )
        return np.unpackbits(self._bits.view(np.uint8)[0], count=self._vocab_size, bitorder="little").view(np.bool_)


class _Helper:
    """A process that compiles. Used by one thread."""

    def __init__(self, vocabulary: str) -> None:
        env = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        env |= {
            "PYTHONPATH": os.pathsep.join(sys.path),
            "PYTHONUTF8": "1",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pager.engine.grammar"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=env,
            encoding="utf-8",
        )
        self.end = weakref.finalize(self, _end, self._process)
        self._used_s = time.monotonic()
        if not (self._tell(vocabulary) and self._hear()):
            self.end()

    @property
    def is_alive(self) -> bool:
        """Tells whether the process is certain to serve one more grammar."""
        is_recent = time.monotonic() - self._used_s < IDLE_S / 2
        return is_recent and self.end.alive and self._process.poll() is None

    def compile(self, grammar: Grammar) -> dict[str, str]:
        """Returns {"compiled": ...} or {"error": ...}. Raises NotReady."""
        self._used_s = time.monotonic()
        if not self.end.alive or not self._tell(json.dumps({"kind": grammar.kind, "text": grammar.text})):
            self.end()
            raise NotReady("the process that compiles grammars ended; send the request again", retry_after_s=1.0)
        reply = self._hear()
        if reply is None:
            self.end()
            used = f"{COMPILE_CPU_S:g} s or {COMPILE_BYTES >> 20} MiB"
            return {"error": f"it takes more than {used}; make it smaller, repeat less in it"}
        return reply

    def _tell(self, line: str) -> bool:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line.replace("\n", " ") + "\n")
            self._process.stdin.flush()
        except OSError:
            return False
        return True

    def _hear(self) -> dict[str, str] | None:
        """Returns the next line; None where the process has ended, or sent nothing for too long."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], _WALL_S)[0]:
            return None
        line = self._process.stdout.readline()
        reply: dict[str, str] | None = json.loads(line) if line.endswith("\n") else None
        return reply


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):
                pipe.close()


# --- the helper process ---------------------------------------------------------------------------------------------


def _serve() -> None:
    """Reads the vocabulary, then one grammar a line, until none comes for IDLE_S; answers each with a line."""
    import xgrammar

    vocabulary = xgrammar.TokenizerInfo.deserialize_json(sys.stdin.readline())
    compiler = xgrammar.GrammarCompiler(vocabulary, max_threads=1, cache_enabled=False)
    with open("/proc/self/statm", encoding="ascii") as file:
        data_bytes = int(file.read().split()[5]) * resource.getpagesize()
    most_bytes = data_bytes + COMPILE_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (most_bytes, most_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    print(json.dumps({"ready": "yes"}), flush=True)
    while select.select([sys.stdin], [], [], IDLE_S)[0] and (line := sys.stdin.readline()):
        signal.setitimer(signal.ITIMER_PROF, COMPILE_CPU_S)
        try:
            compiled = _compiled(compiler, **json.loads(line)).serialize_json()
            reply = {"compiled": compiled}
            if len(compiled) > COMPILED_BYTES:
                reply = {
                    "error": f"it becomes {len(compiled)} bytes, and {COMPILED_BYTES} are allowed; make it smaller"
                }
        except Exception as error:
            reply = {"error": _reason(error)}
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(reply), flush=True)


def _compiled(compiler: xgrammar.GrammarCompiler, kind: str, text: str) -> xgrammar.CompiledGrammar:
    match GrammarKind(kind):
        case GrammarKind.JSON_SCHEMA:
            return compiler.compile_json_schema(text, any_whitespace=False)
        case GrammarKind.JSON_OBJECT:
            return compiler.compile_json_schema('{"type": "object"}', any_whitespace=False, strict_mode=False)
        case GrammarKind.REGEX:
            return compiler.compile_regex(text)
        case GrammarKind.EBNF:
            return compiler.compile_grammar(text)


def _reason(error: Exception) -> str:
    """Returns the last part of xgrammar's message, which begins with a time and a place in its own sources."""
    return str(error).rpartition(": ")[2].strip()[:_MESSAGE_CHARACTERS] or type(error).__name__


if __name__ == "__main__":
    _serve()
