"""Runs one request under a trace of its own and draws what the services report about it."""

import logging
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import grpc
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from rich.console import Console

from nanoinfer.cli import console
from nanoinfer.cli.answers import open_stream, show
from nanoinfer.cli.arguments import Gateway
from nanoinfer.cli.collector import Span, fetch
from nanoinfer.cli.sampling import chat_options
from nanoinfer.cli.waterfall import PLAIN_WIDTH, draw
from nanoinfer.errors import NanoInferError
from nanoinfer.health import proxy_options
from nanoinfer.options import Messages

SERVICES = {"nanoinfer-gateway", "nanoinfer-tokenizer", "nanoinfer-engine"}
SPANS_TIMEOUT = 5.0
# nothing new for this long: all is there; where something seems to be missing, wait longer
QUIET_SECONDS = 0.5
QUIET_SECONDS_INCOMPLETE = 2.0


def run(
    gateway: Gateway,
    collector: str,
    prompt: str | Messages,
    options: Mapping[str, Any],
    *,
    as_json: bool,
) -> None:
    """Shows the answer, then its spans. A request that fails is drawn too, then raised."""
    completion, failure = None, None
    provider = _tracer_provider(collector, gateway.use_proxy)
    try:
        with gateway.connect(provider) as client:
            if not isinstance(prompt, str):
                options = chat_options(client, options)
            if as_json:
                completion = open_stream(client, prompt, options).result()
            else:
                completion = show(client, prompt, options, as_json)
    except NanoInferError as error:
        failure = error
    finally:
        provider.shutdown()
    trace_id = getattr(failure or completion, "trace_id", None)
    if failure is not None and trace_id is None:
        raise failure
    spans = _await_spans(collector, trace_id, gateway.use_proxy) if trace_id else []
    if as_json:
        found = {"trace_id": trace_id, "completion": completion, "spans": spans}
        console.show("", found, as_json)
    elif trace_id is None:
        console.note("the gateway named no trace")
    else:
        console.write(f"\ntrace {trace_id}\n")
        terminal = sys.stdout is not None and sys.stdout.isatty()
        draw(spans, Console(highlight=False, width=None if terminal else PLAIN_WIDTH))
    if failure is not None:
        raise failure


def _await_spans(collector: str, trace_id: str, use_proxy: bool) -> list[Span]:
    """The trace's spans, once every service's have come and no more follow."""
    spans: list[Span] = []
    changed = time.monotonic()
    end = changed + SPANS_TIMEOUT
    with console.Progress("collecting spans"):
        while (now := time.monotonic()) < end:
            try:
                found = fetch(collector, trace_id, use_proxy=use_proxy)
            except grpc.RpcError as error:
                reason = f"no spans from {collector}: {error.code().name}"
                raise console.CommandError(reason) from error
            if len(found) != len(spans):
                spans, changed = found, now
            if now - changed > (QUIET_SECONDS if _whole(spans) else QUIET_SECONDS_INCOMPLETE):
                break
            time.sleep(0.05)
    return spans


def _whole(spans: Sequence[Span]) -> bool:
    known = {span.span_id for span in spans} | {b""}
    services = {span.service for span in spans}
    return services >= SERVICES and all(span.parent_id in known for span in spans)


def _tracer_provider(collector: str, use_proxy: bool) -> TracerProvider:
    """An SDK that sends this process's spans to the collector; a lost span is no failure here."""
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
    resource = Resource({"service.name": "nanoinfer-cli"})
    provider = TracerProvider(resource=resource, sampler=ALWAYS_ON, shutdown_on_exit=False)
    options: Any = tuple(proxy_options(use_proxy))  # typed as pairs of strings
    endpoint = f"http://{collector}"
    exporter = OTLPSpanExporter(endpoint, insecure=True, timeout=2, channel_options=options)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return provider
