"""One HTML file, complete in itself: style, script and data inside, nothing fetched. Documents are not trusted."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from importlib import resources
from string import Template
from typing import Any

from pager.errors import InvalidRequest
from pager.evaluation.cluster_report import ModelReport, model_payload
from pager.evaluation.clusters import COMPONENTS

MAX_PAGE_BYTES = 5_000_000
LONGEST_NAME = 90


def build_page(reports: Sequence[ModelReport], seed: int, max_tokens: int) -> str:
    """The page for one model, or for two of the same documents. At most MAX_PAGE_BYTES in UTF-8.

    It shows every document if they fit, else as many of each domain as do, and says so. Raises InvalidRequest when
    even one of each does not fit.
    """
    names = _names(reports)
    all_per_domain = max(_documents_of(reports[0]).values())
    for per_domain in _halvings(all_per_domain):
        shown = _first_of_each(reports[0], per_domain)
        payload = _payload(reports, shown, seed, max_tokens)
        page = _render(" and ".join(names), payload)
        if len(page.encode()) <= MAX_PAGE_BYTES:
            return page
    raise InvalidRequest(
        f"the page would be larger than {MAX_PAGE_BYTES / 1e6:g} MB with a single document of each domain; give fewer "
        "files, or fewer tokens a document"
    )


def _halvings(number: int) -> list[int]:
    return [number >> shift for shift in range(number.bit_length())]


def _names(reports: Sequence[ModelReport]) -> list[str]:
    return [report.name for report in reports]


def _documents_of(report: ModelReport) -> dict[str, int]:
    return {domain: sum(document.domain == domain for document in report.documents) for domain in report.domains}


def _first_of_each(report: ModelReport, per_domain: int) -> list[int]:
    seen = dict.fromkeys(report.domains, 0)
    shown = []
    for index, document in enumerate(report.documents):
        if seen[document.domain] < per_domain:
            seen[document.domain] += 1
            shown.append(index)
    return shown


def _payload(reports: Sequence[ModelReport], shown: Sequence[int], seed: int, max_tokens: int) -> dict[str, Any]:
    first = reports[0]
    documents = [first.documents[index] for index in shown]
    return {
        "lede": _lede(reports),
        "method": _method(reports, len(shown), seed, max_tokens),
        "domains": list(first.domains),
        "documentsOf": list(_documents_of(first).values()),
        "documents": [
            {"domain": first.domains.index(document.domain), "name": _shorten(document.name)} for document in documents
        ],
        "models": [model_payload(report, shown) for report in reports],
    }


def _shorten(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"…{name[1 - LONGEST_NAME :]}"


def _lede(reports: Sequence[ModelReport]) -> str:
    first = reports[0]
    tokens = " and ".join(f"{number:,}" for number in sorted({report.num_tokens for report in reports}))
    what = f"{tokens} tokens of {len(first.documents)} documents from {len(first.domains)} domains"
    if len(reports) > 1:
        return f"{what}. Each model groups them by the experts that its routers would send them to."
    return f"{what}, grouped by the experts that the routers of all layers would send them to."


def _method(reports: Sequence[ModelReport], num_shown: int, seed: int, max_tokens: int) -> list[list[str]]:
    first = reports[0]
    counts = _documents_of(first).values()
    each = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    fitted = "; ".join(
        f"{report.name}: {sum(report.facts.routed_per_layer):,} probabilities a token, {report.clusters.explained:.0%} "
        f"of the variance kept, centres fitted to {report.clusters.num_fitted:,} of {report.num_tokens:,} tokens"
        for report in reports
    )
    shown = "all of them" if num_shown == len(first.documents) else f"{num_shown} of them, the first of each domain"
    return [
        ["Sampling", f"{each} documents of each domain, drawn at random (seed {seed}), each cut at its first "
         f"{max_tokens} tokens. Figures count all {len(first.documents)} documents; the page holds the text of "
         f"{shown}."],
        ["Routing", "A forward with every expert allowed. A token is described by its router probabilities over the "
         "routed experts of each layer, the layers side by side; shared experts, which every token uses, are left "
         "out."],
        ["Clusters", f"PCA to at most {COMPONENTS} components, then spherical k-means (rows and centres of length "
         f"one). {fitted}. Clusters are numbered by size; a hue stands for clusters whose centres are near."],
        ["Typical tokens", "Those that set the text of a cluster apart most: frequent in it, and more so than "
         "elsewhere. ␣ is a space, ⏎ the end of a line, ⇥ a tab."],
        ["Experts", "The pool of a document is the eighth of the experts of a layer (shared ones included, and never "
         "fewer than a token picks) with the most router probability over its tokens. A cell says how many documents "
         "of a domain have the expert in their pool, or what share of the router probability of the domain it gets."],
    ]  # fmt: skip


def _render(names: str, payload: dict[str, Any]) -> str:
    style, script = _part("page.css"), _part("page.js")
    return Template(_part("page.html")).substitute(
        title=html.escape(f"How {names} route{'' if len(payload['models']) > 1 else 's'} tokens"),
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        data=embed_json(payload),
    )


def _part(name: str) -> str:
    return resources.files("pager.evaluation").joinpath("page", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """For the page's own content security policy: no other script or style runs in it."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def embed_json(value: Any) -> str:
    """JSON that can stand inside a script element: nothing in it can end the element or start a comment."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    text = text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
    # A lone surrogate can not be written as UTF-8.
    return text.encode("utf-8", "replace").decode("utf-8")
