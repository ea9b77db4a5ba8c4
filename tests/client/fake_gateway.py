"""A gateway in this process: records what arrives and answers as a test tells it to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from nanoinfer.v1 import gateway_pb2, gateway_pb2_grpc, generation_pb2

SUMMARY = generation_pb2.GenerationSummary(
    usage=generation_pb2.Usage(
        prompt_tokens=3, completion_tokens=5, cached_tokens=1, reasoning_tokens=0
    ),
    timings=generation_pb2.Timings(
        tokenize_ns=1,
        queue_ns=2,
        prefill_ns=3,
        decode_ns=4,
        detokenize_ns=5,
        total_ns=20,
        time_to_first_token_ns=6,
    ),
    model="fake",
    tokenizer_fingerprint=b"\x01" * 32,
    request_id="from-server",
)
PROMPT_INFO = generation_pb2.PromptInfo(prompt_tokens=3, cached_tokens=1)
EOS = generation_pb2.StopMatch(eos=True)


def finish(
    index: int = 0,
    reason: generation_pb2.FinishReason = generation_pb2.FINISH_REASON_STOP,
    match: generation_pb2.StopMatch = EOS,
    seed: int = 7,
) -> generation_pb2.ChoiceFinish:
    return generation_pb2.ChoiceFinish(index=index, reason=reason, stop_match=match, seed=seed)


CLIENT_TIMEOUT = 120.0  # of the fixtures' clients


@dataclass
class Arrival:
    """One call as the gateway saw it."""

    method: str
    request: Any
    metadata: dict[str, str | bytes]
    seconds_left: float | None


@dataclass
class Behaviour:
    """What a test may change: words to stream, a function that answers instead, the model."""

    words: Sequence[str] = ("Hello", ", ", "world")
    stream: Callable[[Any, grpc.ServicerContext], Iterator[Any]] | None = None
    unary: Callable[[Any, grpc.ServicerContext], Any] | None = None
    model: generation_pb2.ModelInfo = field(
        default_factory=lambda: generation_pb2.ModelInfo(max_model_len=128)
    )
    arrivals: list[Arrival] = field(default_factory=list)
    cancelled: threading.Event = field(default_factory=threading.Event)


def refusal(
    code: grpc.StatusCode,
    reason: str,
    message: str,
    *,
    violations: Sequence[tuple[str, str]] = (),
    retry_after: float | None = None,
    metadata: dict[str, str] | None = None,
) -> grpc.Status:
    """A status with `google.rpc` details, as the services send it."""
    details: list[Any] = [
        error_details_pb2.ErrorInfo(reason=reason, domain="fake", metadata=metadata or {})
    ]
    if violations:
        fields = [
            error_details_pb2.BadRequest.FieldViolation(field=name, description=text)
            for name, text in violations
        ]
        details.append(error_details_pb2.BadRequest(field_violations=fields))
    if retry_after is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(int(retry_after * 1000))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    packed = []
    for detail in details:
        packed.append(any_pb2.Any())
        packed[-1].Pack(detail)
    status = status_pb2.Status(code=code.value[0], message=message, details=packed)
    packed_status: Any = rpc_status.to_status(status)
    trailing = (*packed_status.trailing_metadata, ("x-trace-id", "ab" * 16))
    result: grpc.Status = packed_status._replace(trailing_metadata=trailing)
    return result


class FakeGateway(gateway_pb2_grpc.GatewayServiceServicer):
    """Answers every prompt with `behaviour.words`."""

    def __init__(self, behaviour: Behaviour) -> None:
        self._behaviour = behaviour

    def _record(self, method: str, request: Any, context: Any) -> None:
        metadata = dict(context.invocation_metadata())
        left = context.time_remaining()
        self._behaviour.arrivals.append(Arrival(method, request, metadata, left))
        traced = str(metadata.get("traceparent", "")).split("-")
        trace_id = traced[1] if len(traced) == 4 else "ab" * 16
        context.set_trailing_metadata((("x-trace-id", trace_id),))

    def _unary(self, method: str, request: Any, context: Any, response: Any) -> Any:
        self._record(method, request, context)
        if self._behaviour.unary is not None:
            return self._behaviour.unary(request, context)
        return response

    def _stream(self, method: str, request: Any, context: Any, kind: type) -> Iterator[Any]:
        self._record(method, request, context)
        context.add_callback(self._behaviour.cancelled.set)
        if self._behaviour.stream is not None:
            yield from self._behaviour.stream(request, context)
            return
        yield kind(prompt_info=PROMPT_INFO)
        for word in self._behaviour.words:
            yield kind(deltas=[gateway_pb2.TextDelta(text=word)])
        yield kind(finishes=[finish()], summary=SUMMARY)

    def _whole(self, kind: type) -> Any:
        choice = gateway_pb2.Choice(text="".join(self._behaviour.words), finish=finish())
        return kind(choices=[choice], prompt_info=PROMPT_INFO, summary=SUMMARY)

    def Generate(self, request: Any, context: Any) -> Any:
        response = self._whole(gateway_pb2.GatewayServiceGenerateResponse)
        return self._unary("Generate", request, context, response)

    def Chat(self, request: Any, context: Any) -> Any:
        response = self._whole(gateway_pb2.GatewayServiceChatResponse)
        return self._unary("Chat", request, context, response)

    def GenerateStream(self, request: Any, context: Any) -> Iterator[Any]:
        kind = gateway_pb2.GatewayServiceGenerateStreamResponse
        yield from self._stream("GenerateStream", request, context, kind)

    def ChatStream(self, request: Any, context: Any) -> Iterator[Any]:
        kind = gateway_pb2.GatewayServiceChatStreamResponse
        yield from self._stream("ChatStream", request, context, kind)

    def CountTokens(self, request: Any, context: Any) -> Any:
        response = gateway_pb2.GatewayServiceCountTokensResponse(num_tokens=11)
        return self._unary("CountTokens", request, context, response)

    def ListModels(self, request: Any, context: Any) -> Any:
        first = not request.page_token
        response = gateway_pb2.GatewayServiceListModelsResponse(
            models=[generation_pb2.ModelInfo(id="first" if first else "second", vocab_size=9)],
            next_page_token="more" if first else "",
        )
        return self._unary("ListModels", request, context, response)

    def GetModelInfo(self, request: Any, context: Any) -> Any:
        model = generation_pb2.ModelInfo(id=request.model or "served")
        model.MergeFrom(self._behaviour.model)
        response = gateway_pb2.GatewayServiceGetModelInfoResponse(model=model)
        return self._unary("GetModelInfo", request, context, response)

    def GetServerInfo(self, request: Any, context: Any) -> Any:
        server = generation_pb2.ServerInfo(service="nanoinfer-gateway", version="1.2.3")
        response = gateway_pb2.GatewayServiceGetServerInfoResponse(server=server)
        return self._unary("GetServerInfo", request, context, response)


@contextmanager
def running_gateway(
    behaviour: Behaviour, *, serving: bool = True
) -> Iterator[tuple[str, health.HealthServicer]]:
    """Serves on a free loopback port; yields the address and the health servicer."""
    server, target, checks = start_gateway(behaviour, serving=serving)
    try:
        yield target, checks
    finally:
        server.stop(None).wait()


def start_gateway(
    behaviour: Behaviour, *, serving: bool = True
) -> tuple[grpc.Server, str, health.HealthServicer]:
    """A gateway that runs, its address and its health servicer."""
    server = grpc.server(ThreadPoolExecutor(max_workers=24))
    gateway_pb2_grpc.add_GatewayServiceServicer_to_server(FakeGateway(behaviour), server)
    checks = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    status = health_pb2.HealthCheckResponse
    for name in ("", "readiness"):
        checks.set(name, status.SERVING if serving else status.NOT_SERVING)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    return server, f"127.0.0.1:{port}", checks
