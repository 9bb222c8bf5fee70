"""Alerts ring when they should and are silent when they should, and each has its section of the runbook."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "deploy" / "monitoring"
CASES = tuple(sorted((MONITORING / "tests").glob("*.yaml")))
GROUPS: list[dict[str, Any]] = yaml.safe_load((MONITORING / "rules.yaml").read_text())["spec"]["groups"]
ALERTS = {rule["alert"]: rule for group in GROUPS for rule in group["rules"] if "alert" in rule}
RUNBOOK = (ROOT / "docs" / "runbook.md").read_text()
SECTIONS = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", RUNBOOK, re.M | re.S))


def run(*command: object, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The groups as a rule file, evaluated as often as a test says, and the tests beside it."""
    groups = [{key: value for key, value in group.items() if key != "interval"} for group in GROUPS]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": groups}))
    for path in CASES:
        shutil.copy(path, tmp_path)
    return tmp_path


def test_promtool_takes_the_rules(folder: Path, promtool: Path) -> None:
    done = run(promtool, "check", "rules", "rules.yaml", folder=folder)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("case", [path.name for path in CASES])
def test_alerts_fire_when_they_should_and_only_then(folder: Path, promtool: Path, case: str) -> None:
    done = run(promtool, "test", "rules", case, folder=folder)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_proven_to_fire_and_to_stay_silent() -> None:
    fires: set[str] = set()
    silent: set[str] = set()
    for path in CASES:
        for test in yaml.safe_load(path.read_text())["tests"]:
            for check in test["alert_rule_test"]:
                (fires if check["exp_alerts"] else silent).add(check["alertname"])
    assert fires == silent == set(ALERTS)


def test_every_alert_has_a_section_and_no_section_is_without_an_alert() -> None:
    assert set(SECTIONS) == set(ALERTS)
    for name, text in SECTIONS.items():
        words = re.findall(r"\*\*(Means|Confirm|Do)\*\*", text)
        assert words == ["Means", "Confirm", "Do"], name
    for target in re.findall(r"\]\(#(\w+)\)", RUNBOOK):
        assert target in {name.lower() for name in SECTIONS}, target


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_says_what_is_wrong_how_bad_it_is_and_where_to_read_on(name: str) -> None:
    labels, annotations = ALERTS[name]["labels"], ALERTS[name]["annotations"]
    assert labels["severity"] in ("page", "ticket")
    assert annotations["summary"].endswith(".")
    assert annotations["runbook_url"] == f"docs/runbook.md#{name.lower()}"
