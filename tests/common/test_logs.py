"""Log entries: their form, their ids, what they never hold, and a log that cannot be written."""

import io
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import structlog
from nanoinfer_common.logs import LOST_ENTRIES, QueuedHandler, configure_logging
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    for handler in root.handlers:
        handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def log_handler() -> QueuedHandler:
    (handler,) = logging.getLogger().handlers
    assert isinstance(handler, QueuedHandler)
    return handler


def written(capsys: pytest.CaptureFixture[str]) -> str:
    log_handler().flush()
    return capsys.readouterr().err


def num_counted() -> float:
    return float(LOST_ENTRIES.collect()[0].samples[0].value)


def test_json_lines_with_ids(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("nanoinfer-engine", "info", "json")
    structlog.contextvars.bind_contextvars(request_id="mine")
    provider = TracerProvider(shutdown_on_exit=False)
    with provider.get_tracer("t").start_as_current_span("s") as span:
        structlog.get_logger("a").info("hello", tokens=3)
        logging.getLogger("b").warning("from %s", "stdlib")
    structlog.get_logger("a").debug("too fine")
    first, second = map(json.loads, written(capsys).splitlines())
    assert first["event"] == "hello"
    assert first["tokens"] == 3
    assert first["logger"] == "a"
    assert first["level"] == "info"
    assert "T" in first["timestamp"]
    assert second["event"] == "from stdlib"
    for entry in (first, second):
        assert entry["service"] == "nanoinfer-engine"
        assert entry["request_id"] == "mine"
        assert entry["trace_id"] == trace.format_trace_id(span.get_span_context().trace_id)
        assert entry["span_id"] == trace.format_span_id(span.get_span_context().span_id)
    provider.shutdown()


@pytest.mark.parametrize("form", ["json", "console"])
def test_texts_and_local_variables_stay_out(capsys: pytest.CaptureFixture[str], form: str) -> None:
    configure_logging("s", "debug", form)  # type: ignore[arg-type]
    prompt = "a very secret prompt"
    log = structlog.get_logger()
    log.info("request", prompt=prompt, text=prompt, messages=[prompt], authorization=prompt)
    try:
        raise ValueError("told")
    except ValueError:
        log.exception("failed")
    shown = written(capsys)
    assert "secret" not in shown
    assert "told" in shown
    assert "Traceback" in shown


@pytest.fixture
def stderr_is(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Makes a file descriptor the stream of the log; the test's end closes it."""
    streams: list[io.TextIOBase] = []

    def use(descriptor: int) -> None:
        streams.append(os.fdopen(descriptor, "w"))
        monkeypatch.setattr("sys.stderr", streams[-1])
        configure_logging("s")

    yield use
    monkeypatch.undo()
    for stream in streams:
        stream.close()


@pytest.mark.matrix("R74")
@pytest.mark.parametrize("fault", ["closed pipe", "full disk", "read-only", "closed stream"])
def test_a_log_that_cannot_be_written_is_counted_and_does_not_raise(
    fault: str, stderr_is: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault == "closed pipe":
        reader, writer = os.pipe()
        os.close(reader)
        stderr_is(writer)
    elif fault == "closed stream":
        stream = io.StringIO()
        monkeypatch.setattr("sys.stderr", stream)
        configure_logging("s")
        stream.close()
    else:
        path, mode = ("/dev/full", os.O_WRONLY) if fault == "full disk" else (os.devnull, 0)
        stderr_is(os.open(path, mode))
    before = num_counted()
    for _ in range(3):
        structlog.get_logger().info("lost")
    log_handler().flush()
    assert log_handler().num_lost == 3
    assert num_counted() == before + 3


@pytest.mark.matrix("R74")
def test_a_pipe_that_nobody_reads_loses_entries_and_says_so_later() -> None:
    reader, writer = os.pipe()
    lines = 3000  # more than the pipe holds
    with os.fdopen(writer, "w") as stream:
        handler = QueuedHandler(stream, max_queued=8)
        text = "x" * 99
        for _ in range(lines):
            handler.handle(logging.makeLogRecord({"msg": text}))
        handler.flush()  # in vain, yet it returns
        lost = handler.num_lost
        assert 0 < lost < lines
        read: list[bytes] = []
        rest = threading.Thread(
            target=lambda: read.extend(iter(lambda: os.read(reader, 65536), b""))
        )
        rest.start()
        handler.close()
    rest.join()
    os.close(reader)
    told = b"".join(read).decode().splitlines()
    assert told.count(text) == lines - lost
    said = [line.split(": ") for line in told if line != text]
    assert {label for label, _ in said} == {"log entries lost"}
    assert sum(int(number) for _, number in said) == lost


def test_an_entry_that_cannot_be_formatted_is_counted() -> None:
    stream = io.StringIO()
    handler = QueuedHandler(stream)
    handler.handle(logging.makeLogRecord({"msg": "%d", "args": ("no number",)}))
    handler.handle(logging.makeLogRecord({"msg": "next"}))
    handler.close()
    assert handler.num_lost == 1
    assert stream.getvalue() == "log entries lost: 1\nnext\n"


def test_a_pipe_that_must_not_be_waited_for_gets_every_entry_whole() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)  # as another holder of the same pipe may have set it
    read: list[bytes] = []
    rest = threading.Thread(target=lambda: read.extend(iter(lambda: os.read(reader, 4096), b"")))
    with os.fdopen(writer, "w") as stream:
        handler = QueuedHandler(stream)
        for number in range(2000):
            handler.handle(logging.makeLogRecord({"msg": f"{number:099}"}))
        rest.start()
        handler.close()
    rest.join()
    os.close(reader)
    assert b"".join(read).decode().splitlines() == [f"{number:099}" for number in range(2000)]


def test_what_comes_after_the_end_is_lost_and_does_not_raise() -> None:
    stream = io.StringIO()
    handler = QueuedHandler(stream)
    handler.close()
    handler.handle(logging.makeLogRecord({"msg": "late"}))
    handler.flush()
    assert (handler.num_lost, stream.getvalue()) == (1, "")


def test_configured_twice_it_keeps_its_thread_and_its_order(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure_logging("first")
    before = log_handler()
    logging.getLogger("a").info("one")
    configure_logging("second")
    logging.getLogger("a").info("two")
    assert log_handler() is before
    entries = [json.loads(line) for line in written(capsys).splitlines()]
    assert [(entry["service"], entry["event"]) for entry in entries] == [
        ("first", "one"),
        ("second", "two"),
    ]


def test_warnings_and_uncaught_exceptions_go_to_the_log() -> None:
    code = """
import sys, threading, warnings
from nanoinfer_common.logs import configure_logging, log_what_would_be_printed
configure_logging("s")
log_what_would_be_printed()
warnings.warn("a warning")
def fail(): raise ValueError("in a thread")
thread = threading.Thread(target=fail, name="worker"); thread.start(); thread.join()
class Bad:
    def __del__(self): raise ValueError("in a finalizer")
Bad()
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    warning, thread, finalizer = map(json.loads, result.stderr.splitlines())
    assert "a warning" in warning["event"]
    assert thread["thread"] == "worker"
    assert "ValueError: in a thread" in thread["exception"]
    assert "Bad.__del__" in finalizer["where"]
    assert "ValueError: in a finalizer" in finalizer["exception"]
