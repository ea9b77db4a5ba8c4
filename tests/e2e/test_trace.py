"""One request is one trace: the exact tree over four parties, with the required attributes."""

from __future__ import annotations

import os
import time

from nanoinfer.v1 import gateway_pb2, gateway_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2

from tests.e2e.conftest import Collector
from tests.e2e.test_generation import greedy, user

GATEWAY = "nanoinfer.v1.GatewayService/ChatStream"
RENDER = "nanoinfer.v1.TokenizerService/RenderChat"
GENERATE = "nanoinfer.v1.EngineService/Generate"
KIND = trace_pb2.Span.SpanKind
TREE = {
    ("nanoinfer-gateway", GATEWAY, KIND.SPAN_KIND_SERVER): None,
    ("nanoinfer-gateway", RENDER, KIND.SPAN_KIND_CLIENT): GATEWAY,
    ("nanoinfer-tokenizer", RENDER, KIND.SPAN_KIND_SERVER): RENDER,
    ("nanoinfer-tokenizer", "render_prompt", KIND.SPAN_KIND_INTERNAL): RENDER,
    ("nanoinfer-gateway", GENERATE, KIND.SPAN_KIND_CLIENT): GATEWAY,
    ("nanoinfer-engine", GENERATE, KIND.SPAN_KIND_SERVER): GENERATE,
    ("nanoinfer-engine", "queue", KIND.SPAN_KIND_INTERNAL): GENERATE,
    ("nanoinfer-engine", "prefill", KIND.SPAN_KIND_INTERNAL): GENERATE,
    ("nanoinfer-engine", "decode", KIND.SPAN_KIND_INTERNAL): GENERATE,
    ("nanoinfer-gateway", "detokenize", KIND.SPAN_KIND_INTERNAL): GATEWAY,
}


def attributes(span: trace_pb2.Span) -> dict[str, object]:
    values = {}
    for attribute in span.attributes:
        kind = attribute.value.WhichOneof("value")
        values[attribute.key] = getattr(attribute.value, kind) if kind else None
    return values


def test_a_chat_is_one_trace(
    gateway: gateway_pb2_grpc.GatewayServiceStub, collector: tuple[Collector, str]
) -> None:
    trace_id, parent = os.urandom(16), os.urandom(8)
    request = gateway_pb2.GatewayServiceChatStreamRequest(
        messages=[user("What is paged attention?")], options=greedy(24)
    )
    metadata = [("traceparent", f"00-{trace_id.hex()}-{parent.hex()}-01")]
    messages = list(gateway.ChatStream(request, timeout=60, metadata=metadata))
    found = collector[0].await_trace(trace_id, len(TREE))

    by_id = {span.span_id: (service, span) for service, span in found}
    tree = {}
    for service, span in found:
        above = by_id.get(span.parent_span_id)
        tree[(service, span.name, span.kind)] = above[1].name if above else None
        if above is None:
            assert span.parent_span_id == parent
        else:
            assert above[1].start_time_unix_nano <= span.start_time_unix_nano + 1_000_000
    assert tree == TREE

    named = {(service, span.name, span.kind): attributes(span) for service, span in found}
    outer = named[("nanoinfer-gateway", GATEWAY, KIND.SPAN_KIND_SERVER)]
    usage = messages[-1].summary.usage
    assert outer["gen_ai.operation.name"] == "chat"
    assert outer["gen_ai.provider.name"] == "nanoinfer"
    assert outer["gen_ai.request.stream"] is True
    assert outer["gen_ai.usage.input_tokens"] == usage.prompt_tokens
    assert outer["gen_ai.usage.output_tokens"] == usage.completion_tokens
    assert outer["rpc.system.name"] == "grpc"
    assert outer["rpc.response.status_code"] == "OK"
    inner = named[("nanoinfer-engine", GENERATE, KIND.SPAN_KIND_SERVER)]
    for name in ("time_in_queue", "time_to_first_token", "e2e", "time_in_model_decode"):
        assert isinstance(inner[f"gen_ai.latency.{name}"], float)
    codes = {values.get("rpc.response.status_code", "OK") for values in named.values()}
    assert codes == {"OK"}
    with_usage = [key for key, values in named.items() if "gen_ai.usage.input_tokens" in values]
    assert len(with_usage) == 1
    text = repr([values for values in named.values()])
    assert "paged attention?" not in text


def test_the_engines_phases_fill_its_span(
    gateway: gateway_pb2_grpc.GatewayServiceStub, collector: tuple[Collector, str]
) -> None:
    trace_id = os.urandom(16)
    request = gateway_pb2.GatewayServiceChatStreamRequest(
        messages=[user("Why is paging useful?")], options=greedy(24)
    )
    metadata = [("traceparent", f"00-{trace_id.hex()}-{os.urandom(8).hex()}-01")]
    began = time.time_ns()
    timings = list(gateway.ChatStream(request, timeout=60, metadata=metadata))[-1].summary.timings
    spent = time.time_ns() - began
    spans = {
        span.name: span.end_time_unix_nano - span.start_time_unix_nano
        for service, span in collector[0].await_trace(trace_id, len(TREE))
        if service == "nanoinfer-engine"
    }
    assert abs(spans["queue"] - timings.queue_ns) < 1_000_000
    assert abs(spans["prefill"] - timings.prefill_ns) < 1_000_000
    assert abs(spans["decode"] - timings.decode_ns) < 1_000_000
    phases = spans["queue"] + spans["prefill"] + spans["decode"]
    assert phases <= spans[GENERATE] + 1_000_000
    assert spans[GENERATE] < spent
