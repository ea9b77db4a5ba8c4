"""The gateway's metrics, in a registry of its own."""

import asyncio
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from nanoinfer_common import names
from nanoinfer_common.errors import ServiceError
from nanoinfer_common.metrics import (
    REQUEST_BUCKETS,
    RPC_BUCKETS,
    TIME_TO_FIRST_TOKEN_BUCKETS,
    bounded_label,
)
from nanoinfer_common.telemetry import server_span
from opentelemetry import trace
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_METHODS: Final = ("Generate", "GenerateStream", "Chat", "ChatStream", "CountTokens")


class GatewayMetrics:
    """Counts requests, refusals and times. Every request counted ends in exactly one outcome."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self._requests = Counter(
            "nanoinfer_gateway_requests",
            "Requests by outcome: success, error, cancelled.",
            ("method", "outcome", "reason"),
            registry=registry,
        )
        self._inflight = Gauge(
            "nanoinfer_gateway_inflight", "Requests under way.", ("method",), registry=registry
        )
        for method in _METHODS:
            # There from the start: autoscalers take an absent series for a fault.
            self._inflight.labels(method)
        self._rejections = Counter(
            "nanoinfer_gateway_admission_rejections",
            "Requests refused by admission, by the bound that was reached.",
            ("reason",),
            registry=registry,
        )
        self._first_token = Histogram(
            "nanoinfer_gateway_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            buckets=TIME_TO_FIRST_TOKEN_BUCKETS,
            registry=registry,
        )
        self._duration = Histogram(
            "nanoinfer_gateway_request_duration_seconds",
            "From a request's arrival to its end.",
            ("method",),
            buckets=REQUEST_BUCKETS,
            registry=registry,
        )
        self._weights = Gauge(
            "nanoinfer_gateway_engines_serving",
            "Engines that serve a model, by the weights' fingerprint: two of them under one name "
            "are a rollout or a mistake.",
            ("model", "weights"),
            registry=registry,
        )
        self._seen_weights: set[tuple[str, str]] = set()
        self._upstream = Histogram(
            "nanoinfer_gateway_upstream_duration_seconds",
            "Duration of calls to upstreams.",
            ("upstream",),
            buckets=(*RPC_BUCKETS, 30.0, 60.0, 120.0, 300.0),
            registry=registry,
        )

    @contextmanager
    def request(self, method: str) -> Iterator[None]:
        """Count one request around its handling."""
        started = time.perf_counter()
        outcome, reason = "error", names.INTERNAL
        inflight = self._inflight.labels(method)
        inflight.inc()
        try:
            yield
            outcome, reason = "success", ""
        except (asyncio.CancelledError, GeneratorExit):
            outcome, reason = "cancelled", ""
            raise
        except ServiceError as error:
            reason = bounded_label(error.reason, names.REASONS)
            raise
        finally:
            inflight.dec()
            self._requests.labels(method, outcome, reason).inc()
            elapsed = time.perf_counter() - started
            self._duration.labels(method).observe(elapsed, _exemplar())

    @contextmanager
    def upstream(self, name: str) -> Iterator[None]:
        """Time a call to an upstream, however it ends."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._upstream.labels(name).observe(time.perf_counter() - started)

    def weights(self, served: Mapping[str, Mapping[str, int]]) -> None:
        """Show how many engines serve each model with which weights; what is gone stays as 0."""
        now = {(m, w[:12]): n for m, weights in served.items() for w, n in weights.items()}
        for labels in self._seen_weights - now.keys():
            self._weights.labels(*labels).set(0)
        for labels, number in now.items():
            self._weights.labels(*labels).set(number)
        self._seen_weights |= now.keys()

    def rejected(self, bound: str) -> None:
        """Count a refusal by admission."""
        self._rejections.labels(bound).inc()

    def first_token(self, seconds: float) -> None:
        """Record a time to first token."""
        self._first_token.observe(seconds, _exemplar())


def _exemplar() -> dict[str, str] | None:
    context = server_span().get_span_context()
    if not context.trace_flags.sampled:
        return None
    return {"trace_id": trace.format_trace_id(context.trace_id)}
