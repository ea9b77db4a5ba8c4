"""A streamed answer: iterate over deltas, close to cancel, ask for the whole when it is over.

Leaving a `with` block, `close()`, the end of the object's life and `until` all cancel the call,
which frees everything upstream.
"""

from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import grpc

from nanoinfer import results
from nanoinfer.base import Call
from nanoinfer.errors import NanoInferError
from nanoinfer.results import Completion, Delta
from nanoinfer.v1 import gateway_pb2

Until = Callable[[str], bool]


class _StreamState:
    """What both kinds of stream do: messages are merged into a whole response as they come."""

    def __init__(self, call: Call[Completion], until: Until | None) -> None:
        self._call = call
        self._until = until
        self._open = True
        self._error: NanoInferError | None = None
        self._waiting: deque[Delta] = deque()
        self._whole = gateway_pb2.GatewayServiceGenerateResponse()
        self._choices: dict[int, gateway_pb2.Choice] = {}
        self._texts: dict[int, str] = {}

    @property
    def text(self) -> str:
        """The first completion's text so far."""
        return self._texts.get(0, "")

    @property
    def request_id(self) -> str:
        """The id under which the server logs this request."""
        return self._call.request_id

    def __del__(self) -> None:
        self._cancel()

    @contextmanager
    def _receiving(self) -> Iterator[None]:
        """Notes how the stream breaks in the block. Nothing breaks one that was closed before."""
        try:
            with self._call.receiving(self._completion):
                yield
        except NanoInferError as error:
            if self._open:
                self._open, self._error = False, error
                raise
        except BaseException:
            self._open = False
            raise

    def _feed(self, message: Any) -> None:
        self._call.answered = True
        for part in ("prompt_info", "summary"):
            if message.HasField(part):
                getattr(self._whole, part).CopyFrom(getattr(message, part))
        for delta in message.deltas:
            choice = self._choice(delta.index)
            choice.token_ids.extend(delta.token_ids)
            choice.logprobs.extend(delta.logprobs)
            self._texts[delta.index] += delta.text
            self._waiting.append(results.delta(delta))
            if self._until is not None and self._until(self._texts[delta.index]):
                self._cancel()
                return
        for finish in message.finishes:
            self._choice(finish.index).finish.CopyFrom(finish)
            self._waiting.append(results.last_delta(finish))

    def _choice(self, index: int) -> gateway_pb2.Choice:
        if index not in self._choices:
            self._choices[index] = self._whole.choices.add(index=index)
            self._texts[index] = ""
        return self._choices[index]

    def _finish(self, trailing_metadata: Any) -> None:
        self._open = False
        self._call.succeed(trailing_metadata)

    def _cancel(self) -> None:
        if self._open:
            self._open = False
            self._call.cancel()

    def _close(self) -> None:
        self._waiting.clear()
        self._cancel()

    def _completion(self) -> Completion:
        for index, choice in self._choices.items():
            choice.text = self._texts[index]
        return self._call.decode(self._whole)

    def _outcome(self) -> Completion:
        if self._error is not None:
            raise self._error
        return self._completion()


class Stream(_StreamState):
    """Deltas of one request, for a blocking caller."""

    def __iter__(self) -> Iterator[Delta]:
        return self

    def __next__(self) -> Delta:
        """The next delta; raises a NanoInferError where the stream breaks."""
        rpc = self._call.rpc
        while self._open and not self._waiting:
            with self._receiving():
                if (message := next(rpc, None)) is None:
                    self._finish(rpc.trailing_metadata())
                else:
                    self._feed(message)
        if not self._waiting:
            raise StopIteration
        return self._waiting.popleft()

    def result(self) -> Completion:
        """Reads what is left and returns the whole; after `close` or `until`, what had arrived.

        Raises the error that broke the stream.
        """
        for _ in self:
            pass
        return self._outcome()

    def close(self) -> None:
        """Cancels the call where it is not over; deltas already received are dropped."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()


class AsyncStream(_StreamState):
    """Deltas of one request, for an event loop; the first one waits for `connect`."""

    def __init__(
        self,
        call: Call[Completion],
        until: Until | None,
        connect: Callable[[], Awaitable[None]],
    ) -> None:
        super().__init__(call, until)
        self._connect: Callable[[], Awaitable[None]] | None = connect

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self

    async def __anext__(self) -> Delta:
        """The next delta; raises a NanoInferError where the stream breaks."""
        rpc = self._call.rpc
        while self._open and not self._waiting:
            with self._receiving():
                if self._connect is not None:
                    connect, self._connect = self._connect, None
                    await connect()
                if (message := await rpc.read()) is grpc.aio.EOF:  # type: ignore[attr-defined]
                    self._finish(await rpc.trailing_metadata())
                else:
                    self._feed(message)
        if not self._waiting:
            raise StopAsyncIteration
        return self._waiting.popleft()

    async def result(self) -> Completion:
        """`Stream.result`, awaited."""
        async for _ in self:
            pass
        return self._outcome()

    async def aclose(self) -> None:
        """`Stream.close`, awaited."""
        self._close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._close()
