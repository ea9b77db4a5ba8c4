"""The supervisor of `up` over stand-ins for the services."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from nanoinfer.cli import stack as stack_module
from nanoinfer.cli import state
from nanoinfer.cli.arguments import Ports, StackSettings
from nanoinfer.cli.collector import Collector
from nanoinfer.cli.console import CommandError
from nanoinfer.cli.processes import ServiceProcess, callable_address
from nanoinfer.cli.stack import Interrupts, Stack, _forward, _wanted
from nanoinfer.cli.state import Running

from tests.client.fake_gateway import Behaviour, running_gateway
from tests.client.run_stack import commands

SCRIPT = Path(__file__).with_name("run_stack.py")
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def events_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "events"
    path.touch()
    monkeypatch.setenv("FAKE_EVENTS", str(path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return path


def events(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def order(path: Path) -> list[tuple[str, str]]:
    return [(event["name"], event["event"]) for event in events(path)]


@contextmanager
def supervisor(flags: dict[str, list[str]]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), json.dumps(flags)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def no_process_left(path: Path) -> bool:
    """No stand-in of this test is running: their command lines are in the events."""
    for event in events(path):
        marker = event["argv"][event["argv"].index("--port-file") + 1]
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if marker.encode() in entry.read_bytes():
                    return False
            except OSError:
                continue
    return True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_up_is_ready_and_ends_in_order(
    events_file: Path, tmp_path: Path, number: signal.Signals
) -> None:
    flags = {"gateway": ["--stop-seconds", "0.3"], "engine": ["--ready-after", "0.3"]}
    with supervisor(flags) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("nanoinfer is ready at 127.0.0.1:")
        (file,) = (tmp_path / "nanoinfer").iterdir()
        running = Running(**json.loads(file.read_text()))
        assert running.target in line
        assert running.pid == process.pid
        assert state.find() == running
        assert state.find(running.target) == running
        assert state.find(running.target.replace("127.0.0.1", "localhost")) == running
        assert state.find("127.0.0.1:1") is None
        process.send_signal(number)
        assert process.wait(60) == 0
    ends = [pair for pair in order(events_file) if pair[1] != "started"]
    assert ends[:2] == [("gateway", "told"), ("gateway", "ended")]
    assert sorted(name for name, event in ends[2:] if event == "ended") == ["engine", "tokenizer"]
    assert not file.exists()
    assert no_process_left(events_file)


def test_a_service_that_dies_ends_the_rest(events_file: Path, tmp_path: Path) -> None:
    told = tmp_path / "die"
    with supervisor({"engine": ["--die-at", str(told)]}) as process:
        assert process.stdout is not None
        assert "is ready at" in process.stdout.readline()
        told.touch()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "the engine ended with exit code 7:" in errors
    assert "  last words" in errors
    assert "Traceback" not in errors
    assert ("gateway", "ended") in order(events_file)
    assert ("tokenizer", "ended") in order(events_file)
    assert no_process_left(events_file)


def test_a_service_that_dies_before_it_is_ready(events_file: Path) -> None:
    # the engine is waited for, because its refusal says more than the tokenizer's
    flags = {"tokenizer": ["--die-after", "0.2"], "engine": ["--ready-after", "0.5"]}
    with supervisor(flags) as process:
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert output == ""
    assert "the tokenizer ended with exit code 7" in errors
    assert "the engine" not in errors
    assert no_process_left(events_file)


def test_the_engines_refusal_is_shown_before_the_tokenizers_that_came_first(
    events_file: Path,
) -> None:
    flags = {"tokenizer": ["--die-after", "0.1"], "engine": ["--die-after", "1.5"]}
    flags["engine"] += ["--ready-after", "30"]
    with supervisor(flags) as process:
        output, errors = process.communicate(timeout=120)
    assert (process.returncode, output) == (1, "")
    engine = errors.index("the engine ended with exit code 7:")
    tokenizer = errors.index("the tokenizer ended with exit code 7:")
    assert engine < errors.index("last words") < tokenizer
    assert no_process_left(events_file)


def test_a_command_that_cannot_start_a_service(events_file: Path) -> None:
    with supervisor({"tokenizer": ["--ready-after", "not a number"]}) as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "invalid float value" in errors


def test_slow_services_are_waited_for_with_progress(events_file: Path) -> None:
    with supervisor({"engine": ["--ready-after", "2.5"]}) as process:
        assert process.stdout is not None
        assert "is ready at" in process.stdout.readline()
        process.terminate()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "starting: " in errors
    assert "engine loading" in errors


def test_a_signal_during_the_start(events_file: Path) -> None:
    with supervisor({"engine": ["--ready-after", "60"]}) as process:
        end = time.monotonic() + 60
        while ("engine", "started") not in order(events_file):
            assert time.monotonic() < end
            time.sleep(0.05)
        process.terminate()
        assert process.wait(60) == 0
    assert no_process_left(events_file)


def test_a_second_signal_kills_what_does_not_end(events_file: Path) -> None:
    with supervisor({"engine": ["--deaf"]}) as process:
        assert process.stdout is not None
        assert "is ready at" in process.stdout.readline()
        process.terminate()
        end = time.monotonic() + 60
        while ("gateway", "ended") not in order(events_file):
            assert time.monotonic() < end
            time.sleep(0.05)
        time.sleep(0.5)
        assert process.poll() is None
        process.terminate()
        assert process.wait(60) == 0
    assert no_process_left(events_file)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ties a process to its parent")
def test_killed_outright_it_leaves_nothing_behind(events_file: Path) -> None:
    with supervisor({}) as process:
        assert process.stdout is not None
        assert "is ready at" in process.stdout.readline()
        process.kill()
        process.wait(60)
        end = time.monotonic() + 60
        while not no_process_left(events_file):
            assert time.monotonic() < end
            time.sleep(0.05)


def test_what_the_services_are_told(
    events_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("OTEL_SDK_DISABLED", "NANOINFER_PORT", "NANOINFER_LOG_LEVEL", "NANOINFER_DTYPE"):
        monkeypatch.setenv(name, "x")
    settings = StackSettings(Path("some/model"), Path("some/tokenizer"), 2, commands=commands({}))
    ports = Ports(metrics_port=9000)
    with Interrupts() as interrupts, Stack(settings, interrupts, ports) as stack:
        spans_to = stack._environment()["OTEL_EXPORTER_OTLP_ENDPOINT"]
        assert spans_to == f"http://{stack.running.collector}"
        assert "OTEL_SDK_DISABLED" not in stack._environment()
        passed_on = {name for name in stack._environment() if name.startswith("NANOINFER_")}
        assert passed_on & {"NANOINFER_PORT", "NANOINFER_LOG_LEVEL"} == set()
        assert "NANOINFER_DTYPE" in passed_on
    told = {event["name"]: " ".join(event["argv"][1:]) for event in events(events_file)}
    for name in ("tokenizer", "engine"):
        assert "--model some/model --tokenizer some/tokenizer" in told[name]
        assert "--port 0" in told[name]
    assert "--threads 2" in told["engine"]
    assert "--threads" not in told["tokenizer"]
    assert "--trust-incoming-trace" in told["gateway"]
    assert "--tokenizer 127.0.0.1:" in told["gateway"]
    assert "--engine 127.0.0.1:" in told["gateway"]
    assert "--metrics-port 9000" in told["gateway"]
    assert "--metrics-port 9001" in told["tokenizer"]
    assert "--metrics-port 9002" in told["engine"]


def test_not_ready_in_time(events_file: Path) -> None:
    slow = commands({"engine": ["--ready-after", "600"]})
    for seconds in (2, 20, 60):  # on a loaded machine the engine may not even listen so soon
        settings = StackSettings(Path("m"), start_timeout=float(seconds), commands=slow)
        with (
            Interrupts() as interrupts,
            pytest.raises(CommandError, match=f"not ready within {seconds} s: ") as refused,
            Stack(settings, interrupts, Ports()),
        ):
            pass
        if "engine loading" in str(refused.value):
            break
    assert "engine loading" in str(refused.value)
    assert no_process_left(events_file)


def test_a_taken_collector_port() -> None:
    with Interrupts() as interrupts, Collector() as taken:
        port = int(taken.address.rpartition(":")[2])
        with pytest.raises(CommandError, match=f"cannot listen on port {port}"):
            Stack(StackSettings(Path("m")), interrupts, Ports(collector_port=port))


def test_state_files_that_are_not_ours_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behaviour: Behaviour
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert state.find() is None
    (tmp_path / "nanoinfer").mkdir()
    (tmp_path / "nanoinfer" / "up-1.json").write_text("not json")
    (tmp_path / "nanoinfer" / "up-2.json").write_text('{"other": 1}')
    dead = Running("127.0.0.1:1", "127.0.0.1:2", 3)
    with running_gateway(behaviour) as (address, _):
        alive = Running(address, "127.0.0.1:2", 4)
        with state.published(alive), state.published(dead):
            assert state.find() == alive
    assert state.find() is None


def test_without_a_writable_place_up_still_works(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "file"))
    with state.published(Running("a", "b", 1)):
        pass
    assert "will not find this stack" in capsys.readouterr().err


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def taken_port(host: str = "127.0.0.1") -> Iterator[int]:
    with socket.create_server((host, 0)) as server:
        yield int(server.getsockname()[1])


@pytest.mark.parametrize("which", ["port", "metrics_port"])
def test_a_taken_port_is_told_before_anything_is_started(events_file: Path, which: str) -> None:
    with taken_port() as port, Interrupts() as interrupts:
        wanted = Ports(port=port) if which == "port" else Ports(port=0, metrics_port=port)
        settings = StackSettings(Path("m"), commands=commands({}))
        told = f"cannot listen on port {port} of 127.0.0.1: Address already in use"
        with pytest.raises(CommandError, match=told):
            Stack(settings, interrupts, wanted)
    assert events(events_file) == []


def test_every_port_that_is_asked_for_is_looked_at() -> None:
    ports = Ports(port=7, metrics_port=9000, host="127.0.0.2")
    assert list(_wanted(ports)) == [
        ("127.0.0.2", 7),
        ("127.0.0.2", 9000),
        ("127.0.0.1", 9001),
        ("127.0.0.1", 9002),
    ]
    assert list(_wanted(Ports(port=0, metrics_port=0))) == [("127.0.0.1", 0)]


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid"])
def test_a_foreign_host_is_told_before_anything_is_started(events_file: Path, host: str) -> None:
    with Interrupts() as interrupts:
        settings = StackSettings(Path("m"), commands=commands({}))
        with pytest.raises(CommandError, match=f"cannot listen on port 0 of {host}: "):
            Stack(settings, interrupts, Ports(port=0, host=host))
    assert events(events_file) == []


def test_a_port_that_is_taken_elsewhere_is_free_here(events_file: Path) -> None:
    with taken_port("127.0.0.2") as port, Interrupts() as interrupts:
        settings = StackSettings(Path("m"), commands=commands({}))
        Stack(settings, interrupts, Ports(port=port))
        with pytest.raises(CommandError, match=r"of 127\.0\.0\.2: Address already in use"):
            Stack(settings, interrupts, Ports(port=port, host="127.0.0.2"))


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
def test_a_host_that_is_not_this_machine_is_told_at_once(events_file: Path, host: str) -> None:
    with Interrupts() as interrupts, pytest.raises(CommandError, match=f"of {host}: "):
        Stack(StackSettings(Path("m")), interrupts, Ports(port=free_port(), host=host))
    assert events(events_file) == []


def test_the_host_is_the_gateways_alone(events_file: Path) -> None:
    settings = StackSettings(Path("m"), commands=commands({}))
    with Interrupts() as interrupts, Stack(settings, interrupts, Ports(port=0, host="127.0.0.2")):
        pass
    told = {event["name"]: event["argv"] for event in events(events_file)}
    hosts = {name: argv[argv.index("--host") + 1] for name, argv in told.items()}
    assert hosts == {"gateway": "127.0.0.2", "tokenizer": "127.0.0.1", "engine": "127.0.0.1"}
    assert "--trust-incoming-trace" in told["gateway"]


def test_callers_from_elsewhere_are_not_trusted_with_their_trace(events_file: Path) -> None:
    settings = StackSettings(Path("m"), commands=commands({}))
    with Interrupts() as interrupts, Stack(settings, interrupts, Ports(port=0, host="0.0.0.0")):
        pass
    told = {event["name"]: event["argv"] for event in events(events_file)}
    assert "--trust-incoming-trace" not in told["gateway"]
    assert "--trust-incoming-trace" in told["engine"]


@pytest.mark.parametrize(
    ("listened", "called"),
    [
        ("0.0.0.0:5", "127.0.0.1:5"),
        ("[::]:5", "[::1]:5"),
        ("127.0.0.2:5", "127.0.0.2:5"),
        ("[fe80::1]:5", "[fe80::1]:5"),
    ],
)
def test_what_stands_for_every_address_is_called_on_loopback(listened: str, called: str) -> None:
    assert callable_address(listened) == called


def environments(path: Path) -> dict[str, dict[str, str]]:
    return {event["name"]: event["environment"] for event in events(path)}


@contextmanager
def stack_that_keeps_the_export() -> Iterator[Stack]:
    settings = StackSettings(Path("m"), commands=commands({}))
    ports = Ports(port=0)
    with Interrupts() as interrupts, Stack(settings, interrupts, ports, keep_export=True) as stack:
        yield stack


def test_up_leaves_the_export_of_spans_as_the_environment_has_it(
    events_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4317",
        "OTEL_EXPORTER_OTLP_HEADERS": "api-key=k",
        "OTEL_TRACES_SAMPLER": "traceidratio",
        "OTEL_TRACES_SAMPLER_ARG": "0.1",
        "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment=test",
    }
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with stack_that_keeps_the_export() as stack:
        assert stack.running.collector is None
    found = environments(events_file)
    assert set(found) == {"gateway", "tokenizer", "engine"}
    for environment in found.values():
        kept = {name: value for name, value in environment.items() if name.startswith("OTEL_")}
        assert kept == given


def test_up_collects_spans_as_they_are_sampled_where_none_go_elsewhere(
    events_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
    with stack_that_keeps_the_export() as stack:
        collector = stack.running.collector
    environment = environments(events_file)["engine"]
    assert environment["OTEL_EXPORTER_OTLP_ENDPOINT"] == f"http://{collector}"
    assert environment["OTEL_TRACES_SAMPLER"] == "always_off"
    assert "OTEL_EXPORTER_OTLP_PROTOCOL" not in environment
    assert "not used here: OTEL_EXPORTER_OTLP_PROTOCOL" in capsys.readouterr().err


def test_tracing_that_is_off_stays_off(events_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    with stack_that_keeps_the_export() as stack:
        assert stack.running.collector is None
    assert environments(events_file)["gateway"]["OTEL_SDK_DISABLED"] == "true"


def test_settings_of_the_services_hold_unless_up_has_a_flag_for_them(
    events_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NANOINFER_LOG_FORMAT", "json")
    monkeypatch.setenv("NANOINFER_TRUST_INCOMING_TRACE", "false")
    monkeypatch.setenv("NANOINFER_HOST", "0.0.0.0")
    monkeypatch.setenv("NANOINFER_ENGINE", "127.0.0.1:1")
    settings = StackSettings(Path("m"), commands=commands({}))
    with Interrupts() as interrupts, Stack(settings, interrupts, Ports(port=0)):
        pass
    for event in events(events_file):
        assert not {"--log-format", "--trust-incoming-trace"} & set(event["argv"])
        assert event["environment"]["NANOINFER_LOG_FORMAT"] == "json"
        assert "NANOINFER_ENGINE" not in event["environment"]
        assert "NANOINFER_HOST" not in event["environment"]
    assert "not used here: NANOINFER_ENGINE" in capsys.readouterr().err


def test_a_standard_error_that_nobody_takes_does_not_hold_a_service_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(text: str) -> None:
        raise BrokenPipeError("nobody reads")

    monkeypatch.setattr(stack_module, "note", broken)
    program = "for _ in range(20_000): print('more than a pipe holds')"
    child = ServiceProcess(
        "engine",
        [sys.executable, "-c", program],
        tmp_path / "port",
        os.environ,
        show=partial(_forward, "engine"),
    )
    child.await_end(time.monotonic() + 60)
    assert child.process.returncode == 0
    assert child.tail().endswith("more than a pipe holds")
