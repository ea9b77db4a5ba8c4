"""Structured logs: one JSON object a line, or readable lines for a terminal.

Trace and request ids are added. Prompts, completions, token ids and credentials never reach a log:
entries that carry such keys lose them. A thread of its own writes the log, so that neither a pipe
that nobody reads nor a full disk stops the service. What does not fit is dropped, counted and told.
"""

import logging
import os
import select
import sys
import threading
from queue import SimpleQueue
from typing import Final, Literal, TextIO

import structlog
from opentelemetry import trace
from prometheus_client import Counter
from structlog.typing import EventDict, Processor, WrappedLogger

# A safety net: no code here logs these, and none can by accident.
REDACTED_KEYS: Final = frozenset(
    {"prompt", "text", "messages", "content", "completion", "token_ids", "authorization", "stop"}
)

MAX_QUEUED_ENTRIES: Final = 4096
# What a flush waits for a log that is slow to take its entries, and so at most at the exit.
FLUSH_SECONDS: Final = 1.0

# One per process, like the log; each server registers it.
LOST_ENTRIES: Final = Counter(
    "nanoinfer_log_entries_lost",
    "Log entries lost: the queue was full or the log could not be written.",
    registry=None,
)


def open_standard_streams() -> None:
    """Opens /dev/null in place of standard streams that are closed.

    Otherwise a socket takes the number of one: libuv aborts the process then, and whatever writes
    to that number writes into the socket.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number is the one that is missing.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def configure_logging(
    service: str, level: str = "info", format: Literal["json", "console"] = "json"
) -> None:
    """Sends structlog's and the standard library's entries to stderr in one form."""

    def add_service(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
        event["service"] = service
        return event

    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        add_service,
        _add_trace_ids,
        _redact,
        structlog.processors.StackInfoRenderer(),
    ]
    render: list[Processor] = [
        # Plain tracebacks: the rich ones print local variables, and those hold prompts.
        structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    ]
    if format == "json":
        render = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    handler = next((h for h in root.handlers if _writes_to(h, sys.stderr)), None)
    handler = handler or QueuedHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        )
    )
    root.handlers[:] = [handler]
    root.setLevel(level.upper())


def log_what_would_be_printed() -> None:
    """Logs warnings and exceptions that nobody catches; Python would write them to stderr itself.

    Such a write waits for a pipe that nobody reads, on the event loop's thread too.
    """
    log = structlog.get_logger(__name__)
    logging.captureWarnings(True)

    def in_thread(args: threading.ExceptHookArgs) -> None:
        name = args.thread.name if args.thread else ""
        log.error("a thread failed", thread=name, exc_info=args.exc_value)

    threading.excepthook = in_thread

    def unraisable(args: "sys.UnraisableHookArgs") -> None:
        # Its name alone: its text might hold a prompt.
        name = getattr(args.object, "__qualname__", type(args.object).__name__)
        log.error("unraisable", where=name, exc_info=args.exc_value)

    sys.unraisablehook = unraisable


def _writes_to(handler: logging.Handler, stream: TextIO) -> bool:
    return isinstance(handler, QueuedHandler) and handler.stream is stream


class QueuedHandler(logging.Handler):
    """Queues entries for a thread that writes them to a stream; no caller waits for the stream.

    Beyond `max_queued` entries, and where the stream refuses one, entries are lost. The loss is
    written as an entry of its own once the stream takes entries again.
    """

    def __init__(self, stream: TextIO, max_queued: int = MAX_QUEUED_ENTRIES) -> None:
        super().__init__()
        self.stream = stream
        self._max_queued = max_queued
        # Its `put` may interrupt itself, as when garbage that is collected meanwhile has its say.
        self._queue: SimpleQueue[str | threading.Event] = SimpleQueue()
        self._ended = False
        self._num_dropped = 0  # changed under the handler's lock
        self._num_refused = 0  # changed by the writing thread
        self._num_told = 0  # changed by the writing thread
        self._writer = threading.Thread(target=self._run, name="log", daemon=True)
        self._writer.start()

    @property
    def num_lost(self) -> int:
        """Number of entries lost so far."""
        return self._num_dropped + self._num_refused

    def emit(self, record: logging.LogRecord) -> None:
        """Queues an entry, formatted here, where its context is; never blocks, never raises."""
        try:
            text = self.format(record)
        except Exception:
            self.handleError(record)
            return
        if self._ended or self._queue.qsize() >= self._max_queued:
            self.handleError(record)
        else:
            self._queue.put(text)

    def handleError(self, record: logging.LogRecord) -> None:
        """Counts the entry as lost."""
        self._num_dropped += 1
        LOST_ENTRIES.inc()

    def flush(self) -> None:
        """Waits until what is queued is written, at most `FLUSH_SECONDS`."""
        written = threading.Event()
        self._queue.put(written)
        if self._writer.is_alive():
            written.wait(FLUSH_SECONDS)

    def close(self) -> None:
        """Flushes and ends; entries that come later are lost. Called by `logging.shutdown`."""
        self._ended = True
        self.flush()
        super().close()

    def _run(self) -> None:
        while not (self._ended and self._queue.empty()):
            item = self._queue.get()
            if isinstance(item, threading.Event):
                item.set()
                continue
            if (num_lost := self.num_lost) > self._num_told and self._write(
                self._described(num_lost - self._num_told)
            ):
                self._num_told = num_lost
            if not self._write(item):
                self._num_refused += 1
                LOST_ENTRIES.inc()

    def _described(self, num_lost: int) -> str:
        message = f"log entries lost: {num_lost}"
        values = {"name": __name__, "levelno": logging.WARNING, "levelname": "WARNING"}
        return self.format(logging.makeLogRecord(values | {"msg": message}))

    def _write(self, text: str) -> bool:
        """Writes a line past the stream's buffer, which a writer stuck at the exit would hold."""
        try:
            descriptor = _descriptor(self.stream)
            if descriptor is None:
                self.stream.write(f"{text}\n")
                self.stream.flush()
                return True
            data = memoryview(f"{text}\n".encode("utf-8", "backslashreplace"))
            while data:
                try:
                    data = data[os.write(descriptor, data) :]
                except BlockingIOError:
                    select.select([], [descriptor], [])
        except Exception:  # whatever the stream has against it, such as being closed
            return False
        return True


def _descriptor(stream: TextIO) -> int | None:
    """The stream's file descriptor, where it has one."""
    try:
        return stream.fileno()
    except OSError:
        return None


def _add_trace_ids(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        event["trace_id"] = trace.format_trace_id(context.trace_id)
        event["span_id"] = trace.format_span_id(context.span_id)
    return event


def _redact(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    for key in REDACTED_KEYS.intersection(event):
        event[key] = "[redacted]"
    return event
