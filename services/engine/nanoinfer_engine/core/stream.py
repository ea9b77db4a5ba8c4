"""The event loop's end of the requests: what the engine produced and nobody took yet.

Lives on the event loop alone. A `Stream` holds all completions of one client's request; outputs
join its buffer as the engine delivers them and leave together when the reader takes them.

The reader of a stream is woken for its first output, for the prompt's log-probabilities and for
ends. For what lies between, readers are woken together, at a pace that gives messages a highest
rate: with many streams of a small model sending takes more of the interpreter, which the step loop
shares, than computing the tokens does.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from nanoinfer_engine.core.errors import StalledReaderError
from nanoinfer_engine.core.request import FinishReason, Request, RequestOutput
from nanoinfer_engine.core.watchdog import Patience

# A message takes no more than this from the buffer, so that what is unread stays counted there.
MAX_TAKEN_BYTES = 512 * 1024
# Memory of a token and of a log-probability as they wait here; measured, rounded up.
_TOKEN_BYTES, _LOGPROB_BYTES = 128, 256
_TICK_SECONDS = 1e-3  # what the event loop's clock and timers (uvloop's) may be off


class Cancel(Protocol):
    """How a stream tells the engine to end requests, for a reason or with an error to blame."""

    def __call__(
        self,
        requests: tuple[Request, ...],
        error: Exception | None = None,
        reason: FinishReason = FinishReason.CANCELLED,
    ) -> None:
        """End `requests` before the next outputs."""


class Unread:
    """The memory of what no reader has taken yet, of all streams together."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self.streams: set[Stream] = set()

    def largest(self) -> Stream:
        """Return the stream that holds most; there is one while bytes are unread."""
        return max(self.streams, key=lambda stream: stream.num_buffered_bytes)


def memory_of(output: RequestOutput) -> int:
    """Estimate the bytes that an output takes while it waits for its reader."""
    tokens = (*output.tokens, *output.prompt_logprobs)
    num_logprobs = sum(1 + len(token.top) for token in tokens if token.logprob is not None)
    return _TOKEN_BYTES * (1 + len(tokens)) + _LOGPROB_BYTES * num_logprobs


class Stream:
    """Outputs of one client's requests: `wait` for some, `take` what has piled up, or `close`.

    `wait` says False once the last output of the last request was taken. A reader may pause between
    the two.
    """

    def __init__(
        self, requests: Sequence[Request], cancel: Cancel, unread: Unread | None = None
    ) -> None:
        """`cancel` is called by `close` and `give_up` while live; `unread` counts all streams."""
        self.requests = tuple(requests)
        self.num_buffered_tokens = self.num_buffered_bytes = 0
        self.full_since: int | None = None
        self.is_aborted = False
        self._cancel = cancel
        self._closed = self._has_begun = False
        self._num_live = len(self.requests)
        self._unread = unread or Unread()
        self._given_up = False
        self._buffer: deque[tuple[RequestOutput, int]] = deque()
        self._arrived = asyncio.Event()
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def is_live(self) -> bool:
        """Whether the engine still works for it."""
        return self._num_live > 0

    @property
    def slowest_request(self) -> Request:
        """The completion that ended last; its phases stand for the whole stream."""
        return max(self.requests, key=lambda request: request.times.finished or 0)

    def deliver(self, output: RequestOutput) -> None:
        """Add one output; after `close` only the ends are counted.

        Unless an answer can begin or end with it, the reader does not learn of it before `wake`.
        """
        begins = not self._has_begun or bool(output.prompt_logprobs)
        is_urgent = begins or output.finish_reason is not None
        self._has_begun = True
        if output.finish_reason is not None:
            self._num_live -= 1
            self.is_aborted |= output.finish_reason not in (FinishReason.STOP, FinishReason.LENGTH)
        if not self._closed and not (self._given_up and output.finish_reason is None):
            num_bytes = memory_of(output)
            self._buffer.append((output, num_bytes))
            self.num_buffered_tokens += len(output.tokens)
            self._count(num_bytes)
        if is_urgent:
            self.wake()
        if not self.is_live:
            self._ended.set_result(None)

    @property
    def has_news(self) -> bool:
        """Whether there is something to take that the reader does not know of."""
        return bool(self._buffer) and not self._arrived.is_set()

    def wake(self) -> None:
        """Let the reader take what there is, if anything."""
        if self._buffer:
            self._arrived.set()

    async def wait(self) -> bool:
        """Wait for a reason to take what there is; False once everything has been taken."""
        if not self._buffer and not self.is_live:
            return False
        await self._arrived.wait()
        return True

    def take(self) -> list[RequestOutput]:
        """Take the oldest outputs, as many as one message brings; the rest is there at once."""
        outputs: list[RequestOutput] = []
        taken_bytes = 0
        while self._buffer and taken_bytes < MAX_TAKEN_BYTES:
            output, num_bytes = self._buffer.popleft()
            outputs.append(output)
            taken_bytes += num_bytes
            self.num_buffered_tokens -= len(output.tokens)
        self._count(-taken_bytes)
        if not self._buffer:
            self._arrived.clear()
        self.full_since = None
        return outputs

    def give_up(self, error: Exception) -> None:
        """Drop what is unread, and let the reader find `error` there, also after the last token."""
        self._given_up = True
        self._drop()
        end = RequestOutput(self.requests[0], finish_reason=FinishReason.ERROR, error=error)
        self._buffer.append((end, 0))
        self.wake()
        if self.is_live:
            self._cancel(self.requests, error)

    def when_ended(self, callback: Callable[[Stream], None]) -> None:
        """Call `callback` once the engine has let go of every request: their blocks are free."""
        self._ended.add_done_callback(lambda _: callback(self))

    def close(self, reason: FinishReason = FinishReason.CANCELLED) -> None:
        """Stop reading: what is live ends for `reason`, what is buffered is dropped. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._drop()
        if self.is_live:
            self._cancel(self.requests, reason=reason)

    def _drop(self) -> None:
        self._buffer.clear()
        self.num_buffered_tokens = 0
        self._count(-self.num_buffered_bytes)

    def _count(self, num_bytes: int) -> None:
        self.num_buffered_bytes += num_bytes
        self._unread.num_bytes += num_bytes
        if self.num_buffered_bytes:
            self._unread.streams.add(self)
        else:
            self._unread.streams.discard(self)


class Streams:
    """Every stream the engine still works for, by request.

    Routes outputs, paces how often readers are woken, and ends those that are slow.
    """

    def __init__(self, cancel: Cancel, patience: Patience, max_messages_per_second: float) -> None:
        """`patience` is with readers; what is brought at once does not count as a message."""
        self._cancel = cancel
        self._max_buffered_tokens = patience.buffered_tokens
        self._max_buffered_bytes = patience.buffered_bytes
        self._unread = Unread()
        self._reader_nanoseconds = int(patience.reader_seconds * 1e9)
        self._max_messages_per_second = max_messages_per_second
        self._streams: dict[Request, Stream] = {}
        self._unaware: dict[Stream, None] = {}  # whose readers have not been woken for all there is
        self._due = 0.0  # when they may be, on the event loop's clock
        self._timer: asyncio.TimerHandle | None = None
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def is_empty(self) -> bool:
        """Whether the engine works for nobody."""
        return not self._streams

    def open(self, requests: Sequence[Request]) -> Stream:
        """A stream for requests that the engine has just taken."""
        stream = Stream(requests, self._cancel, self._unread)
        self._streams.update(dict.fromkeys(requests, stream))
        self._empty.clear()
        return stream

    def deliver(self, outputs: Sequence[RequestOutput]) -> None:
        """Route a step's outputs to their streams, and wake the readers if it is time."""
        for output in outputs:
            stream = self._streams.get(output.request)
            if stream is None:  # abandoned
                continue
            stream.deliver(output)
            if output.finish_reason is not None:
                del self._streams[output.request]
            if stream.num_buffered_tokens > self._max_buffered_tokens:
                stream.wake()  # what the pace holds back is not unread
                self._check_reader(stream)
            if self._unread.num_bytes > self._max_buffered_bytes:
                largest = self._unread.largest()
                left = f"{largest.num_buffered_bytes} bytes were left unread"
                largest.give_up(StalledReaderError(left))
            if stream.has_news:
                self._unaware[stream] = None
            else:
                self._unaware.pop(stream, None)
        if not self._streams:
            self._empty.set()
        if not self._unaware or self._timer is not None:
            return
        loop = asyncio.get_running_loop()
        if loop.time() + _TICK_SECONDS < self._due:
            self._timer = loop.call_at(self._due, self._wake)
        else:
            self._wake()

    def cancel_all(self, error: Exception) -> None:
        """Have the engine end everything with `error`."""
        self._cancel(tuple(self._streams), error)

    def abandon(self, error: Exception) -> None:
        """End every stream from here, because the engine cannot any more."""
        self.deliver(
            [
                RequestOutput(request, finish_reason=FinishReason.ERROR, error=error)
                for request in self._streams
            ]
        )

    async def wait_empty(self) -> None:
        """Wait until every request has ended."""
        await self._empty.wait()

    def _wake(self) -> None:
        """Wake the readers; the next time is when as many messages may have been sent."""
        unaware, self._unaware, self._timer = self._unaware, {}, None
        seconds = len(unaware) / self._max_messages_per_second
        now = asyncio.get_running_loop().time()
        self._due = max(self._due, now - _TICK_SECONDS) + seconds
        for stream in unaware:
            stream.wake()

    def _check_reader(self, stream: Stream) -> None:
        now = time.monotonic_ns()
        if stream.full_since is None:
            stream.full_since = now
        elif now - stream.full_since > self._reader_nanoseconds:
            error = StalledReaderError(f"{stream.num_buffered_tokens} tokens were left unread")
            self._cancel(stream.requests, error)
