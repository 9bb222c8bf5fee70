"""A real Prometheus watches the service: whatever dashboards, rules, alerts and scalers ask for is there."""

from __future__ import annotations

import contextlib
import functools
import http.server
import json
import re
import subprocess
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from pager.cli.lab import replay
from tests.support.processes import free_port
from tests.support.values import some

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "deploy" / "monitoring"
SCALERS = ROOT / "deploy" / "k8s" / "components" / "autoscale" / "scaledobject.yaml"
GROUPS = yaml.safe_load((MONITORING / "rules.yaml").read_text())["spec"]["groups"]
DASHBOARDS = tuple(sorted((MONITORING / "dashboards").glob("*.json")))
GRAFANA = {"$__rate_interval": "1m", "$model": ".*", "$worker": ".*", "$tenant": ".*"}
ANSWERED = 'sum(expert_pager_router_answers_total{code="OK"})'
SELECTOR = re.compile(r"(?<![\w:])(?:expert_pager_\w+|[a-z_]+:expert_pager_[\w:]+)(?:\{[^}]*\})?")


@dataclass(frozen=True)
class Prometheus:
    url: str

    def query(self, text: str) -> list[dict[str, Any]]:
        """The series of an instant query. What Prometheus refuses is a failed test."""
        data = urllib.parse.urlencode({"query": text}).encode()
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/query", data, timeout=30) as reply:
                return list(json.load(reply)["data"]["result"])
        except urllib.error.HTTPError as error:
            if error.code == 503:  # it starts
                raise
            pytest.fail(f"{text}: {error.read().decode()}")

    def rules(self) -> list[dict[str, Any]]:
        with urllib.request.urlopen(f"{self.url}/api/v1/rules", timeout=30) as reply:
            return [rule for group in json.load(reply)["data"]["groups"] for rule in group["rules"]]


# --- a service that has had something to do, and who watches it -------------------------------------------------------


@pytest.fixture(scope="module")
def prometheus(
    service: Any, prometheus_server: Path, tmp_path_factory: pytest.TempPathFactory, until: Callable[..., None]
) -> Iterator[Prometheus]:
    folder, targets = tmp_path_factory.mktemp("prometheus"), service.folder / "targets.json"
    with served(miss_curve(folder)) as curve, watching(prometheus_server, folder, targets, curve) as running:
        until(lambda: len(running.query("up == 1")) == 3, 120)
        for seed in range(3):
            service.generate("SELECT name FROM", pool=8, max_tokens=4, tenant=f"tenant-{seed}")
            service.generate("SELECT name FROM", pool=service.random_pool(seed, 8), max_tokens=4)
        service.generate("SELECT", max_tokens=4)
        service.refusal(b"\xff", max_tokens=1)
        newest = GROUPS[-2]["rules"][-1]["record"]
        until(lambda: running.query(f"{ANSWERED} >= 7") and running.query(newest), 120)
        yield running


def miss_curve(folder: Path) -> Path:
    """What `replay` makes of a trace of twelve experts that takes turns with eight of them."""
    trace = folder / "trace.jsonl"
    header = {"format": "expert-pager-trace", "version": 1, "fingerprint": "f", "expert_bytes": 4096}
    lines = [json.dumps(header | {"routed_per_layer": [6, 6]})]
    for turn in range(20):
        keys = [turn % 2, turn % 4, 1, (turn + 1) % 4]
        lines += [json.dumps(["lease", *keys]), json.dumps(["let_go", *keys])]
    trace.write_text("\n".join(lines) + "\n")
    replay(trace, budgets="25%,50%", prometheus=folder / "curve.prom", as_json=True)
    return folder / "curve.prom"


@contextlib.contextmanager
def served(path: Path) -> Iterator[str]:
    """The address of a server of files that has `path`."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        extensions_map = {".prom": "text/plain; version=0.0.4"}  # noqa: RUF012

        def log_message(self, *_: Any) -> None:
            pass

    handler = functools.partial(Handler, directory=str(path.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def watching(program: Path, folder: Path, targets: Path, curve: str) -> Iterator[Prometheus]:
    """Prometheus as in a cluster, where the operator adds the namespace, but more often."""
    groups = [{**group, "interval": "1s"} for group in GROUPS]
    (folder / "rules.yaml").write_text(yaml.safe_dump({"groups": groups}))
    namespace = [{"target_label": "namespace", "replacement": "expert-pager"}]
    config = {
        "global": {"scrape_interval": "3s", "scrape_timeout": "3s"},
        "rule_files": ["rules.yaml"],
        "scrape_configs": [
            {"job_name": "service", "file_sd_configs": [{"files": [str(targets)]}], "relabel_configs": namespace},
            {"job_name": "replay", "metrics_path": "/curve.prom", "static_configs": [{"targets": [curve]}]},
        ],
    }
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    command = (
        *(program, f"--config.file={folder / 'prometheus.yaml'}"),
        *(f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address={address}", "--log.level=warn"),
    )
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield Prometheus(f"http://{address}")
    finally:
        process.terminate()
        process.wait(60)


# --- what is asked ----------------------------------------------------------------------------------------------------


def panels() -> Iterator[tuple[str, str]]:
    for path in DASHBOARDS:
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel["targets"]:
                text = target["expr"]
                for name, value in GRAFANA.items():
                    text = text.replace(name, value)
                yield f"{path.stem}: {panel['title']} {target['refId']}", text


def outer_parts(text: str) -> list[str]:
    """The operands of `and`, `or` and `unless`, however nested in brackets."""
    text = text.strip()
    parts, depth, start = [], 0, 0
    for found in re.finditer(r"[()]|\b(?:and|or|unless)\b", text):
        if found[0] in "()":
            depth += 1 if found[0] == "(" else -1
        elif depth == 0:
            parts.append(text[start : found.start()])
            start = found.end()
    if parts:
        return [part for each in [*parts, text[start:]] for part in outer_parts(each)]
    if text.startswith("(") and text.endswith(")"):
        return outer_parts(text[1:-1])
    return [text]


def left_side(comparison: str) -> str:
    """Of the outermost comparison."""
    depth = 0
    for found in re.finditer(r"[(){}]|==|!=|>=|<=|>|<", comparison):
        if found[0] in "({":
            depth += 1
        elif found[0] in ")}":
            depth -= 1
        elif depth == 0:
            return comparison[: found.start()]
    raise AssertionError(f"nothing is compared: {comparison}")


def asked() -> Iterator[tuple[str, str]]:
    """Who asks, and what: of an alert its selectors and the left sides of what it compares."""
    yield from panels()
    for rule in (rule for group in GROUPS for rule in group["rules"]):
        if "record" in rule:
            yield rule["record"], rule["expr"]
            yield f"{rule['record']}, as recorded", rule["record"]
            continue
        for selector in SELECTOR.findall(rule["expr"]):
            yield f"{rule['alert']}: selector", selector
        for part in outer_parts(rule["expr"]):
            yield f"{rule['alert']}: left side", left_side(part)
    for trigger in yaml.safe_load(SCALERS.read_text())["spec"]["triggers"]:
        yield f"scaler: {trigger['name']}", trigger["metadata"]["query"]


def test_an_alert_is_taken_apart_as_it_should_be() -> None:
    parts = outer_parts('(a{x="1"} > 2 and b > 3)\nor\n(sum by (x) (rate(c[5m])) / d == 4)')
    assert [left_side(part).strip() for part in parts] == ['a{x="1"}', "b", "sum by (x) (rate(c[5m])) / d"]


# --- tests ------------------------------------------------------------------------------------------------------------


def test_whatever_is_asked_for_has_an_answer(prometheus: Prometheus, until: Callable[..., None]) -> None:
    questions = list(asked())
    kinds = ("cache-and-memory", "serving", "capacity", "namespace:", "ExpertPager", "scaler")
    assert all(any(where.startswith(kind) for where, _ in questions) for kind in kinds)
    unanswered = questions

    def ask() -> bool:
        """Again what had no answer: on a busy machine a scrape takes too long now and then, and its series rest."""
        nonlocal unanswered
        unanswered = [(where, text) for where, text in unanswered if not prometheus.query(text)]
        return not unanswered

    with contextlib.suppress(AssertionError):
        until(ask, 60)
    assert unanswered == []


def test_variables_have_values(prometheus: Prometheus, until: Callable[..., None]) -> None:
    def has_values(metric: str, label: str) -> bool:
        return bool({series["metric"].get(label) for series in prometheus.query(metric)} - {None})

    for path in DASHBOARDS:
        variables = json.loads(path.read_text())["templating"]["list"]
        assert [each["name"] for each in variables] == ["datasource", "model", "worker", "tenant"]
        for variable in variables[1:]:
            metric, label = some(re.fullmatch(r"label_values\((.*), (\w+)\)", variable["definition"])).groups()
            for name, value in GRAFANA.items():
                metric = metric.replace(name, value)
            until(functools.partial(has_values, metric, label))


def test_prometheus_takes_every_rule(prometheus: Prometheus, until: Callable[..., None]) -> None:
    until(lambda: "unknown" not in {rule["health"] for rule in prometheus.rules()})  # before it is evaluated
    found = prometheus.rules()
    assert len(found) == sum(len(group["rules"]) for group in GROUPS)
    assert [rule["name"] for rule in found if rule["health"] != "ok"] == []


def test_what_was_done_is_seen(prometheus: Prometheus, until: Callable[..., None]) -> None:
    def is_seen(text: str) -> bool:
        """By and by, as above."""
        return bool(prometheus.query(text))

    until(lambda: is_seen(f"{ANSWERED} >= 7"))
    until(lambda: is_seen("sum(expert_pager_transfer_bytes_total) > 0"))
    missed = 'expert_pager_replay{}_bytes{{policy="lru",budget="25%"}}'
    until(lambda: is_seen(f"{missed.format('_missed')} > {missed.format('_more_missed')}"))


@pytest.mark.parametrize("target", ["router", "worker-0"])
def test_promtool_has_nothing_to_say_of_a_live_scrape(service: Any, promtool: Path, target: str) -> None:
    with urllib.request.urlopen(f"http://{service.targets()[target]}/metrics", timeout=30) as reply:
        page = reply.read()
    done = subprocess.run([promtool, "check", "metrics"], input=page, capture_output=True, check=False)
    # The names with a colon are others', which endpoint pickers look for.
    complaints = [line for line in (done.stdout + done.stderr).splitlines() if not line.startswith(b"vllm:")]
    assert complaints == []


def test_dashboards_show_rates_and_quantiles_never_averages_of_sums() -> None:
    for where, text in panels():
        assert not re.search(r"\bavg|_sum\b.*_count\b", text), where
        assert "_total" not in text or re.search(r"\b(rate|increase)\(", text), where
