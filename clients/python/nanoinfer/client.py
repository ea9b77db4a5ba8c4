"""The blocking client."""

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, ClassVar, Generic, Self, TypeVar, Unpack

import grpc

from nanoinfer import health, options
from nanoinfer.base import ClientBase
from nanoinfer.calls import Call
from nanoinfer.options import CallOptions, Message, Options, Prompt
from nanoinfer.results import Completion, whole
from nanoinfer.streams import CLOSED, Stream, Until
from nanoinfer.v1 import gateway_pb2
from nanoinfer.v1.generation_pb2 import ModelInfo, ServerInfo

Response = TypeVar("Response")


class Client(ClientBase):
    """Talks to a gateway and blocks the calling thread; may be shared by threads.

    Calls raise `NanoInferError`. What it is built from is `ClientBase`'s.
    """

    _transport: ClassVar[Any] = grpc

    def generate(self, prompt: Prompt, **settings: Unpack[Options]) -> Completion:
        """Completes a prompt, given as text or as token ids."""
        return self._start_generate(prompt, settings).result()

    def chat(self, messages: Sequence[Message], **settings: Unpack[Options]) -> Completion:
        """Answers a conversation."""
        options.check_names(settings, Options)
        request = options.chat_request(messages, settings, gateway_pb2.GatewayServiceChatRequest)
        return self._start("Chat", self._stub.Chat, request, settings, _completion).result()

    def stream(
        self,
        prompt: Prompt | Sequence[Message],
        *,
        until: Until | None = None,
        **settings: Unpack[Options],
    ) -> Stream:
        """Streams the answer to a conversation, where messages are given, else to a prompt.

        `until` sees the text so far after each delta; True ends the stream and cancels the call.
        """
        return Stream(*self._open_stream(prompt, settings), until)

    def generate_batch(
        self, prompts: Iterable[Prompt], *, max_concurrency: int = 32, **settings: Unpack[Options]
    ) -> list[Completion]:
        """Completes prompts as separate requests, `max_concurrency` at a time; results keep order.

        The engine batches what runs together. The first failure cancels the rest and is raised.
        """
        if max_concurrency < 1:
            raise ValueError("max_concurrency must be at least 1")
        slots = threading.Semaphore(max_concurrency)
        failed = threading.Event()

        def ended(future: Any) -> None:
            if future.cancelled() or future.exception() is not None:
                failed.set()
            slots.release()

        started: list[_Started[Completion]] = []
        try:
            for prompt in prompts:
                slots.acquire()
                if failed.is_set():
                    break
                started.append(self._start_generate(prompt, settings))
                started[-1].future.add_done_callback(ended)
            return [each.result() for each in started]
        finally:
            for each in started:
                each.cancel()

    def count_tokens(
        self,
        text_or_messages: str | Sequence[Message],
        *,
        model: str | None = None,
        **settings: Unpack[CallOptions],
    ) -> int:
        """The number of tokens of a text or a conversation, special tokens included."""
        request = options.count_request(text_or_messages, model)
        method = self._stub.CountTokens
        return int(self._call("CountTokens", method, request, settings).num_tokens)

    def models(self, **settings: Unpack[CallOptions]) -> list[ModelInfo]:
        """Every served model, by name."""
        models: list[ModelInfo] = []
        request = gateway_pb2.GatewayServiceListModelsRequest()
        while True:
            page = self._call("ListModels", self._stub.ListModels, request, settings)
            models.extend(page.models)
            request.page_token = page.next_page_token
            if not request.page_token:
                return models

    def model_info(self, model: str | None = None, **settings: Unpack[CallOptions]) -> ModelInfo:
        """A model's description, its defaults included; the served one where no name is given."""
        request = gateway_pb2.GatewayServiceGetModelInfoRequest(model=model)
        response = self._call("GetModelInfo", self._stub.GetModelInfo, request, settings)
        info: ModelInfo = response.model
        return info

    def server_info(self, **settings: Unpack[CallOptions]) -> ServerInfo:
        """The gateway's description."""
        request = gateway_pb2.GatewayServiceGetServerInfoRequest()
        response = self._call("GetServerInfo", self._stub.GetServerInfo, request, settings)
        info: ServerInfo = response.server
        return info

    def wait_until_ready(self, timeout: float = 30.0) -> None:
        """Returns once the gateway says that it is ready; raises `Unavailable` after `timeout`."""
        end = time.monotonic() + timeout
        check = self._channel.unary_unary(health.CHECK, health.serialize, health.deserialize)
        status = "unreachable"
        while (remaining := end - time.monotonic()) > 0:
            try:
                status = str(check(health.READINESS, timeout=remaining))
            except grpc.RpcError as error:
                if error.code() in health.ANSWERED:
                    return
            if status == "SERVING":
                return
            time.sleep(min(health.POLL_SECONDS, max(0.0, end - time.monotonic())))
        raise health.not_ready(self.target, timeout, status)

    def close(self) -> None:
        """Closes the channel; calls under way are cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _start_generate(self, prompt: Prompt, settings: Options) -> "_Started[Completion]":
        options.check_names(settings, Options)
        request = options.generate_request(
            prompt, settings, gateway_pb2.GatewayServiceGenerateRequest
        )
        return self._start("Generate", self._stub.Generate, request, settings, _completion)

    def _call(
        self, name: str, method: Callable[..., Response], request: object, settings: CallOptions
    ) -> Response:
        options.check_names(settings, CallOptions)
        response: Response = self._start(name, method, request, settings, _response).result()
        return response

    def _start(
        self,
        name: str,
        method: Any,
        request: object,
        settings: CallOptions,
        decode: Callable[[Any, Call, str | None], Response],
    ) -> "_Started[Response]":
        call = self._open(name, settings)
        return _Started(call, call.invoke(method.future, request), decode)


class _Started(Generic[Response]):
    """A unary call under way."""

    def __init__(
        self, call: Call, future: Any, decode: Callable[[Any, Call, str | None], Response]
    ) -> None:
        self.future = future
        self._call = call
        self._decode = decode
        self._ended = False

    def result(self) -> Response:
        """Waits for the response; an interrupt cancels the call."""
        try:
            response = self.future.result()
        except grpc.RpcError as error:
            self._ended = True
            trailing = error.trailing_metadata()
            raise self._call.fail(error.code(), error.details(), trailing) from None
        except grpc.FutureCancelledError:
            self._ended = True
            raise self._call.fail(grpc.StatusCode.CANCELLED, CLOSED, ()) from None
        except BaseException:
            self.cancel()
            raise
        self._ended = True
        trace_id = self._call.succeed(self.future.trailing_metadata())
        return self._decode(response, self._call, trace_id)

    def cancel(self) -> None:
        """Gives the call up where `result` was not taken."""
        if not self._ended:
            self._ended = True
            self.future.cancel()
            self._call.cancel()


def _completion(response: Any, call: Call, trace_id: str | None) -> Completion:
    return whole(response, call.request_id, trace_id)


def _response(response: Any, call: Call, trace_id: str | None) -> Any:
    return response
