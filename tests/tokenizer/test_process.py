"""The service as a process: start, refusal to start, drain, and no process left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from nanoinfer.v1 import tokenizer_pb2 as pb
from nanoinfer.v1 import tokenizer_pb2_grpc

START_SECONDS = 60.0


def command(*flags: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "nanoinfer_tokenizer",
        "--port",
        "0",
        "--metrics-port",
        "0",
        *flags,
    ]


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + START_SECONDS
    while not condition():
        assert time.monotonic() < end, "took too long"
        time.sleep(0.02)


@contextmanager
def service(model: Path, port_file: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    flags = ["--model", str(model), "--port-file", str(port_file)]
    with subprocess.Popen(command(*flags), stderr=subprocess.DEVNULL) as process:
        try:
            wait_for(port_file.exists)
            yield process, port_file.read_text().removeprefix("listening on ").strip()
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_process_serves_and_leaves_nothing_behind(
    number: signal.Signals, directory_of: Callable[[str], Path], tmp_path: Path
) -> None:
    with service(directory_of("qwen2"), tmp_path / "port") as (process, address):
        with grpc.insecure_channel(address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            check = health_pb2.HealthCheckRequest(service="readiness")
            serving = health_pb2.HealthCheckResponse.SERVING
            wait_for(lambda: health.Check(check, wait_for_ready=True).status == serving)
            message = pb.ChatMessage(role="user", content=[pb.ContentPart(text="Hi")])
            request = pb.TokenizerServiceRenderChatRequest(messages=[message])
            stub = tokenizer_pb2_grpc.TokenizerServiceStub(channel)
            assert stub.RenderChat(request).tokens.ids
        workers = psutil.Process(process.pid).children(recursive=True)
        assert workers
        os.kill(process.pid, number)
        assert process.wait(START_SECONDS) == (0 if number is signal.SIGTERM else -number)
        wait_for(lambda: not any(worker.is_running() for worker in workers))


def test_the_library_starts_no_threads_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would start as many as the host has CPUs; here as many as this variable says."""
    monkeypatch.setenv("RAYON_NUM_THREADS", "200")
    document = {
        "version": "1.0",
        "added_tokens": [],
        "decoder": {"type": "Fuse"},
        "pre_tokenizer": {"type": "Metaspace", "replacement": "_", "prepend_scheme": "never"},
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with service(tmp_path, tmp_path / "port") as (process, address):
        before = psutil.Process(process.pid).num_threads()
        with grpc.insecure_channel(address) as channel:
            stub = tokenizer_pb2_grpc.TokenizerServiceStub(channel)
            request = pb.TokenizerServiceEncodeRequest(text="ab")
            assert list(stub.Encode(request, wait_for_ready=True).tokens.ids) == [0, 1]
        assert psutil.Process(process.pid).num_threads() < before + 200


@pytest.mark.parametrize(
    ("flags", "code", "text"),
    [
        ([], 2, "model"),
        (["--model", "MODEL", "--max-characters", "1000000"], 2, "max-characters"),
        (["--model", "MODEL", "--pattern", "klingon"], 2, "pattern"),
        (["--model", "MODEL", "--pattern", "qwen2"], 1, "brings its own pattern"),
        (["--model", "MISSING"], 1, "no such file or directory"),
    ],
)
def test_what_cannot_be_served_ends_the_start(
    flags: list[str], code: int, text: str, directory_of: Callable[[str], Path], tmp_path: Path
) -> None:
    paths = {"MODEL": str(directory_of("gpt2")), "MISSING": str(tmp_path / "missing")}
    arguments = [paths.get(flag, flag) for flag in flags]
    result = subprocess.run(
        command(*arguments), capture_output=True, timeout=START_SECONDS, check=False
    )
    assert result.returncode == code
    assert text in result.stderr.decode()
