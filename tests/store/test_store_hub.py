"""Models named as on the hub, from a server on this machine that plays it."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import pager
from pager.cli import main
from pager.cli.serve import with_model_here
from pager.config import load_config
from pager.errors import CheckpointError
from pager.store import hub
from pager.store.hub import HubModel, local_folder
from tests.support.files import ROOT
from tests.support.processes import free_port

NAME, COMMIT = "tests/Emo-Tiny", "c0ffee" + "0" * 34
CHECKPOINT = ROOT / "tests/data/golden/ckpt_emo_tiny"


class Hub:
    """A server with one model. `asked`: the files that were fetched."""

    def __init__(self) -> None:
        self.files = {path.name: path.read_bytes() for path in CHECKPOINT.iterdir() if path.is_file()}
        self.files |= {
            "modeling_emo.py": b"raise SystemExit",
            "pytorch_model.bin": b"pickle",
            "onnx/config.json": b"{}",
        }
        self.asked: set[str] = set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        path = path.partition("?")[0].replace("%2F", "/")
        api = f"/api/models/{NAME}"
        if path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
            return 200, {}, json.dumps({"id": NAME, "sha": COMMIT, "siblings": []}).encode()
        if path == f"{api}/tree/{COMMIT}":
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in self.files.items()
            ]
            return 200, {}, json.dumps(entries).encode()
        name = path.removeprefix(f"/{NAME}/resolve/{COMMIT}/")
        if name in self.files:
            self.asked.add(name)
            etag = hashlib.sha1(self.files[name]).hexdigest()
            return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, self.files[name]
        code = "RevisionNotFound" if path.startswith(api) else "RepoNotFound"
        return 404, {"X-Error-Code": code}, b"{}"

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, headers, body = hub.answer(self.path)
                self.send_response(status)
                for name, value in (headers | {"Content-Length": str(len(body))}).items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            do_HEAD = do_GET

            def log_message(self, *_: object) -> None:
                pass

        return Handler


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(hub, "_is_kept_offline", False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )


@pytest.fixture
def server(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    playing = Hub()
    at(playing.url, monkeypatch)
    yield playing
    playing.close()


def test_a_model_is_downloaded_once_without_code_and_pickles(server: Hub, cache: Path) -> None:
    with pager.load_model(NAME, expert_memory="50%") as model:
        assert model.config.model_type == "emo"
    folder = local_folder(f"hf:{NAME}")
    assert folder.is_relative_to(cache)
    assert server.asked == {path.name for path in CHECKPOINT.iterdir()}
    server.asked.clear()
    assert local_folder(f"{NAME}@{COMMIT}") == folder
    assert not server.asked


def test_a_model_in_the_cache_needs_no_connection(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = local_folder(NAME)
    at(f"http://127.0.0.1:{free_port()}", monkeypatch)
    assert local_folder(NAME) == folder
    with pytest.raises(CheckpointError, match=r"tests/Other is not in the cache .* cannot be fetched"):
        local_folder("tests/Other")


def test_the_command_line_keeps_libraries_offline_and_fetches_all_the_same(
    server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.keep_offline()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    settings = with_model_here(load_config(overrides={"model.path": NAME}))
    assert settings.model.name == "Emo-Tiny"
    assert (Path(settings.model.path) / "config.json").is_file()


def test_commands_take_names_on_the_hub(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for arguments, status in ((("pack", f"hf:{NAME}", "packed"), 0), (("pack", "hf:tests/unknown", "other"), 1)):
        monkeypatch.setattr(sys, "argv", ["expert-pager", *arguments])
        with pytest.raises(SystemExit) as exit_:
            main()
        assert int(exit_.value.code or 0) == status
    assert (tmp_path / "packed" / "config.json").is_file()
    assert "no such model on the hub" in capsys.readouterr().err


def test_an_offline_user_is_told_so(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.keep_offline()
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE forbids to fetch it"):
        local_folder(NAME)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tests/unknown", "no folder 'tests/unknown' here and no such model on the hub"),
        (f"{NAME}@nowhere", "no revision 'nowhere' on the hub"),
        ("hf:one word", "names no model"),
        ("hf:a/b/c", "names no model"),
    ],
)
def test_what_is_not_there_is_named(server: Hub, name: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        local_folder(name)


def test_a_folder_that_is_here_is_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for text in ("models/emo-typo", "./a/b", "/a/b", "model", "a/b/c", "../a"):
        assert HubModel.parse(text) is None
    assert HubModel.parse("allenai/Emo_1b14b_1T@main") == HubModel("allenai/Emo_1b14b_1T", "main")
