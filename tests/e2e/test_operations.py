"""What an operator relies on: drain, overload answers, lost upstreams, refusal to start."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from nanoinfer.v1 import engine_pb2_grpc, gateway_pb2, gateway_pb2_grpc, generation_pb2

from tests.e2e.conftest import GUIDE, await_idle
from tests.e2e.stack import Stack, start_stack

SERVICES = ("nanoinfer_gateway", "nanoinfer_tokenizer", "nanoinfer_engine")


def long_request(max_tokens: int) -> gateway_pb2.GatewayServiceGenerateStreamRequest:
    options = gateway_pb2.GenerationOptions(
        stopping=generation_pb2.StoppingParams(max_tokens=max_tokens, ignore_eos=True)
    )
    return gateway_pb2.GatewayServiceGenerateStreamRequest(text="import sys", options=options)


@pytest.fixture
def own_stack(tmp_path: Path) -> Iterator[Stack]:
    """A stack that a test may break."""
    with start_stack(GUIDE, tmp_path, gateway_flags=["--max-requests", "4"]) as running:
        yield running


@pytest.mark.matrix("R65")
def test_sigterm_drains_each_service(own_stack: Stack) -> None:
    with grpc.insecure_channel(own_stack.gateway.address) as channel:
        stub = gateway_pb2_grpc.GatewayServiceStub(channel)
        stream = stub.GenerateStream(long_request(300), timeout=60)
        next(stream)
        own_stack.gateway.terminate()
        deadline = time.monotonic() + 60
        while own_stack.gateway.health("readiness") == "SERVING":
            assert time.monotonic() < deadline
        assert own_stack.gateway.health("liveness") in {"SERVING", "UNAVAILABLE"}
        with grpc.insecure_channel(own_stack.gateway.address) as other:
            late = gateway_pb2_grpc.GatewayServiceStub(other).GenerateStream(
                long_request(4), timeout=60
            )
            with pytest.raises(grpc.RpcError) as error:
                next(late)
            assert error.value.code() == grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]
        messages = list(stream)
    assert messages[-1].summary.usage.completion_tokens == 300
    assert own_stack.gateway.wait() == 0
    for service in (own_stack.engine, own_stack.tokenizer):
        service.terminate()
        assert service.wait() == 0


@pytest.mark.matrix("R48")
def test_overload_is_answered_at_once(own_stack: Stack) -> None:
    """Four streams are admitted; the fifth is told when to come again."""
    with (
        grpc.insecure_channel(own_stack.gateway.address) as channel,
        grpc.insecure_channel(own_stack.engine.address) as engine_channel,
    ):
        stub = gateway_pb2_grpc.GatewayServiceStub(channel)
        streams = [stub.GenerateStream(long_request(900), timeout=60) for _ in range(4)]
        for stream in streams:
            next(stream)
        with pytest.raises(grpc.RpcError) as error:
            next(stub.GenerateStream(long_request(4), timeout=60))
        assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED  # type: ignore[attr-defined]
        status = rpc_status.from_call(error.value)  # type: ignore[arg-type]
        kinds = {detail.TypeName(): detail for detail in status.details}
        retry = error_details_pb2.RetryInfo()
        kinds["google.rpc.RetryInfo"].Unpack(retry)
        assert retry.retry_delay.ToTimedelta().total_seconds() > 0
        for stream in streams:
            stream.cancel()
        await_idle(engine_pb2_grpc.EngineServiceStub(engine_channel))
        assert list(stub.GenerateStream(long_request(4), timeout=60))


@pytest.mark.matrix("R57", "R58")
def test_a_killed_engine_ends_streams_and_never_hangs_them(own_stack: Stack) -> None:
    with grpc.insecure_channel(own_stack.gateway.address) as channel:
        stub = gateway_pb2_grpc.GatewayServiceStub(channel)
        stream = stub.GenerateStream(long_request(900), timeout=60)
        first = next(stream)
        assert first.HasField("prompt_info")
        own_stack.engine.process.kill()
        with pytest.raises(grpc.RpcError) as error:
            list(stream)
        assert error.value.code() == grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]
        with pytest.raises(grpc.RpcError) as refused:  # long before its deadline
            next(stub.GenerateStream(long_request(4), timeout=120))
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]


def test_many_clients_at_once_get_what_one_gets(
    gateway: gateway_pb2_grpc.GatewayServiceStub, engine: engine_pb2_grpc.EngineServiceStub
) -> None:
    def ask(number: int) -> str:
        options = gateway_pb2.GenerationOptions(
            sampling=generation_pb2.SamplingParams(temperature=0.8, seed=number),
            stopping=generation_pb2.StoppingParams(max_tokens=24, ignore_eos=True),
        )
        request = gateway_pb2.GatewayServiceGenerateRequest(text=f"def f{number}(", options=options)
        return str(gateway.Generate(request, timeout=60).choices[0].text)

    alone = [ask(number) for number in range(12)]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(ask, range(12)))
    assert together == alone
    await_idle(engine)
    assert threading.active_count() < 50


@pytest.mark.parametrize("module", SERVICES)
def test_an_invalid_setting_ends_the_start(module: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", module, "--port", "99999"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 2
    assert "port" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_request_leaves_one_log_line_with_counts_and_no_text(own_stack: Stack) -> None:
    options = gateway_pb2.GenerationOptions(
        stopping=generation_pb2.StoppingParams(max_tokens=5, ignore_eos=True),
        request_id="of-the-log",
    )
    request = gateway_pb2.GatewayServiceGenerateRequest(text="a secret prompt", options=options)
    metadata = [("x-nanoinfer-tenant", "somebody")]
    with grpc.insecure_channel(own_stack.gateway.address) as channel:
        stub = gateway_pb2_grpc.GatewayServiceStub(channel)
        stub.Generate(request, timeout=30, metadata=metadata)
    for service, method in ((own_stack.gateway, "Generate"), (own_stack.engine, "Generate")):
        deadline = time.monotonic() + 60  # the log has a thread of its own
        while "of-the-log" not in service.log.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        lines = [line for line in service.log.read_text().splitlines() if "of-the-log" in line]
        assert len(lines) == 1, lines
        said = json.loads(lines[0])
        assert said["method"].endswith(f"/{method}")
        assert (said["code"], said["tenant"]) == ("OK", "somebody")
        assert said["prompt_tokens"] > 0
        assert said["completion_tokens"] == 5
        assert said["duration_seconds"] > 0
        assert "secret" not in service.log.read_text()
