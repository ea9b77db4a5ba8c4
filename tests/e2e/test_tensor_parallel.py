"""An engine of two processes: it answers, drains, and neither leaves the other behind."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
import pytest
from nanoinfer.v1 import engine_pb2, engine_pb2_grpc, generation_pb2

from tests.e2e.conftest import GUIDE
from tests.e2e.stack import Service, start_service
from tests.e2e.test_start import start

FLAGS = ["--model", str(GUIDE), "--tensor-parallel", "2", "--threads", "1"]
FLAGS += ["--kv-cache-memory", "16MiB"]


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Service]:
    with start_service("nanoinfer_engine", FLAGS, tmp_path) as service:
        yield service


def stream(service: Service, max_tokens: int) -> Iterator[engine_pb2.EngineServiceGenerateResponse]:
    request = engine_pb2.EngineServiceGenerateRequest(
        prompt=generation_pb2.TokenIds(ids=[5, 6, 7, 8]),
        sampling=generation_pb2.SamplingParams(temperature=0),
        stopping=generation_pb2.StoppingParams(max_tokens=max_tokens, ignore_eos=True),
    )
    with grpc.insecure_channel(service.address) as channel:
        yield from engine_pb2_grpc.EngineServiceStub(channel).Generate(request, timeout=30)


def answer(service: Service) -> list[int]:
    return [i for m in stream(service, 8) for delta in m.deltas for i in delta.token_ids]


def others(service: Service) -> list[psutil.Process]:
    return psutil.Process(service.process.pid).children(recursive=True)


def rank_1(service: Service) -> psutil.Process:
    """The process that holds the other share: by far the larger child."""
    return max(others(service), key=lambda each: each.memory_info().rss)


def assert_gone(processes: list[psutil.Process], seconds: float = 60) -> None:
    assert processes
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    assert alive == []


@pytest.mark.slow
def test_it_answers_and_stops(pair: Service, tmp_path: Path) -> None:
    with start_service("nanoinfer_engine", FLAGS[:2], tmp_path / "alone") as alone:
        assert answer(pair) == answer(alone)
    processes = others(pair)
    rank_1(pair).send_signal(signal.SIGTERM)  # as a supervisor that means the whole group
    assert len(answer(pair)) == 8
    pair.terminate()
    assert pair.wait(60) == 0
    assert_gone(processes)
    assert "Traceback" not in pair.log.read_text()


@pytest.mark.slow
def test_the_others_end_with_rank_0(pair: Service) -> None:
    processes = others(pair)
    pair.process.kill()
    pair.wait()
    assert_gone(processes)


@pytest.mark.slow
@pytest.mark.parametrize("is_busy", [True, False])
def test_rank_0_ends_with_the_others(pair: Service, is_busy: bool) -> None:
    processes = others(pair)
    messages = stream(pair, 1000)
    if is_busy:
        next(messages)
    rank_1(pair).kill()
    if is_busy:
        with pytest.raises(grpc.RpcError) as caught:
            list(messages)
        assert "the engine failed" in str(caught.value)
    assert pair.wait(60) == 1
    assert_gone([each for each in processes if each.is_running()] or processes)
    assert "rank 1 has ended with exit code -9" in pair.log.read_text()


@pytest.mark.parametrize(
    ("flags", "message", "code"),
    [
        (
            ["--tensor-parallel", "4"],
            "num_attention_heads 6 is not a multiple of tensor_parallel",
            1,
        ),
        (["--tensor-parallel", "2", "--device", "cuda:0"], "device cpu or cuda, not cuda:0", 2),
    ],
)
@pytest.mark.slow
def test_what_cannot_be_shared_is_refused_in_one_line(
    flags: list[str], message: str, code: int
) -> None:
    result = start("nanoinfer_engine", GUIDE, *flags)
    assert result.returncode == code
    assert message in result.stderr + result.stdout
    assert "Traceback" not in result.stderr + result.stdout
