"""What a trace shows of a request: spans and attributes built from the times stamped on it.

Nothing here runs in the step loop, and there is never a span or an event for a token. With several
completions the spans are those of the one that ended last.
"""

from __future__ import annotations

import time

from nanoinfer_common.telemetry import SpanEvent, record_span
from opentelemetry.trace import SpanContext
from opentelemetry.util.types import AttributeValue

from nanoinfer_engine.core.request import Request
from nanoinfer_engine.core.statistics import NANOSECONDS
from nanoinfer_engine.core.stream import Stream


def record_phases(stream: Stream, parent: SpanContext) -> None:
    """Record queue, prefill and decode of a stream that has ended, as far as it came.

    A phase that the request never reached has no span; the one it was ended in says so.
    """
    request = stream.slowest_request
    times, phases = request.times, request.times.phases()
    to_wall_clock = time.time_ns() - time.monotonic_ns()
    begin = times.arrived + to_wall_clock
    scheduled, first_token = begin + phases.queue, begin + phases.queue + phases.prefill
    end = begin + phases.total
    waiting = {"nanoinfer.queue.waiting_at_arrival": request.num_waiting_at_arrival}
    chunks = {
        "nanoinfer.prefill.cached_tokens": request.num_cached_tokens or 0,
        "nanoinfer.prefill.chunks": request.num_prefill_chunks,
    }
    spans: list[tuple[str, int, int, dict[str, int]]] = [("queue", begin, scheduled, waiting)]
    if times.scheduled is not None:
        spans.append(("prefill", scheduled, first_token, chunks))
    if times.first_token is not None:
        spans.append(("decode", first_token, end, {}))
    events = [SpanEvent(name, at + to_wall_clock) for name, at in request.events]
    if times.first_token is not None:
        events.append(SpanEvent("first_token", first_token))
    if stream.is_aborted:
        events.append(SpanEvent("aborted", end))
    for name, start, stop, attributes in spans:
        # An event belongs to the first span that it fits into.
        here = [event for event in events if event.time <= stop or stop == end]
        events = [event for event in events if event not in here]
        record_span(name, start, stop, attributes=attributes, events=here, parent=parent)


def latency_attributes(request: Request) -> dict[str, AttributeValue]:
    """What the engine's server span says of a request that has ended; times in seconds."""
    phases = request.times.phases()
    return {
        "gen_ai.latency.time_in_queue": phases.queue * NANOSECONDS,
        "gen_ai.latency.time_to_first_token": (phases.queue + phases.prefill) * NANOSECONDS,
        "gen_ai.latency.time_in_model_prefill": phases.prefill * NANOSECONDS,
        "gen_ai.latency.time_in_model_decode": phases.decode * NANOSECONDS,
        "gen_ai.latency.time_in_model_inference": (phases.prefill + phases.decode) * NANOSECONDS,
        "gen_ai.latency.e2e": phases.total * NANOSECONDS,
        "nanoinfer.engine.batch.max": request.max_batch_size,
        "nanoinfer.engine.step.count": request.num_steps,
        "nanoinfer.engine.graph.replays": request.num_graph_replays,
        "nanoinfer.engine.preemptions": request.num_preemptions,
        "nanoinfer.engine.kv.blocks": request.max_blocks,
    }
