"""Real processes that are stopped and go on: the stack answers meanwhile, and takes them back."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from nanoinfer.v1 import gateway_pb2, gateway_pb2_grpc, generation_pb2

from tests.e2e.conftest import GUIDE
from tests.e2e.stack import Service, start_service

NUM_TOKENS = 6

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Doubles:
    """A gateway before two engines and two tokenizers."""

    gateway: Service
    engines: tuple[Service, Service]
    tokenizers: tuple[Service, Service]
    stub: Any


@pytest.fixture(scope="module")
def doubles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Doubles]:
    directory = tmp_path_factory.mktemp("doubles")
    model = ["--model", str(GUIDE)]
    engine = [*model, "--threads", "1", "--load-report-seconds", "0.2"]
    with ExitStack() as stack:

        def start(module: str, flags: list[str], ready: bool = False) -> Service:
            return stack.enter_context(start_service(module, flags, directory, ready=ready))

        engines = start("nanoinfer_engine", engine), start("nanoinfer_engine", engine)
        tokenizers = start("nanoinfer_tokenizer", model), start("nanoinfer_tokenizer", model)
        for service in (*engines, *tokenizers):
            service.await_ready()
        flags = ["--engine", ",".join(each.address for each in engines), "--silence-seconds", "2"]
        flags += ["--tokenizer", ",".join(each.address for each in tokenizers)]
        gateway = start("nanoinfer_gateway", flags, ready=True)
        channel = stack.enter_context(grpc.insecure_channel(gateway.address))
        yield Doubles(gateway, engines, tokenizers, gateway_pb2_grpc.GatewayServiceStub(channel))


def options(num_tokens: int, request_id: str = "") -> gateway_pb2.GenerationOptions:
    stopping = generation_pb2.StoppingParams(max_tokens=num_tokens, ignore_eos=True)
    sampling = generation_pb2.SamplingParams(temperature=0)
    made = gateway_pb2.GenerationOptions(stopping=stopping, sampling=sampling)
    if request_id:
        made.request_id = request_id
    return made


def ask(doubles: Doubles, request_id: str = "") -> str:
    request = gateway_pb2.GatewayServiceGenerateRequest(
        text="import sys", options=options(NUM_TOKENS, request_id)
    )
    return str(doubles.stub.Generate(request, timeout=120).choices[0].text)


def num_calls(service: Service, method: str) -> int:
    """How many calls of a method the service's log tells of."""
    lines = service.log.read_text().splitlines()
    found = [json.loads(line) for line in lines if line.startswith("{")]
    return sum(str(line.get("method", "")).endswith(f"/{method}") for line in found)


def until(condition: Callable[[], bool], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not come to pass"
        time.sleep(0.05)


def warm(doubles: Doubles, services: tuple[Service, Service], method: str) -> None:
    """Asks until both replicas have answered."""

    def both() -> bool:
        ask(doubles)
        return all(num_calls(service, method) for service in services)

    until(both)


def freeze_and_thaw(doubles: Doubles, kind: str, method: str) -> None:
    """Everything is answered while one replica is stopped, and it gets calls again afterwards."""
    services: tuple[Service, Service] = getattr(doubles, kind)
    warm(doubles, services, method)
    text = ask(doubles)
    frozen, good = services
    frozen.process.send_signal(signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(8) as pool:  # some of them meet the frozen one
            answers = list(pool.map(lambda _: ask(doubles), range(8)))
        assert answers == [text] * 8
        before = num_calls(good, method)
        assert [ask(doubles) for _ in range(3)] == [text] * 3
        assert num_calls(good, method) - before == 3
        assert doubles.gateway.health("readiness") == "SERVING"
    finally:
        frozen.process.send_signal(signal.SIGCONT)
    before = num_calls(frozen, method)
    until(lambda: ask(doubles) == text and num_calls(frozen, method) > before)


@pytest.mark.matrix("R59")
def test_a_stopped_engine_costs_no_request_and_comes_back(doubles: Doubles) -> None:
    freeze_and_thaw(doubles, "engines", "Generate")
    assert "replica_silent" in doubles.gateway.logged("replica_silent")


@pytest.mark.matrix("R59")
def test_a_stopped_tokenizer_costs_no_request_and_comes_back(doubles: Doubles) -> None:
    freeze_and_thaw(doubles, "tokenizers", "Encode")
    assert doubles.gateway.health("readiness") == "SERVING"


@pytest.mark.matrix("R59")
def test_streams_of_a_stopped_engine_go_on_when_it_does(doubles: Doubles) -> None:
    request = gateway_pb2.GatewayServiceGenerateStreamRequest(
        text="import sys", options=options(400)
    )
    streams = [doubles.stub.GenerateStream(request, timeout=120) for _ in range(2)]
    for stream in streams:
        next(stream)
    silences = doubles.gateway.log.read_text().count("replica_silent")
    for engine in doubles.engines:
        engine.process.send_signal(signal.SIGSTOP)
    try:
        until(lambda: doubles.gateway.health("readiness") == "NOT_SERVING")
        log = doubles.gateway.logged("replica_silent", silences + 2)
        assert log.count("replica_silent") == silences + 2
    finally:
        for engine in doubles.engines:
            engine.process.send_signal(signal.SIGCONT)
    for stream in streams:
        assert list(stream)[-1].summary.usage.completion_tokens == 400
    until(lambda: doubles.gateway.health("readiness") == "SERVING")
