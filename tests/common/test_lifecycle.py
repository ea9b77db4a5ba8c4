"""A service as a process: start, signals, drain, failure, exit codes."""

import asyncio
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from nanoinfer_common import errors
from nanoinfer_common.channels import open_channel

from tests.common.probe import FULL_NAME, call
from tests.waiting import DEADLINES

COMMAND = [sys.executable, "-W", "error", "-m", "tests.common.process_probe"]
ROOT = Path(__file__).parents[2]


@dataclass
class Process:
    process: subprocess.Popen[str]
    address: str
    channel: grpc.aio.Channel

    async def health(self, name: str) -> str:
        stub = health_pb2_grpc.HealthStub(self.channel)
        reply = await stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=60)
        return health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)

    async def become(self, name: str, wanted: str) -> None:
        while await self.health(name) != wanted:
            await asyncio.sleep(0.02)

    async def end(self, seconds: float = 60) -> tuple[int, list[dict[str, Any]]]:
        """Waits for the exit; returns its code and the log."""
        _, log = await asyncio.to_thread(self.process.communicate, timeout=seconds)
        return self.process.returncode, [json.loads(line) for line in log.splitlines()]

    def terminate(self) -> float:
        self.process.send_signal(signal.SIGTERM)
        return time.monotonic()


@asynccontextmanager
async def start_process(
    tmp_path: Path, *flags: str, shell: str = "", stderr: int = subprocess.PIPE
) -> AsyncIterator[Process]:
    """Runs the probe as a process; `shell` redirects its standard streams."""
    port_file = tmp_path / "port"
    command = [*COMMAND, "--port-file", str(port_file), *flags]
    process = subprocess.Popen(
        ["sh", "-c", f'exec "$@" {shell}', "sh", *command],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        text=True,
    )
    try:
        while not port_file.exists() and process.poll() is None:
            await asyncio.sleep(0.01)
        line = port_file.read_text()
        assert line.startswith("listening on 127.0.0.1:")
        address = line.split()[-1]
        async with open_channel(address) as channel:
            yield Process(process, address, channel)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.mark.matrix("R67")
@pytest.mark.timeout(300)
async def test_drain_in_order(tmp_path: Path) -> None:
    for delay in DEADLINES:
        folder = tmp_path / str(delay)
        folder.mkdir()
        if await looked_in_time(folder, delay):
            break
    else:
        raise AssertionError("the drain was over before it could be looked at")


async def looked_in_time(folder: Path, delay: float) -> bool:
    """Whether this process saw the delay of a drain, and if so all that has to follow."""
    flags = ("--drain-delay-seconds", str(delay), "--drain-seconds", "1")
    async with start_process(folder, *flags) as probe:
        for name in ("", FULL_NAME, "readiness", "liveness"):
            await probe.become(name, "SERVING")
        stream: Any = probe.channel.unary_stream(f"/{FULL_NAME}/unary_stream")
        admitted = stream(b"wait")
        assert await admitted.read() == b"first"
        watch: Any = probe.channel.unary_stream(f"/{FULL_NAME}/WatchLoad")
        watching = watch(b"")
        await watching.read()

        sent = probe.terminate()
        for name in ("", FULL_NAME, "readiness"):
            await probe.become(name, "NOT_SERVING")
        assert await probe.health("liveness") == "SERVING"
        # Clients that have not noticed yet are served on.
        late = await ended(probe, b"late")
        if late is not None and time.monotonic() - sent > delay:
            return False
        assert late is None
        while (error := await ended(probe, b"new")) is None:
            await asyncio.sleep(0.01)
        assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
        assert error.retry_after is not None
        # The refusal comes after the client was sent away, so that it is repeated elsewhere.
        info: Any = probe.channel.unary_unary(f"/{FULL_NAME}/GetServerInfo")
        assert await info(b"").code() is grpc.StatusCode.UNAVAILABLE

        with pytest.raises(grpc.aio.AioRpcError) as cut:
            await admitted.read()
        error = errors.from_rpc_error(cut.value)
        assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
        assert time.monotonic() - sent > delay  # and not before the drain's own time
        code, log = await probe.end()
    assert code == 0
    assert log[-1]["event"] == "stopped"
    assert [entry["state"] for entry in log if entry["event"] == "state"] == [
        "SERVER_STATE_SERVING",
        "SERVER_STATE_DRAINING",
    ]
    return True


async def ended(probe: Process, request: bytes) -> errors.ServiceError | None:
    """The error that a call to the probe ends with, if it does."""
    try:
        await call(probe.channel, "unary_unary", request)
    except grpc.aio.AioRpcError as error:
        return errors.from_rpc_error(error)
    return None


async def test_admitted_work_finishes_and_a_watch_holds_nobody_up(tmp_path: Path) -> None:
    async with start_process(tmp_path, "--drain-seconds", "600") as probe:
        await probe.become("", "SERVING")
        stub = health_pb2_grpc.HealthStub(probe.channel)
        health = stub.Watch(health_pb2.HealthCheckRequest())
        watch: Any = probe.channel.unary_stream(f"/{FULL_NAME}/WatchLoad")
        watching = watch(b"")
        await watching.read()
        stream: Any = probe.channel.unary_stream(f"/{FULL_NAME}/unary_stream")
        running = stream(b"slow")
        assert await running.read() == b"first"
        probe.terminate()
        assert await running.read() == b"slow"
        assert await running.code() is grpc.StatusCode.OK
        code, _ = await probe.end()
        health.cancel()
    assert code == 0


@pytest.mark.matrix("R65")
async def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    flags = ("--drain-seconds", "600", "--ignores-drain")
    async with start_process(tmp_path, *flags) as probe:
        await probe.become("", "SERVING")
        waiting = asyncio.ensure_future(call(probe.channel, "unary_unary", b"wait"))
        await asyncio.sleep(0.1)
        probe.terminate()
        await probe.become("", "NOT_SERVING")
        probe.terminate()
        with pytest.raises(grpc.aio.AioRpcError) as cut:
            await waiting
        assert errors.from_rpc_error(cut.value).reason == "SHUTTING_DOWN"
        code, _ = await probe.end()
    assert code == 0


@pytest.mark.matrix("R65")
async def test_a_signal_while_loading_ends_at_once(tmp_path: Path) -> None:
    async with start_process(tmp_path, "--start-mode", "slow thread") as probe:
        assert await probe.health("") == "NOT_SERVING"
        assert await probe.health("liveness") == "SERVING"
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call(probe.channel, "unary_unary", b"early")
        error = errors.from_rpc_error(refused.value)
        assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "LOADING")
        assert error.retry_after == 1.0
        probe.terminate()
        code, _ = await probe.end()
    assert code == 0


@pytest.mark.matrix("R56")
@pytest.mark.parametrize(
    ("mode", "event"), [("refused", "cannot start"), ("broken", "fatal"), ("fails later", "fatal")]
)
async def test_failures_exit_with_one(tmp_path: Path, mode: str, event: str) -> None:
    async with start_process(tmp_path, "--start-mode", mode) as probe:
        code, log = await probe.end()
    assert code == 1
    (entry,) = [entry for entry in log if entry["level"] == "error"]
    assert entry["event"] == event
    assert ("exception" in entry) is (event == "fatal")


def run(*flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *flags],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def taken_port(use: Callable[[int], None]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        use(taken.getsockname()[1])


@pytest.mark.parametrize("flag", ["--port", "--metrics-port"])
def test_a_taken_port_exits_with_one_and_says_so(flag: str) -> None:
    def check(port: int) -> None:
        result = run(flag, str(port))
        assert result.returncode == 1
        assert f"127.0.0.1:{port}" in result.stderr
        assert "in use" in result.stderr
        assert "Traceback" not in result.stderr
        assert all(json.loads(line) for line in result.stderr.splitlines())  # none of gRPC's own

    taken_port(check)


def test_an_address_that_is_not_ours_says_why_it_cannot_be_listened_on() -> None:
    result = run("--host", "192.0.2.1", "--port", "0")  # reserved for documentation
    assert result.returncode == 1
    assert "cannot listen on 192.0.2.1:0: Cannot assign requested address" in result.stderr


def test_bad_settings_exit_with_two() -> None:
    assert run("--port", "nonsense").returncode == 2
    bad = run("--port", "0", NANOINFER_LOG_LEVEL="loud")
    assert (bad.returncode, "NANOINFER_LOG_LEVEL" in bad.stderr) == (2, True)


def test_a_port_file_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    result = run("--port-file", str(tmp_path / "missing" / "port"))
    assert result.returncode == 1
    assert "cannot write" in result.stderr


def test_an_unsupported_otlp_protocol_is_an_error() -> None:
    result = run(
        OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:1",
        OTEL_EXPORTER_OTLP_PROTOCOL="http/protobuf",
    )
    assert result.returncode == 1
    assert "OTEL_EXPORTER_OTLP_PROTOCOL" in result.stderr


@pytest.mark.matrix("R74")
async def test_a_log_pipe_that_nobody_reads_delays_neither_answers_nor_the_exit(
    tmp_path: Path,
) -> None:
    reader, writer = os.pipe()
    with os.fdopen(reader), os.fdopen(writer, "w"):
        held = fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
        os.write(writer, b"." * held)
        async with start_process(tmp_path, "--drain-seconds", "0.2", stderr=writer) as probe:
            await probe.become("readiness", "SERVING")
            for number in range(200):  # each leaves a line of the log
                assert await call(probe.channel, "unary_unary", b"%d" % number, timeout=20)
            probe.terminate()
            assert await asyncio.to_thread(probe.process.wait, 20) == 0


@pytest.mark.matrix("R74")
@pytest.mark.parametrize("shell", ["2>&-", "<&- >&- 2>&-", "2>/dev/full >/dev/full", "2</dev/null"])
async def test_without_a_log_to_write_to_it_serves_and_ends_as_ever(
    tmp_path: Path, shell: str
) -> None:
    async with start_process(tmp_path, "--drain-seconds", "0.2", shell=shell) as probe:
        await probe.become("readiness", "SERVING")
        for number in range(20):
            assert await call(probe.channel, "unary_unary", b"%d" % number, timeout=20)
        probe.terminate()
        code, log = await probe.end(120)
    assert (code, log) == (0, [])


async def test_standard_streams_that_are_closed_give_their_numbers_to_no_socket(
    tmp_path: Path,
) -> None:
    async with start_process(tmp_path, shell="<&- >&- 2>&-") as probe:
        await probe.become("readiness", "SERVING")
        null = os.stat(os.devnull)
        files = [os.stat(f"/proc/{probe.process.pid}/fd/{number}") for number in range(3)]
    assert all(os.path.samestat(each, null) for each in files)


def test_the_last_entries_before_the_exit_reach_the_log(tmp_path: Path) -> None:
    for mode in ("broken", "refused"):
        flags = ["--port-file", str(tmp_path / "port"), "--start-mode", mode]
        result = subprocess.run(
            [*COMMAND, *flags], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
        )
        assert json.loads(result.stderr.splitlines()[-1])["event"] == "stopped", mode
