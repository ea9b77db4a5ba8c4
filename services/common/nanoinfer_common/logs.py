"""Structured logs: one JSON object a line, or readable lines for a terminal.

Trace and request ids are added. Prompts, completions, token ids and credentials never reach a log:
entries that carry such keys lose them. A log that cannot be written does not stop the service.
"""

import logging
import sys
from typing import Final, Literal

import structlog
from opentelemetry import trace
from structlog.typing import EventDict, Processor, WrappedLogger

# A safety net: no code here logs these, and none can by accident.
REDACTED_KEYS: Final = frozenset(
    {"prompt", "text", "messages", "content", "completion", "token_ids", "authorization", "stop"}
)


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
    handler = TolerantHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())


class TolerantHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes entries and counts those that a closed pipe or a full disk refused."""

    num_lost = 0

    def handleError(self, record: logging.LogRecord) -> None:
        """Counts the entry as lost; there is nowhere left to report it."""
        self.num_lost += 1


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
