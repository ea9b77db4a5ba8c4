"""The alert rules fire when they should and not before, judged by promtool."""

from __future__ import annotations

import subprocess
from pathlib import Path

import yaml

from tests.deploy.rendering import K8S, Document

TESTS = Path(__file__).with_name("alerts.yaml")
RULES = K8S / "components" / "prometheus-operator" / "rules.yaml"


def alerts(spec: Document) -> dict[str, Document]:
    return {rule["alert"]: rule for group in spec["groups"] for rule in group["rules"]}


def run(*command: str | Path) -> None:
    result = subprocess.run(
        [str(part) for part in command], check=False, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_rules_fire_when_they_should(promtool: Path, tmp_path: Path) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text(yaml.safe_dump(yaml.safe_load(RULES.read_text())["spec"]))
    tests = tmp_path / "alerts.yaml"
    tests.write_text(TESTS.read_text())
    run(promtool, "check", "rules", rules)
    run(promtool, "test", "rules", tests)


def test_every_alert_is_tested_firing_and_silent() -> None:
    fires: dict[str, bool] = {}
    silent: dict[str, bool] = {}
    for group in yaml.safe_load(TESTS.read_text())["tests"]:
        for case in group["alert_rule_test"]:
            outcome = fires if case["exp_alerts"] else silent
            outcome[case["alertname"]] = True
    spec = yaml.safe_load(RULES.read_text())["spec"]
    assert set(alerts(spec)) == set(fires) == set(silent)
