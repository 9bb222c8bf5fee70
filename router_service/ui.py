"""`/ui`, a page to look at, and `/ui/state.json`, what it shows, on the metrics port.

The page is complete in itself: style and script inside, and a policy that lets no other run. It puts names into the
document as text, never as markup.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import logging
from collections.abc import Iterable
from importlib import resources
from string import Template
from typing import TYPE_CHECKING
from wsgiref.headers import Headers

from router_service.ui_watch import Watch

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

log = logging.getLogger("expert_pager.router")

STATE_TIMEOUT_S = 5.0
_SAFE = (
    ("Cache-Control", "no-store"),
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
)


class Page:
    """Answers in the threads of the HTTP server, and asks the event loop for the state."""

    def __init__(self, watch: Watch, loop: asyncio.AbstractEventLoop) -> None:
        self._watch = watch
        self._loop = loop
        style, script = _part("page.css"), _part("page.js")
        self._html = Template(_part("page.html")).substitute(style=style, script=script).encode()
        self._policy = (
            f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; connect-src 'self'; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """As a WSGI application, mounted at `/ui`."""
        method = environ["REQUEST_METHOD"]
        status, kind, body = self._answer(method, environ.get("PATH_INFO", ""))
        headers = Headers([("Content-Type", kind), ("Content-Length", str(len(body))), *_SAFE])
        headers["Content-Security-Policy"] = self._policy
        start_response(status, headers.items())
        return [] if method == "HEAD" else [body]

    def _answer(self, method: str, path: str) -> tuple[str, str, bytes]:
        if method not in ("GET", "HEAD"):
            return "405 Method Not Allowed", "text/plain", b"GET or HEAD only\n"
        if path in ("/ui", "/ui/"):
            return "200 OK", "text/html; charset=utf-8", self._html
        if path == "/ui/state.json":
            return self._state()
        return "404 Not Found", "text/plain", b"there is /ui and /ui/state.json\n"

    def _state(self) -> tuple[str, str, bytes]:
        asked = asyncio.run_coroutine_threadsafe(self._watch.state(), self._loop)
        try:
            state = asked.result(STATE_TIMEOUT_S)
        except Exception as error:  # a page that is looked at must not end anything
            asked.cancel()
            log.warning("the state for /ui could not be had: %s", type(error).__name__)
            return "503 Service Unavailable", "text/plain", b"the router does not answer in time\n"
        return "200 OK", "application/json", json.dumps(state, separators=(",", ":"), allow_nan=False).encode()


def _part(name: str) -> str:
    return resources.files("router_service").joinpath("ui_page", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
