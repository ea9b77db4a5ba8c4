"""A streamed answer: iterate over deltas, close to cancel, ask for the whole when it is over.

Leaving a `with` block, `close()`, the end of the object's life and `until` all cancel the call,
which frees everything upstream.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

import grpc

from nanoinfer.calls import Call
from nanoinfer.errors import NanoInferError
from nanoinfer.results import Assembly, Completion, Delta

Until = Callable[[str], bool]
CLOSED = "the client was closed"


class _Cancellable(Protocol):
    def cancel(self) -> Any: ...


Responses = TypeVar("Responses", bound=_Cancellable)


class _StreamState(Generic[Responses]):
    """What both kinds of stream hold."""

    def __init__(self, call: Call, responses: Responses, until: Until | None) -> None:
        self._call = call
        self._responses = responses
        self._assembly = Assembly(until)
        self._waiting: deque[Delta] = deque()
        self._open = True
        self._error: NanoInferError | None = None
        self._trace_id: str | None = None

    @property
    def text(self) -> str:
        """The first completion's text so far."""
        return self._assembly.text()

    @property
    def request_id(self) -> str:
        """The id under which the server logs this request."""
        return self._call.request_id

    def _feed(self, message: Any) -> None:
        try:
            self._waiting.extend(self._assembly.feed(message))
        except BaseException:  # `until` is the caller's code
            self._cancel()
            raise
        if self._assembly.ended:
            self._cancel()

    def _finish(self, trailing_metadata: Any) -> None:
        self._open = False
        self._trace_id = self._call.succeed(trailing_metadata)

    def _fail(self, code: grpc.StatusCode, message: str | None, trailing: Any) -> NanoInferError:
        self._open = False
        self._error = self._call.fail(code, message, trailing, self._completion())
        return self._error

    def _cancel(self) -> None:
        if self._open:
            self._open = False
            self._responses.cancel()
            self._call.cancel()

    def _completion(self) -> Completion:
        return self._assembly.completion(self._call.request_id, self._trace_id)

    def __del__(self) -> None:
        if getattr(self, "_open", False):
            self._cancel()


class Stream(_StreamState[Any]):
    """Deltas of one request, for a blocking caller."""

    def __iter__(self) -> Iterator[Delta]:
        return self

    def __next__(self) -> Delta:
        """The next delta; raises a NanoInferError where the stream breaks."""
        while not self._waiting:
            if not self._open:
                raise StopIteration
            self._receive()
        return self._waiting.popleft()

    def result(self) -> Completion:
        """Reads what is left and returns the whole; after `close` or `until`, what had arrived.

        Raises the error that broke the stream.
        """
        for _ in self:
            pass
        if self._error is not None:
            raise self._error
        return self._completion()

    def close(self) -> None:
        """Cancels the call where it is not over; deltas already received are dropped."""
        self._waiting.clear()
        self._cancel()

    def _receive(self) -> None:
        responses = self._responses
        try:
            message = next(responses)
        except StopIteration:
            self._finish(responses.trailing_metadata())
            return
        except grpc.RpcError:
            if not self._open:  # closed from another thread
                return
            raise self._fail(
                responses.code(), responses.details(), responses.trailing_metadata()
            ) from None
        self._feed(message)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def cancelled_by_caller() -> bool:
    """Tells a cancel of the running task from grpc.aio's CancelledError of a cancelled call."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class AsyncStream(_StreamState[Any]):
    """Deltas of one request, for an event loop."""

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self

    async def __anext__(self) -> Delta:
        """The next delta; raises a NanoInferError where the stream breaks."""
        while not self._waiting:
            if not self._open:
                raise StopAsyncIteration
            await self._receive()
        return self._waiting.popleft()

    async def result(self) -> Completion:
        """Reads what is left and returns the whole; after `aclose` or `until`, what had arrived.

        Raises the error that broke the stream.
        """
        async for _ in self:
            pass
        if self._error is not None:
            raise self._error
        return self._completion()

    async def aclose(self) -> None:
        """Cancels the call where it is not over; deltas already received are dropped."""
        self._waiting.clear()
        self._cancel()

    async def _receive(self) -> None:
        responses = self._responses
        try:
            message = await responses.read()
        except asyncio.CancelledError:
            if not self._open:  # closed by another task
                return
            if cancelled_by_caller():
                self._cancel()
                raise
            raise self._fail(grpc.StatusCode.CANCELLED, CLOSED, ()) from None
        except grpc.RpcError as error:
            trailing = error.trailing_metadata()
            raise self._fail(error.code(), error.details(), trailing) from None
        if message is grpc.aio.EOF:  # type: ignore[attr-defined]
            self._finish(await responses.trailing_metadata())
        else:
            self._feed(message)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()
