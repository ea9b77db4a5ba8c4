"""What a scrape shows: the engine's last snapshot under the names that routers expect.

Reads one published snapshot and waits for nobody, so figures are as fresh as the last step and
balance among themselves. Names with the prefix follow vLLM's; those of our own are not prefixed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import get_args

from nanoinfer_common import metrics
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from nanoinfer_engine.core.batch import StepKind
from nanoinfer_engine.core.capacity import Load
from nanoinfer_engine.core.request import FinishReason
from nanoinfer_engine.core.statistics import NANOSECONDS, HistogramSnapshot, Snapshot, Statistics

Labels = Mapping[str, str]

_HOST_TEXT = "Time of the engine's thread for a step, without waiting for the device."

_SUCCESS = (FinishReason.STOP, FinishReason.LENGTH)
_OUTCOMES = {
    FinishReason.STOP: "success",
    FinishReason.LENGTH: "success",
    FinishReason.ERROR: "error",
    FinishReason.DEADLINE: "error",
    FinishReason.CANCELLED: "cancelled",
}
_REJECTIONS = {
    "requests": "max_num_queued_reqs",
    "tokens": "max_num_queued_tokens",
    "bytes": "max_num_queued_bytes",
}
# The engine's own names, and what the world calls them.
_COUNTERS = {
    "prompt_tokens": ("prompt_tokens", "Prompt tokens computed or cached."),
    "cached_tokens": ("prompt_tokens_cached", "Prompt tokens from the prefix cache."),
    "cache_queries": ("prefix_cache_queries", "Tokens looked up in the prefix cache."),
    "cache_hits": ("prefix_cache_hits", "Tokens found in the prefix cache."),
    "completion_tokens": ("generation_tokens", "Completion tokens produced."),
    "preemptions": ("num_preemptions", "Times a request had to give its blocks up."),
}
_HISTOGRAMS = {
    "time_to_first_token": ("time_to_first_token_seconds", "Arrival to first token."),
    "inter_token": ("inter_token_latency_seconds", "Between two tokens."),
    "time_per_token": ("request_time_per_output_token_seconds", "Mean per token after the first."),
    "end_to_end": ("e2e_request_latency_seconds", "Arrival to end."),
    "queue": ("request_queue_time_seconds", "Arrival to first step."),
    "prefill": ("request_prefill_time_seconds", "First step to first token."),
    "decode": ("request_decode_time_seconds", "First token to end."),
    "inference": ("request_inference_time_seconds", "First step to end."),
    "prompt_length": ("request_prompt_tokens", "Prompt tokens of a request."),
    "completion_length": ("request_generation_tokens", "Completion tokens of a request."),
    "max_length": ("request_max_num_generation_tokens", "Longest completion of a request."),
    "choices": ("request_params_n", "Completions asked for."),
    "max_tokens": ("request_params_max_tokens", "Completion tokens allowed."),
    "step_tokens": ("iteration_tokens_total", "Tokens computed in a step."),
}
_FAILED_STEPS = {"retried": "retried_steps", "lost": "lost_steps"}
_STEP_BUCKETS = tuple(step * 10.0**power for power in range(-4, 2) for step in (1, 2.5, 5))
_HOST_BUCKETS = tuple(step * 10.0**power for power in range(-5, 0) for step in (1, 2.5, 5))


def make_statistics(max_model_len: int) -> Statistics:
    """Empty statistics with the boundaries that dashboards expect."""
    lengths = metrics.token_buckets(max_model_len)
    bounds = {
        "time_to_first_token": metrics.TIME_TO_FIRST_TOKEN_BUCKETS,
        **dict.fromkeys(("inter_token", "time_per_token"), metrics.INTER_TOKEN_BUCKETS),
        **dict.fromkeys(
            ("end_to_end", "queue", "prefill", "decode", "inference"), metrics.REQUEST_BUCKETS
        ),
        **dict.fromkeys(
            ("prompt_length", "completion_length", "max_length", "max_tokens", "step_tokens"),
            lengths,
        ),
        "choices": metrics.token_buckets(20),
        **dict.fromkeys(get_args(StepKind), _STEP_BUCKETS),
        "host": _HOST_BUCKETS,
        "batch_size": metrics.token_buckets(256),
    }
    return Statistics(bounds)


@dataclass(frozen=True)
class Facts:
    """What a scrape shows beside the snapshot; `num_blocks` is 0 until the model is loaded."""

    model_name: str
    block_size: int
    num_blocks: int
    rejections: Mapping[str, int]
    load: Load
    snapshot: Snapshot


class EngineCollector(Collector):
    """Turns the engine's figures into Prometheus families at each scrape."""

    def __init__(self, prefix: str, facts: Callable[[], Facts]) -> None:
        """`prefix` precedes the names that others expect, such as `vllm:`."""
        self._prefix = prefix
        self._facts = facts

    def describe(self) -> Iterable[Metric]:
        """Nothing, so that registering does not scrape."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Every family, from one snapshot."""
        facts = self._facts()
        snapshot, load = facts.snapshot, facts.load
        labels = {"model_name": facts.model_name, "engine": "0"}
        shape = {"block_size": str(facts.block_size), "num_gpu_blocks": str(facts.num_blocks)}
        prefixed = [
            _gauge("num_requests_running", "Requests that run.", labels, load.num_running),
            _gauge("num_requests_waiting", "Requests that wait.", labels, load.num_waiting),
            _gauge("kv_cache_usage_perc", "KV cache in use, 0 to 1.", labels, load.kv_usage),
            _gauge("cache_config_info", "Shape of the KV cache.", labels | shape, 1),
            *(
                _counter(name, text, labels, "", {"": snapshot.counters.get(key, 0)})
                for key, (name, text) in _COUNTERS.items()
            ),
            _counter(
                "request_success",
                "Requests that ended well.",
                labels,
                "finished_reason",
                {reason.value: snapshot.finished.get(reason, 0) for reason in _SUCCESS},
            ),
            _counter(
                "admission_rejections",
                "Requests refused because the queue was full.",
                labels,
                "reason",
                {_REJECTIONS[bound]: count for bound, count in facts.rejections.items()},
            ),
            *(
                _histogram(name, text, labels, {"": snapshot.histograms[key]})
                for key, (name, text) in _HISTOGRAMS.items()
                if key in snapshot.histograms
            ),
        ]
        for family in prefixed:
            family.name = self._prefix + family.name
            family.samples = [
                sample._replace(name=self._prefix + sample.name) for sample in family.samples
            ]
        return [*prefixed, *_own_families(snapshot, load, labels)]


def _own_families(snapshot: Snapshot, load: Load, labels: Labels) -> Iterable[Metric]:
    outcomes = dict.fromkeys(_OUTCOMES.values(), 0)
    for reason, count in snapshot.finished.items():
        outcomes[_OUTCOMES[reason]] += count
    accepted = {"": snapshot.counters.get("accepted", 0)}
    yield _counter("nanoinfer_engine_accepted", "Completions accepted.", labels, "", accepted)
    yield _counter("nanoinfer_engine_requests", "Ended completions.", labels, "outcome", outcomes)
    is_busy = load.num_running + load.num_waiting > 0
    age = 0.0
    if is_busy and snapshot.last_step is not None:
        age = (time.monotonic_ns() - snapshot.last_step) * NANOSECONDS
    yield _gauge("nanoinfer_engine_last_step_age_seconds", "Time since a step ended.", labels, age)
    failed = {word: snapshot.counters.get(key, 0) for word, key in _FAILED_STEPS.items()}
    text = "Steps that failed as a whole: retried in smaller ones for lack of memory, or lost."
    yield _counter("nanoinfer_engine_failed_steps", text, labels, "outcome", failed)
    yield from _device_families(snapshot, labels)
    if snapshot.histograms:
        steps = {kind: snapshot.histograms[kind] for kind in get_args(StepKind)}
        size, host = snapshot.histograms["batch_size"], snapshot.histograms["host"]
        yield _histogram("nanoinfer_engine_step_seconds", "Time of a step.", labels, steps, "kind")
        yield _histogram("nanoinfer_engine_step_host_seconds", _HOST_TEXT, labels, {"": host})
        yield _histogram(
            "nanoinfer_engine_step_batch_size", "Requests in a step.", labels, {"": size}
        )


def _device_families(snapshot: Snapshot, labels: Labels) -> Iterable[Metric]:
    """What the device did; the share of idle time is a quotient of the counters' rates."""
    name, replays = "nanoinfer_engine_", {"": snapshot.counters.get("graph_replays", 0)}
    busy, idle = {"": snapshot.busy_seconds}, {"": snapshot.idle_seconds}
    text = "Device without a task though there was work"
    yield _counter(name + "graph_replays", "Steps run as one CUDA graph.", labels, "", replays)
    yield _counter(name + "device_busy_seconds", "Device at work on steps.", labels, "", busy)
    yield _counter(name + "device_idle_seconds", f"{text}.", labels, "", idle)
    text += ": share of the last 100 steps, 0 to 1."
    yield _gauge(name + "device_idle_share", text, labels, snapshot.idle_share)


def _gauge(name: str, text: str, labels: Labels, value: float) -> Metric:
    family = GaugeMetricFamily(name, text, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family


def _counter(
    name: str, text: str, labels: Labels, label: str, values: Mapping[str, float]
) -> Metric:
    """One sample for each value of `label`; a single one where `label` is empty."""
    family = CounterMetricFamily(name, text, labels=[*labels, *([label] if label else [])])
    for value, count in values.items():
        family.add_metric([*labels.values(), *([value] if label else [])], count)
    return family


def _histogram(
    name: str, text: str, labels: Labels, values: Mapping[str, HistogramSnapshot], label: str = ""
) -> Metric:
    """One histogram for each value of `label`; a single one where `label` is empty."""
    family = HistogramMetricFamily(name, text, labels=[*labels, *([label] if label else [])])
    for value, histogram in values.items():
        buckets, total = [], 0
        bounds = [*(str(float(bound)) for bound in histogram.bounds), "+Inf"]
        for bound, count in zip(bounds, histogram.counts, strict=True):
            total += count
            buckets.append((bound, total))
        own = [*labels.values(), *([value] if label else [])]
        family.add_metric(own, buckets=buckets, sum_value=histogram.total)
    return family
