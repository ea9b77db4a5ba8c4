"""Log entries: their form, their ids, what they never hold, and a log that cannot be written."""

import io
import json
import logging
import os
from collections.abc import Iterator

import pytest
import structlog
from nanoinfer_common.logs import TolerantHandler, configure_logging
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def test_json_lines_with_ids(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("nanoinfer-engine", "info", "json")
    structlog.contextvars.bind_contextvars(request_id="mine")
    provider = TracerProvider(shutdown_on_exit=False)
    with provider.get_tracer("t").start_as_current_span("s") as span:
        structlog.get_logger("a").info("hello", tokens=3)
        logging.getLogger("b").warning("from %s", "stdlib")
    structlog.get_logger("a").debug("too fine")
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
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
    written = capsys.readouterr().err
    assert "secret" not in written
    assert "told" in written
    assert "Traceback" in written


@pytest.mark.matrix("R74")
def test_a_closed_pipe_does_not_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", buffering=1) as stream:
        monkeypatch.setattr("sys.stderr", stream)
        configure_logging("s")
        handler = logging.getLogger().handlers[0]
        assert isinstance(handler, TolerantHandler)
        for _ in range(3):
            structlog.get_logger().info("lost")
        assert handler.num_lost == 3
        monkeypatch.undo()
        # What is buffered cannot be flushed; closing would complain about that.
        with pytest.raises(BrokenPipeError):
            stream.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)


def test_a_closed_stream_does_not_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    configure_logging("s")
    stream.close()
    structlog.get_logger().info("lost")
    assert isinstance(logging.getLogger().handlers[0], TolerantHandler)
