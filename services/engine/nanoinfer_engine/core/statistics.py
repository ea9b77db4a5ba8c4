"""What the engine counts: plain numbers that the step loop writes and other threads read.

The step loop is the only writer. After each step it publishes `snapshot()`, which is complete and
never changes again, so that a scrape waits for no lock and sees counters that balance.
Times are in seconds. Knows nothing of Prometheus.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from nanoinfer_engine.core.batch import EndedStep
from nanoinfer_engine.core.request import FinishReason, Request, RequestOutput

NANOSECONDS = 1e-9
COUNTERS = (
    "accepted",
    "prompt_tokens",
    "cached_tokens",
    "cache_queries",
    "cache_hits",
    "completion_tokens",
    "preemptions",
    "graph_replays",
    "retried_steps",
    "lost_steps",
)
# what a step adds to the sums behind the idle share is worth e times less after so many steps
_SHARE_STEPS = 100


@dataclass(frozen=True)
class HistogramSnapshot:
    """Observations per bucket (not cumulative, the last one beyond every bound) and their sum."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float


class Histogram:
    """Counts observations per bucket; `bounds` are inclusive upper bounds, ascending."""

    def __init__(self, bounds: Sequence[float]) -> None:
        """Start empty."""
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._total = 0.0

    def observe(self, value: float) -> None:
        """Count one observation."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def snapshot(self) -> HistogramSnapshot:
        """Copy the present state."""
        return HistogramSnapshot(self._bounds, tuple(self._counts), self._total)


@dataclass(frozen=True)
class Snapshot:
    """Everything at one moment. `histograms` and `counters` are keyed by the engine's own names.

    `finished` counts ended requests by reason; accepted = sum(finished) + live requests.
    """

    counters: dict[str, int] = field(default_factory=dict)
    finished: dict[FinishReason, int] = field(default_factory=dict)
    histograms: dict[str, HistogramSnapshot] = field(default_factory=dict)
    last_step: int | None = None
    tokens_per_second: float = 0.0
    busy_seconds: float = 0.0
    idle_seconds: float = 0.0
    idle_share: float = 0.0


class Statistics:
    """The running totals. For the engine thread alone, but for the snapshots it hands out."""

    def __init__(self, bounds: Mapping[str, Sequence[float]]) -> None:
        """Start at zero; `bounds` are those of every histogram that is observed here, by name."""
        self._counters = dict.fromkeys(COUNTERS, 0)
        self._finished = dict.fromkeys(FinishReason, 0)
        self._histograms = {name: Histogram(each) for name, each in bounds.items()}
        self._last_step: int | None = None
        self._tokens_per_second = 0.0
        self._busy = self._idle = self._recent_busy = self._recent_idle = 0.0

    def record_accepted(self, requests: Sequence[Request]) -> None:
        """Count the completions of one client's request."""
        self._counters["accepted"] += len(requests)
        self._histograms["choices"].observe(len(requests))
        self._histograms["max_tokens"].observe(requests[0].stopping.max_tokens)

    def record_started(self, requests: Sequence[Request]) -> None:
        """Count the wait of requests that have been granted their first tokens."""
        for request in requests:
            waited = (request.times.scheduled or 0) - request.times.arrived
            self._histograms["queue"].observe(waited * NANOSECONDS)

    def record_step(self, step: EndedStep) -> None:
        """Count one step."""
        batch, timing = step.batch, step.timing
        seconds = max(step.ended - step.started, 1) * NANOSECONDS
        self._histograms[timing.kind].observe(seconds)
        self._histograms["host"].observe(step.host)
        self._counters["graph_replays"] += timing.kind == "graph"
        self._busy += timing.busy
        self._idle += timing.idle
        kept = 1 - 1 / _SHARE_STEPS
        self._recent_busy = kept * self._recent_busy + timing.busy
        self._recent_idle = kept * self._recent_idle + timing.idle
        self._histograms["batch_size"].observe(len(batch.rows))
        self._histograms["step_tokens"].observe(batch.num_tokens)
        self._last_step = step.ended
        # An average over about the last ten steps; it only feeds the estimate of RetryInfo.
        rate = batch.num_tokens / seconds
        past = self._tokens_per_second
        self._tokens_per_second = rate if past == 0 else 0.9 * past + 0.1 * rate

    def record_failed_step(self, is_retried: bool) -> None:
        """Count a step that failed as a whole: retried in smaller ones, or lost."""
        self._counters["retried_steps" if is_retried else "lost_steps"] += 1

    def record_outputs(self, outputs: Sequence[RequestOutput]) -> None:
        """Count what a step gave its requests."""
        for output in outputs:
            request = output.request
            if output.num_tokens:
                self._record_tokens(request, output.num_tokens)
            if output.finish_reason is not None:
                self._record_end(request, output.finish_reason)

    def snapshot(self, num_preemptions: int) -> Snapshot:
        """Copy everything, with what the scheduler counts itself; some 10 µs, so once a step."""
        self._counters["preemptions"] = num_preemptions
        return Snapshot(
            counters=dict(self._counters),
            finished=dict(self._finished),
            histograms={name: value.snapshot() for name, value in self._histograms.items()},
            last_step=self._last_step,
            tokens_per_second=self._tokens_per_second,
            busy_seconds=self._busy,
            idle_seconds=self._idle,
            idle_share=self._recent_idle / max(self._recent_busy + self._recent_idle, NANOSECONDS),
        )

    def _record_tokens(self, request: Request, num_tokens: int) -> None:
        """Count tokens that came together; those with the first one came no time after it."""
        self._counters["completion_tokens"] += num_tokens
        gap, num_gaps = request.times.token_gap or 0, num_tokens
        if request.times.token_gap is None:
            num_gaps -= 1
            self._record_prompt(request)
            phases = request.times.phases_to_first_token()
            self._histograms["time_to_first_token"].observe(phases.total * NANOSECONDS)
            self._histograms["prefill"].observe(phases.prefill * NANOSECONDS)
        for _ in range(num_gaps):
            self._histograms["inter_token"].observe(gap * NANOSECONDS)

    def _record_prompt(self, request: Request) -> None:
        """Count a prompt that has been computed; queries and hits of the cache are in tokens."""
        num_tokens = len(request.prompt_token_ids)
        self._counters["prompt_tokens"] += num_tokens
        if request.num_cached_tokens is not None:
            self._counters["cached_tokens"] += request.num_cached_tokens
            self._counters["cache_queries"] += num_tokens
            self._counters["cache_hits"] += request.num_cached_tokens

    def _record_end(self, request: Request, reason: FinishReason) -> None:
        """Count an end, and what only a whole completion tells; its beginning is counted before."""
        self._finished[reason] += 1
        if reason not in (FinishReason.STOP, FinishReason.LENGTH):
            return
        phases = request.times.phases()
        num_tokens = len(request.completion_token_ids)
        observations = {
            "decode": phases.decode * NANOSECONDS,
            "inference": (phases.prefill + phases.decode) * NANOSECONDS,
            "end_to_end": phases.total * NANOSECONDS,
            "prompt_length": len(request.prompt_token_ids),
            "completion_length": num_tokens,
            "max_length": num_tokens,
        }
        if num_tokens > 1:
            observations["time_per_token"] = phases.decode * NANOSECONDS / (num_tokens - 1)
        for name, value in observations.items():
            self._histograms[name].observe(value)
