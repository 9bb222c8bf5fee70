"""Processes that import what a worker needs while Ray starts, and then become Ray's first workers.

Ray starts a worker by running a program, and knows it by what it reports once it is connected. Where an embedded Ray
starts, that program is this file: it hands its words, its environment and its open files to a process that waits, and
ends; where none waits, it runs Ray's own program. So a start of the service saves what the imports of torch and
transformers take, and workers that are started later are as they were.
"""

from __future__ import annotations

import json
import os
import runpy
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

PROGRAM = "from pager.cluster.spare import wait; wait()"
WORKER = "ray._private.workers.default_worker"  # Ray's own program
TEMP_DIR = "--temp-dir="  # the word by which it learns of the folder that Ray uses; the socket is beside that
SOCKET = "spare.sock"
STANDARD_FILES = (0, 1, 2)
TIMEOUT_S = 120.0  # for what a process that waits has still to import, on a busy machine
TAKEN = b"1"
NUM_THREADS = "OMP_NUM_THREADS"
# What torch and transformers import beyond a model's needs is half of the time that they take to import, and 80 MiB.
# Where they are installed, scipy serves losses of training, and accelerate other ways to load a model. Tensors in parts
# are for models on many machines. torch's compiler is used by nothing here; its decorators have no effect then, and one
# part of it serves masks, and is real.
UNUSED = ("scipy", "accelerate")
COMPILER = "torch._dynamo"
LEFT_OUT = "torch.distributed.tensor."


class Spares:
    """The processes that wait on this machine, each to become one worker. They end with the one that started them."""

    def __init__(self, count: int = 0, num_threads: int = 1) -> None:
        """Starts them; OpenMP reads how many threads it has for each when it is imported."""
        self._waiting: list[tuple[subprocess.Popen[bytes], socket.socket]] = []
        for _ in range(count):
            here, there = socket.socketpair()
            with there:
                process = subprocess.Popen(
                    [sys.executable, "-P", "-c", PROGRAM],
                    stdin=there.fileno(),
                    env=os.environ | {NUM_THREADS: str(num_threads)},
                )
            threading.Thread(target=process.wait, name="spare", daemon=True).start()
            self._waiting.append((process, here))

    @classmethod
    def of(cls, words: Sequence[str]) -> Spares:
        """Starts what the words of a command line ask for: how many, and the threads of each."""
        return cls(*map(int, words))

    @property
    def pids(self) -> list[int]:
        return [process.pid for process, _ in self._waiting]

    def offer(self, temp_dir: Path) -> str | None:
        """Has the processes wait for a Ray that uses this folder, at a socket beside it. Returns the program that it
        has to run for a worker; None where there are no processes.
        """
        if not self._waiting:
            return None
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(temp_dir.parent / SOCKET))
            listener.listen(len(self._waiting))
            for _, control in self._waiting:
                with suppress(OSError):  # it has ended
                    socket.send_fds(control, [TAKEN], [listener.fileno()])
        return __file__

    def end(self) -> None:
        """Ends the processes, those among them that are workers now."""
        for process, control in self._waiting:
            control.close()
            process.kill()
            process.wait()
        self._waiting.clear()


# --- a process that waits ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Start:
    """A start of Ray's program for a worker: the words after its name, and what it is started with."""

    words: list[str]
    folder: str
    environment: dict[str, str]


def wait() -> None:
    """Runs the process: imports, takes one start, and goes on as the process that Ray has started."""
    control = socket.socket(fileno=os.dup(0))
    threading.Thread(target=_end_with, args=(control,), name="end with parent", daemon=True).start()
    try:
        import_for_worker()
    except Exception:
        return  # the process that Ray starts says why
    _, [listening], _, _ = socket.recv_fds(control, 1, 1)
    with socket.socket(fileno=listening) as listener:
        while (start := _next(listener)) is None:
            pass
    os.chdir(start.folder)
    os.environ.clear()
    os.environ.update(start.environment)
    sys.argv[1:] = start.words
    runpy.run_module(WORKER, run_name="__main__", alter_sys=True)


def _end_with(parent: socket.socket) -> None:
    """Ends this process, whatever it does, once the one that started it has ended."""
    hung_up = select.poll()
    hung_up.register(parent, 0)
    hung_up.poll()
    os._exit(0)


def _next(listener: socket.socket) -> Start | None:
    """Waits for a start and confirms it, its open files being this process's from then on. Returns None where its
    sender has ended meanwhile: nothing must stand in for it then.
    """
    try:
        connection, _ = listener.accept()
        with connection, connection.makefile("rb") as stream:
            _, files, _, _ = socket.recv_fds(connection, 1, len(STANDARD_FILES))
            start = Start(**json.loads(stream.read()))
            connection.sendall(TAKEN)
    except (OSError, ValueError):
        return None
    for standard, file in zip(STANDARD_FILES, files, strict=True):
        os.dup2(file, standard)
        os.close(file)
    return start


# --- what a worker imports --------------------------------------------------------------------------------------------


def import_for_worker() -> None:
    """Imports what a worker needs, torch and transformers among it. They must look for no GPU: a worker's environment
    says which one it has, and Ray sets it later.
    """
    with lean_imports():
        import pager.cluster.loading  # noqa: F401


@contextmanager
def lean_imports() -> Iterator[None]:
    """Surrounds the imports of torch and transformers in a process that runs models and does nothing else with them.

    It imports less of both than it otherwise would, for good, and takes half of the time.
    """
    from pager.observe.metrics import importing

    sys.meta_path.insert(0, _LeavingOut())
    missing = [name for name in UNUSED if name not in sys.modules]
    sys.modules.update(dict.fromkeys(missing))  # type: ignore[arg-type] # imports of None fail as if it was not there
    try:
        with importing():
            yield
    finally:
        for name in missing:
            del sys.modules[name]


class _Missing(type):
    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls


class _Nothing(metaclass=_Missing):
    """Stands for every name of a module that is left out: a class without instances, a decorator without effect."""

    def __new__(cls, *arguments: Any, **_: Any) -> Any:
        return arguments[0] if arguments and callable(arguments[0]) else lambda function: function


class _StandIn(ModuleType):
    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing


class _LeavingOut(MetaPathFinder, Loader):
    """Finds modules that are left out, and makes stand-ins for them."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, _: ModuleType | None = None) -> ModuleSpec | None:
        if fullname == COMPILER:
            spec = ModuleSpec(fullname, self, is_package=True)
            spec.submodule_search_locations = [str(Path(each, "_dynamo")) for each in path or ()]
            return spec
        return ModuleSpec(fullname, self, is_package=True) if f"{fullname}.".startswith(LEFT_OUT) else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


# --- the program that Ray runs for a worker ---------------------------------------------------------------------------


def main(words: list[str]) -> NoReturn:
    """Hands the start to a process that waits, or runs Ray's program in this one."""
    if _hand_over(words):
        os._exit(0)
    os.execv(sys.executable, [sys.executable, "-P", "-m", WORKER, *words])


def _hand_over(words: list[str]) -> bool:
    folder = next((Path(word.removeprefix(TEMP_DIR)) for word in words if word.startswith(TEMP_DIR)), None)
    if folder is None:
        return False
    start = Start(words, os.getcwd(), dict(os.environ))
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(TIMEOUT_S)
            connection.connect(str(folder.parent / SOCKET))
            socket.send_fds(connection, [TAKEN], STANDARD_FILES)
            connection.sendall(json.dumps(asdict(start)).encode())
            connection.shutdown(socket.SHUT_WR)
            return connection.recv(1) == TAKEN
    except OSError:
        return False


if __name__ == "__main__":
    main(sys.argv[1:])
