"""Autoscalers, alerts' neighbours and the dashboard name what exists, and agree with each other."""

from __future__ import annotations

import json
from typing import Any

import yaml
from nanoinfer_common import names

from tests.deploy.offered import metric_names, selectors, settings_of
from tests.deploy.rendering import K8S, SERVICES, Document, Rendering, environment

COMPONENTS = K8S / "components"
# What Prometheus and the scrape configuration add to every series.
SCRAPED_LABELS = {"namespace", "pod", "le"}


def adapter_rules() -> dict[str, str]:
    """The adapter's metric names and the series behind each."""
    rules = yaml.safe_load((COMPONENTS / "hpa" / "adapter-rules.yaml").read_text())
    found = {}
    for rule in rules:
        ((series, _),) = selectors(rule["seriesQuery"])
        found[rule["name"]["as"]] = series
    return found


def hpa_targets(hpa: Document) -> dict[str, float]:
    rules = adapter_rules()
    found = {}
    for metric in hpa["spec"]["metrics"]:
        if metric["type"] == "Resource":
            found[metric["resource"]["name"]] = float(
                metric["resource"]["target"]["averageUtilization"]
            )
        else:
            target = metric["pods"]["target"]
            assert target["type"] == "AverageValue"
            found[rules[metric["pods"]["metric"]["name"]]] = float(target["averageValue"])
    return found


def keda_targets(scaled: Document) -> dict[str, float]:
    found = {}
    for trigger in scaled["spec"]["triggers"]:
        if trigger["type"] == "cpu":
            assert trigger["metricType"] == "Utilization"
            found["cpu"] = float(trigger["metadata"]["value"])
        else:
            assert trigger["metricType"] == "AverageValue"
            query = trigger["metadata"]["query"]
            assert query.startswith("sum("), "a series for each pod would be an error"
            ((series, labels),) = selectors(query)
            assert labels == {"namespace": "nanoinfer"}
            assert trigger["metadata"]["ignoreNullValues"] == "false"
            found[series] = float(trigger["metadata"]["threshold"])
    return found


def scalers(rendered: Rendering) -> list[Document]:
    return [*rendered.of("HorizontalPodAutoscaler"), *rendered.of("ScaledObject")]


def test_an_autoscaler_owns_the_number_of_replicas_alone(everything: list[Rendering]) -> None:
    seen = 0
    for rendered in everything:
        owners = scalers(rendered)
        assert len(owners) in {0, len(SERVICES)}
        for owner in owners:
            seen += 1
            target = owner["spec"]["scaleTargetRef"]
            deployment = rendered.get(target["kind"], target["name"])
            assert target["apiVersion"] == deployment["apiVersion"]
            assert owner["metadata"]["name"] == target["name"]
            assert "replicas" not in deployment["spec"]
    assert seen


def test_each_service_scales_on_its_own_signal(everything: list[Rendering]) -> None:
    expected = {
        "gateway": {"cpu", "nanoinfer_gateway_inflight"},
        "tokenizer": {"cpu", "nanoinfer_tokenizer_inflight"},
        "engine": {
            f"vllm:{name}"
            for name in (
                "num_requests_waiting",
                "kv_cache_usage_perc",
                "num_requests_running",
            )
        },
    }
    for rendered in everything:
        for owner in rendered.of("HorizontalPodAutoscaler"):
            assert set(hpa_targets(owner)) == expected[owner["metadata"]["name"]]
        for owner in rendered.of("ScaledObject"):
            assert set(keda_targets(owner)) == expected[owner["metadata"]["name"]]


def test_both_autoscalers_want_the_same(everything: list[Rendering]) -> None:
    hpa = next(r for r in everything if r.of("HorizontalPodAutoscaler"))
    keda = next(r for r in everything if r.of("ScaledObject"))
    for name in SERVICES:
        one = hpa.get("HorizontalPodAutoscaler", name)
        other = keda.get("ScaledObject", name)
        assert hpa_targets(one) == keda_targets(other)
        spec = other["spec"]
        assert (one["spec"]["minReplicas"], one["spec"]["maxReplicas"]) == (
            spec["minReplicaCount"],
            spec["maxReplicaCount"],
        )
        behaviour = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
        assert one["spec"]["behavior"] == behaviour
        assert one["spec"]["behavior"]["scaleDown"]["stabilizationWindowSeconds"] >= 300
        assert one["spec"]["minReplicas"] >= 2


def test_targets_lie_below_what_a_replica_takes(everything: list[Rendering]) -> None:
    for rendered in everything:
        for owner in rendered.of("HorizontalPodAutoscaler"):
            name = owner["metadata"]["name"]
            variables = environment(rendered.get("Deployment", name))
            settings: Any = settings_of(name, variables)
            targets = hpa_targets(owner)
            if name == "gateway":
                assert targets["nanoinfer_gateway_inflight"] == settings.max_requests / 2
            if name == "tokenizer":
                assert targets["nanoinfer_tokenizer_inflight"] < settings.max_pending / 10
            if name == "engine":
                running = targets["vllm:num_requests_running"]
                assert running == settings.engine_config().max_batch_requests * 3 / 4
                assert targets["vllm:num_requests_waiting"] < settings.max_waiting_requests
                assert 0.6 <= targets["vllm:kv_cache_usage_perc"] <= 0.8
                assert settings.metrics_prefix == "vllm:"


def test_every_metric_and_label_asked_for_exists(
    everything: list[Rendering], scraped: dict[str, str]
) -> None:
    """In autoscalers, alert rules and the dashboard, against the real /metrics."""
    offered = metric_names(scraped.values())
    reasons = {value for value in vars(names).values() if isinstance(value, str)}
    asked = 0
    for expression in expressions(everything):
        found = selectors(expression)
        assert found, expression
        for metric, labels in found:
            asked += 1
            if metric == "up":
                continue
            assert metric in offered, f"{metric} in {expression}"
            assert set(labels) <= offered[metric] | SCRAPED_LABELS, expression
            if "reason" in labels:
                assert set(labels["reason"].split("|")) <= reasons, expression
    assert asked > 40


def expressions(everything: list[Rendering]) -> set[str]:
    found = {f"{series}{{}}" for series in adapter_rules().values()}
    for rendered in everything:
        for owner in rendered.of("ScaledObject"):
            triggers = owner["spec"]["triggers"]
            found |= {t["metadata"]["query"] for t in triggers if t["type"] == "prometheus"}
        for rules in rendered.of("PrometheusRule"):
            for group in rules["spec"]["groups"]:
                found |= {rule["expr"] for rule in group["rules"]}
        for config in rendered.of("ConfigMap"):
            if (text := config["data"].get("nanoinfer.json")) is not None:
                found |= dashboard_expressions(json.loads(text))
    return found


def dashboard_expressions(dashboard: Document) -> set[str]:
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    return {target["expr"] for panel in panels for target in panel.get("targets", [])}


def test_the_dashboard_finds_its_namespaces(scraped: dict[str, str]) -> None:
    dashboard = json.loads((COMPONENTS / "prometheus-operator" / "nanoinfer.json").read_text())
    (query,) = [v["query"] for v in dashboard["templating"]["list"] if v["name"] == "namespace"]
    metric = query.removeprefix("label_values(").split(",")[0]
    assert metric in metric_names(scraped.values())


def test_a_fresh_service_shows_what_autoscalers_ask_for(scraped: dict[str, str]) -> None:
    """No data would leave an idle installation at its size for ever."""
    fresh = metric_names(text for name, text in scraped.items() if name.startswith("fresh-"))
    assert set(adapter_rules().values()) <= set(fresh)


def test_pod_monitors_scrape_the_metrics_ports(everything: list[Rendering]) -> None:
    for rendered in everything:
        monitors = rendered.of("PodMonitor")
        assert rendered.names("PodMonitor") in (set(), set(SERVICES))
        for monitor in monitors:
            deployment = rendered.get("Deployment", monitor["metadata"]["name"])
            labels = deployment["spec"]["template"]["metadata"]["labels"]
            assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()
            (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
            assert endpoint["port"] == "metrics"
            # A colon becomes an underscore in OpenMetrics.
            if monitor["metadata"]["name"] == "engine":
                assert monitor["spec"]["scrapeProtocols"] == ["PrometheusText0.0.4"]


def test_the_route_leads_to_the_gateway(everything: list[Rendering]) -> None:
    seen = 0
    for rendered in everything:
        for route in rendered.of("GRPCRoute"):
            seen += 1
            (rule,) = route["spec"]["rules"]
            (backend,) = rule["backendRefs"]
            ports = rendered.get("Service", backend["name"])["spec"]["ports"]
            assert backend["port"] in {port["port"] for port in ports}
            (match,) = rule["matches"]
            assert match["method"]["service"] == "nanoinfer.v1.GatewayService"
    assert seen
