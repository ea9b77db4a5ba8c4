"""EngineService: proto in, proto out, one stream for each request; plus load and description.

With `messages`, `answers`, `telemetry` and `metrics` the only place that knows proto and grpc.
Outputs that pile up leave as one message: a write slot is taken before a stream's buffer is
emptied, and slots are few, so the busier the server, the more tokens a message carries.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc
import structlog
from nanoinfer.v1 import engine_pb2, engine_pb2_grpc
from nanoinfer.v1 import generation_pb2 as pb
from nanoinfer_common import errors, names, tasks, telemetry
from nanoinfer_common.eos import eos_token_ids
from nanoinfer_common.fingerprint import tokenizer_fingerprint
from nanoinfer_common.interceptors import DEADLINE_SLACK_SECONDS
from nanoinfer_common.model_paths import unservable
from nanoinfer_common.server import ServiceStatus, StartError
from nanoinfer_common.stream_writes import StreamWriter, WriteSlots
from nanoinfer_common.validation import (
    RequestMetadata,
    read_metadata,
    validate_prompt_ids,
    validate_request,
)
from prometheus_client import CollectorRegistry

from nanoinfer_engine.core.batch import Runner
from nanoinfer_engine.core.config import CheckpointError, EngineConfig
from nanoinfer_engine.core.engine import Engine
from nanoinfer_engine.core.errors import EngineError
from nanoinfer_engine.core.progress import Progress
from nanoinfer_engine.core.request import FinishReason, Request
from nanoinfer_engine.core.stream import Stream
from nanoinfer_engine.server.answers import Answer
from nanoinfer_engine.server.loading import show_loading
from nanoinfer_engine.server.messages import ServedModel, prompt_ids
from nanoinfer_engine.server.metrics import EngineCollector, Facts, make_statistics
from nanoinfer_engine.server.settings import EngineSettings
from nanoinfer_engine.server.statuses import failure, refusal_status
from nanoinfer_engine.server.telemetry import latency_attributes, record_phases
from nanoinfer_engine.weights.generation_config import SamplingDefaults, read_sampling_defaults

WATCH_SECONDS = 0.1
log = structlog.get_logger(__name__)
Context = Any  # grpc-stubs types the aio context only in part


LoadRunner = Callable[[EngineConfig, Progress], Runner]


class EngineService(engine_pb2_grpc.EngineServiceServicer):
    """The engine behind its contract; a `nanoinfer_common.server.Service`."""

    name = "nanoinfer-engine"
    full_name = "nanoinfer.v1.EngineService"

    def __init__(
        self, settings: EngineSettings, status: ServiceStatus, load_runner: LoadRunner
    ) -> None:
        """`load_runner` makes the runner, in the engine's thread, and reports its progress."""
        self.registry = CollectorRegistry()
        self._settings = settings
        self._status = status
        self._model: ServedModel | None = None
        self._num_blocks = 0
        self._slots = WriteSlots()
        config, patience = settings.engine_config(), settings.patience()
        self._writer = StreamWriter(patience.reader_seconds)
        self._engine = Engine(
            config,
            load_runner=lambda: load_runner(config, show_loading(settings.log_format)),
            make_statistics=make_statistics,
            listener=self,
            patience=patience,
            start_task=lambda name, work: tasks.keep_running(name, work, status.set_fault),
        )
        self.registry.register(EngineCollector(settings.metrics_prefix, self._facts))

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register the handlers."""
        engine_pb2_grpc.add_EngineServiceServicer_to_server(self, server)

    async def start(self) -> None:
        """Load the model; raises StartError where it cannot be served."""
        config = self._engine.config
        log.info("loading", model=str(config.model_path))
        if reason := unservable(config.model_path):
            raise StartError(f"{config.model_path}: {reason}")
        try:
            defaults, fingerprint, eos = await asyncio.to_thread(self._read_side_files)
            runner = await self._engine.start()
            _check_eos(eos, runner.vocab_size)
        except (CheckpointError, ValueError, OSError) as error:
            raise StartError(f"{config.model_path}: {error}") from error
        self._num_blocks = runner.num_blocks
        self._model = ServedModel(
            name=self._settings.served_name,
            architecture=runner.model_config.model_type,
            dtype=runner.number_format,
            vocab_size=runner.vocab_size,
            num_parameters=runner.num_parameters,
            capacity=self._engine.capacity,
            eos_token_ids=eos,
            defaults=defaults,
            tokenizer_fingerprint=fingerprint,
            weights_fingerprint=bytes.fromhex(runner.weights_fingerprint),
            caches_prefixes=config.prefix_caching,
        )
        log.info(
            "model",
            model=self._model.name,
            dtype=runner.number_format,
            parameters=runner.num_parameters,
            max_model_len=runner.max_model_len,
            kv_tokens=self._engine.capacity.kv_tokens,
            checks_tokenizer=fingerprint is not None,
        )
        if unread := runner.model_config.unread_fields:
            log.warning(
                "configuration fields without effect",
                architecture=runner.model_config.model_type,
                fields=", ".join(unread),
            )
        if defaults.unread:
            log.warning(
                "generation_config.json fields without effect", fields=", ".join(defaults.unread)
            )

    async def drain(self, seconds: float) -> None:
        """Finish what was admitted, at most this long."""
        await self._engine.drain(seconds)

    async def stop(self) -> None:
        """End the engine's thread."""
        await self._engine.stop()

    def stalled(self, is_stalled: bool) -> None:
        """Health follows the engine's steps."""
        if is_stalled:
            self._status.set_stalled()
        else:
            self._status.set_serving()

    def lost(self, error: BaseException) -> None:
        """The process ends with exit code 1, for its supervisor to start a new one."""
        self._status.fail(error)

    async def Generate(  # type: ignore[override]
        self, request: engine_pb2.EngineServiceGenerateRequest, context: Context
    ) -> None:
        """Generate completions; written here, to tell a slow reader from a slow model."""
        model = self._served_model()
        metadata = self._validate(request, model, context)
        try:
            requests = model.requests(request, metadata, self._deadline(context))
            stream = self._engine.submit(requests)
        except EngineError as error:
            raise refusal_status(error) from error
        parent = telemetry.server_span().get_span_context()
        stream.when_ended(lambda ended: record_phases(ended, parent))
        try:
            await self._send(stream, Answer(stream, model), context)
        finally:
            stream.close(_reason(request, requests))
            telemetry.add_to_log_line(
                tenant=metadata.tenant or "",
                prompt_tokens=len(requests[0].prompt_token_ids),
                completion_tokens=sum(len(each.completion_token_ids) for each in requests),
            )
            if not stream.is_live:
                telemetry.set_attributes(latency_attributes(stream.slowest_request))

    async def GetModelInfo(
        self, request: engine_pb2.EngineServiceGetModelInfoRequest, context: Context
    ) -> engine_pb2.EngineServiceGetModelInfoResponse:
        """Describe the model."""
        return engine_pb2.EngineServiceGetModelInfoResponse(model=self._served_model().info())

    async def GetLoad(
        self, request: engine_pb2.EngineServiceGetLoadRequest, context: Context
    ) -> engine_pb2.EngineServiceGetLoadResponse:
        """Give the load."""
        return engine_pb2.EngineServiceGetLoadResponse(load=self._load())

    async def WatchLoad(
        self, request: engine_pb2.EngineServiceWatchLoadRequest, context: Context
    ) -> AsyncIterator[engine_pb2.EngineServiceWatchLoadResponse]:
        """Stream the load: compared ten times a second, sent where it differs or is overdue."""
        interval = self._settings.load_report_seconds
        milliseconds = math.ceil(interval * 1000)
        sent, sent_at = None, -math.inf
        while True:
            load, now = self._load(), time.monotonic()
            # one comparison early rather than late, since the next is only due after the interval
            if load != sent or now - sent_at > interval - WATCH_SECONDS:
                yield engine_pb2.EngineServiceWatchLoadResponse(
                    load=load, max_interval_ms=milliseconds
                )
                sent, sent_at = load, now
            await asyncio.sleep(min(WATCH_SECONDS, interval))

    async def GetServerInfo(
        self, request: engine_pb2.EngineServiceGetServerInfoRequest, context: Context
    ) -> engine_pb2.EngineServiceGetServerInfoResponse:
        """Describe the server."""
        return engine_pb2.EngineServiceGetServerInfoResponse(server=self._status.info())

    async def _send(self, stream: Stream, answer: Answer, context: Context) -> None:
        """Write what the stream brings until it ends; raises what ended it badly."""
        while await stream.wait():
            async with self._slots.hold():
                outputs = stream.take()
                message = answer.message(outputs)
                if message is not None:
                    await self._writer.write(context, message)
            for output in outputs:
                if error := failure(output, answer.num_sent_tokens):
                    raise error

    def _validate(
        self,
        request: engine_pb2.EngineServiceGenerateRequest,
        model: ServedModel,
        context: Context,
    ) -> RequestMetadata:
        """Check everything that a request can say against the model; raises ServiceError."""
        if request.HasField("model") and request.model != model.name:
            raise errors.not_found_model(request.model)
        validate_request(request, model.limits)
        validate_prompt_ids(prompt_ids(request), model.limits)
        model.check_tokenizer(request)
        return read_metadata(context.invocation_metadata(), request.request_id)

    def _deadline(self, context: Context) -> int:
        """When to give up, in monotonic nanoseconds; the server's bounds apply."""
        remaining = context.time_remaining()
        seconds = self._settings.default_deadline_seconds if remaining is None else remaining
        seconds = min(seconds, self._settings.max_deadline_seconds)
        return time.monotonic_ns() + int(seconds * 1e9)

    def _load(self) -> engine_pb2.EngineLoad:
        load = self._engine.load
        is_full = load.is_full(self._engine.config)
        state = engine_pb2.ADMISSION_STATE_FULL if is_full else engine_pb2.ADMISSION_STATE_OPEN
        if self._engine.refusal is not None or self._status.state != pb.SERVER_STATE_SERVING:
            state = engine_pb2.ADMISSION_STATE_CLOSED
        return engine_pb2.EngineLoad(
            running_requests=load.num_running,
            waiting_requests=load.num_waiting,
            kv_cache_usage=load.kv_usage,
            waiting_prompt_tokens=load.waiting_prompt_tokens,
            admission_state=state,
        )

    def _served_model(self) -> ServedModel:
        if self._model is None:
            raise errors.unavailable(names.LOADING, "the model is loading", 1.0)
        return self._model

    def _read_side_files(self) -> tuple[SamplingDefaults, bytes | None, tuple[int, ...]]:
        """Sampling defaults, the tokenizer's fingerprint and EOS."""
        model, tokenizer = self._engine.config.model_path, self._settings.tokenizer
        return (
            read_sampling_defaults(model),
            tokenizer_fingerprint(tokenizer or model),
            eos_token_ids(model, tokenizer),
        )

    def _facts(self) -> Facts:
        settings, engine = self._settings, self._engine
        return Facts(
            model_name=settings.served_name,
            block_size=engine.config.block_size,
            num_blocks=self._num_blocks,
            rejections=dict(engine.rejections),
            load=engine.load,
            snapshot=engine.statistics,
        )


def _check_eos(token_ids: tuple[int, ...], vocab_size: int) -> None:
    """Refuse an EOS that the model cannot produce: the files belong to different models."""
    if token_ids and token_ids[-1] >= vocab_size:
        raise CheckpointError(
            f"EOS {token_ids[-1]} (of generation_config.json, config.json or the tokenizer) is"
            f" outside the model's vocabulary of {vocab_size}"
        )


def _reason(
    proto: engine_pb2.EngineServiceGenerateRequest, requests: Sequence[Request]
) -> FinishReason:
    """Why a call that ends before its completions have ended does so.

    A deadline reaches the server as a cancel of the client's, often before its own clock is due.
    """
    deadline, slack = requests[0].deadline, int(DEADLINE_SLACK_SECONDS * 1e9)
    if deadline is not None and time.monotonic_ns() >= deadline - slack:
        return FinishReason.DEADLINE
    all_began = all(request.times.first_token is not None for request in requests)
    if proto.cancels_at_stop_strings and all_began:
        return FinishReason.STOP
    return FinishReason.CANCELLED
