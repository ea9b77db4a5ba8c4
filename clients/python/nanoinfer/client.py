"""The blocking client."""

import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Self, Unpack

import grpc

from nanoinfer import health, queries
from nanoinfer.base import Call, ClientBase
from nanoinfer.options import CallOptions, Messages, Options, Prompt
from nanoinfer.queries import Query, Result
from nanoinfer.results import Completion
from nanoinfer.streams import Stream, Until
from nanoinfer.v1.generation_pb2 import ModelInfo, ServerInfo
from nanoinfer.watchdog import Watchdog


class Client(ClientBase):
    """Talks to a gateway and blocks the calling thread; may be shared by threads.

    Calls raise `NanoInferError`. What it is built from is `ClientBase`'s.
    """

    _transport: ClassVar[Any] = grpc

    def generate(self, prompt: Prompt, **settings: Unpack[Options]) -> Completion:
        """Completes a prompt, given as text or as token ids."""
        return self._run(queries.generate(prompt, settings))

    def chat(self, messages: Messages, **settings: Unpack[Options]) -> Completion:
        """Answers a conversation."""
        return self._run(queries.chat(messages, settings))

    def stream(
        self, prompt: Prompt | Messages, *, until: Until | None = None, **settings: Unpack[Options]
    ) -> Stream:
        """Streams the answer to a conversation, where messages are given, else to a prompt.

        `until` sees the text so far after each delta; True ends the stream and cancels the call.
        """
        query = queries.stream(prompt, settings)
        return Stream(self._start(query, self._method(query)), until)

    def generate_batch(
        self, prompts: Iterable[Prompt], *, max_concurrency: int = 32, **settings: Unpack[Options]
    ) -> list[Completion]:
        """Completes prompts as separate requests, `max_concurrency` at a time; results keep order.

        The engine batches what runs together. The first failure cancels the rest and is raised.
        """
        queries.check_batch(prompts, max_concurrency)
        slots = threading.Semaphore(max_concurrency)
        failed = threading.Event()

        def ended(future: Any) -> None:
            if future.cancelled() or future.exception() is not None:
                failed.set()
            slots.release()

        started: list[Call[Completion]] = []
        try:
            for prompt in prompts:
                slots.acquire()
                if failed.is_set():
                    break
                started.append(self._future(queries.generate(prompt, settings)))
                started[-1].rpc.add_done_callback(ended)
            return [_result(call) for call in started]
        finally:
            for call in started:
                call.cancel()

    def count_tokens(
        self,
        text_or_messages: str | Messages,
        *,
        model: str | None = None,
        **settings: Unpack[CallOptions],
    ) -> int:
        """The number of tokens of a text or a conversation, special tokens included."""
        return self._run(queries.count_tokens(text_or_messages, model, settings))

    def models(self, **settings: Unpack[CallOptions]) -> list[ModelInfo]:
        """Every served model, by name."""
        models, next_page = self._run(queries.models("", settings))
        while next_page:
            more, next_page = self._run(queries.models(next_page, settings))
            models += more
        return models

    def model_info(self, model: str | None = None, **settings: Unpack[CallOptions]) -> ModelInfo:
        """A model's description, its defaults included; the served one where no name is given."""
        return self._run(queries.model_info(model, settings))

    def server_info(self, **settings: Unpack[CallOptions]) -> ServerInfo:
        """The gateway's description."""
        return self._run(queries.server_info(settings))

    def wait_until_ready(self, timeout: float = 30.0) -> None:
        """Returns once the gateway says that it is ready; raises `Unavailable` after `timeout`."""
        end, status = time.monotonic() + timeout, "unreachable"
        check = health.method(self._channel)
        while (remaining := end - time.monotonic()) > 0:
            try:
                status = check(health.READINESS, timeout=remaining)
            except grpc.RpcError as error:
                if error.code() in health.ANSWERED:
                    return
                status = health.cause(error)
            if status == "SERVING":
                return
            time.sleep(health.POLL_SECONDS)
        raise health.not_ready(self.target, timeout, status)

    def close(self) -> None:
        """Closes the channel; calls under way are cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prepare(self) -> None:
        self._watchdog = Watchdog(self._channel, self._connect_timeout)

    def _start(self, query: Query[Result], method: Callable[..., Any]) -> Call[Result]:
        call = self._call(query)
        call.start(method, self._waits)
        if self._waits:
            self._watchdog.add(call)
        return call

    def _run(self, query: Query[Result]) -> Result:
        return _result(self._future(query))

    def _future(self, query: Query[Result]) -> Call[Result]:
        return self._start(query, self._method(query).future)


def _result(call: Call[Result]) -> Result:
    with call.receiving():
        response = call.rpc.result()
    call.succeed(call.rpc.trailing_metadata())
    return call.decode(response)
