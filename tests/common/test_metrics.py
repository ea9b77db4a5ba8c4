"""What a scrape returns, in which form, and that it waits for nobody."""

import threading
import urllib.request
from contextlib import closing

import pytest
from nanoinfer_common import metrics, telemetry
from nanoinfer_common.metrics import MetricsServer
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from prometheus_client.parser import text_string_to_metric_families as parse_text

from tests.common.conftest import start_probe


def scrape(port: int, accept: str = "") -> tuple[str, str]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics")
    if accept:
        request.add_header("Accept", accept)
    with urllib.request.urlopen(request, timeout=60) as response:
        return response.headers["Content-Type"], response.read().decode()


@pytest.fixture
def registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    labels = {"labelnames": ["model_name"], "registry": registry}
    Gauge("vllm:num_requests_waiting", "w", **labels).labels("m").set(3)  # type: ignore[arg-type]
    Counter("vllm:prompt_tokens", "t", **labels).labels("m").inc(7)  # type: ignore[arg-type]
    buckets = metrics.TIME_TO_FIRST_TOKEN_BUCKETS
    Histogram("nanoinfer_x_seconds", "x", registry=registry, buckets=buckets).observe(
        0.03, {"trace_id": "abc"}
    )
    return registry


def test_text_is_the_default_and_keeps_colons(registry: CollectorRegistry) -> None:
    with closing(MetricsServer(registry, "127.0.0.1", 0)) as server:
        kind, text = scrape(server.port)
    assert kind.startswith("text/plain; version=0.0.4")
    assert 'vllm:num_requests_waiting{model_name="m"} 3.0' in text
    assert 'vllm:prompt_tokens_total{model_name="m"} 7.0' in text
    families = {family.name: family.type for family in parse_text(text)}
    assert families["vllm:num_requests_waiting"] == "gauge"
    assert families["vllm:prompt_tokens"] == "counter"
    assert "abc" not in text


def test_open_metrics_on_request_brings_exemplars(registry: CollectorRegistry) -> None:
    with closing(MetricsServer(registry, "127.0.0.1", 0)) as server:
        kind, text = scrape(server.port, "application/openmetrics-text; version=1.0.0")
    assert kind.startswith("application/openmetrics-text")
    assert list(text_string_to_metric_families(text))
    assert 'trace_id="abc"' in text


def test_a_taken_port_is_an_os_error(registry: CollectorRegistry) -> None:
    with (
        closing(MetricsServer(registry, "127.0.0.1", 0)) as server,
        pytest.raises(OSError, match="in use"),
    ):
        MetricsServer(registry, "127.0.0.1", server.port)


async def test_services_report_dropped_spans_and_answer_while_the_loop_is_blocked() -> None:
    async with start_probe(metrics_port=0) as probe:
        port = probe.server.metrics_port
        assert port is not None
        before = telemetry.DROPPED_SPANS.collect()[0].samples[0].value
        telemetry.DROPPED_SPANS.inc(2)
        texts: list[str] = []
        scraper = threading.Thread(target=lambda: texts.append(scrape(port)[1]))
        scraper.start()
        # The event loop stands still here; the scrape does not need it.
        scraper.join(60)
        (text,) = texts
    assert f"nanoinfer_trace_spans_dropped_total {before + 2:.1f}" in text
    assert "\nnanoinfer_log_entries_lost_total " in text


async def test_no_metrics_port_by_default() -> None:
    async with start_probe() as probe:
        assert probe.server.metrics_port is None


def test_buckets() -> None:
    assert metrics.token_buckets(100) == (1, 2, 5, 10, 20, 50, 100)
    assert metrics.token_buckets(64) == (1, 2, 5, 10, 20, 50, 64)
    assert metrics.token_buckets(1) == (1,)
    for buckets in (
        metrics.TIME_TO_FIRST_TOKEN_BUCKETS,
        metrics.INTER_TOKEN_BUCKETS,
        metrics.REQUEST_BUCKETS,
        metrics.RPC_BUCKETS,
    ):
        assert list(buckets) == sorted(set(buckets))


@pytest.mark.matrix("R37", "R82")
def test_labels_come_from_closed_sets() -> None:
    seen = {metrics.bounded_label(f"model-{index}", {"model-1"}) for index in range(100_000)}
    assert seen == {"model-1", "other"}
