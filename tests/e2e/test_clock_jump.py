"""The whole stack under a wall clock that jumps by an hour while it answers."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from nanoinfer.v1 import gateway_pb2, gateway_pb2_grpc, generation_pb2

from tests.clocks import MovableClock
from tests.e2e.conftest import GUIDE
from tests.e2e.stack import start_stack

HOUR = 3600
NUM_TOKENS = 200


@pytest.mark.slow
@pytest.mark.matrix("R75")
def test_streams_go_on_whatever_the_clock_does(tmp_path: Path) -> None:
    clock = MovableClock(tmp_path)
    stopping = generation_pb2.StoppingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
    request = gateway_pb2.GatewayServiceGenerateStreamRequest(
        text="import sys", options=gateway_pb2.GenerationOptions(stopping=stopping)
    )
    with (
        start_stack(GUIDE, tmp_path / "stack", environment=clock.environment) as stack,
        grpc.insecure_channel(stack.gateway.address) as channel,
    ):
        stub = gateway_pb2_grpc.GatewayServiceStub(channel)
        for jump in (HOUR, -HOUR, 0):
            stream = stub.GenerateStream(request, timeout=120)
            next(stream)
            clock.move(jump)
            messages = list(stream)
            timings = messages[-1].summary.timings
            assert messages[-1].summary.usage.completion_tokens == NUM_TOKENS
            phases = (timings.queue_ns, timings.prefill_ns, timings.decode_ns, timings.total_ns)
            assert all(0 <= phase < HOUR * 10**9 for phase in phases), timings
            for service in (stack.gateway, stack.engine, stack.tokenizer):
                assert service.health("readiness") == "SERVING"
        assert "replica_silent" not in stack.gateway.log.read_text()
