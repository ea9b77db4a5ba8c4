"""Work off the event loop: small thread pools with bounds, measured from the outside.

tiktoken and the `tokenizers` library release the interpreter's lock, so a few threads suffice. No
call into them can be interrupted: what is long has threads of its own.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import takewhile
from typing import Final, TypeVar

from nanoinfer_common import errors, names
from nanoinfer_common.metrics import RPC_BUCKETS
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

# More text than this is long: to encode as much as this takes some 10 ms at worst.
LONG_CHARACTERS: Final = 16_384
_RETRY_SECONDS = 0.2

T = TypeVar("T")


class Metrics:
    """The tokenizer's metrics, in a registry of their own."""

    def __init__(self) -> None:
        """Registers them."""
        self.registry = CollectorRegistry()
        registry = self.registry
        fine = (0.0001, 0.0005, 0.001, *RPC_BUCKETS)
        self.inflight = Gauge(
            "nanoinfer_tokenizer_inflight",
            "Requests waiting or worked on.",
            registry=registry,
        )
        self.queue = Histogram(
            "nanoinfer_tokenizer_queue_seconds",
            "Wait for a turn.",
            buckets=fine,
            registry=registry,
        )
        self.encode = Histogram(
            "nanoinfer_tokenizer_encode_seconds", "Time to encode.", buckets=fine, registry=registry
        )
        self.encoded_tokens = Counter(
            "nanoinfer_tokenizer_encoded_tokens", "Ids made of text.", registry=registry
        )
        self.decode_streams = Gauge(
            "nanoinfer_tokenizer_decode_streams", "Open decode streams.", registry=registry
        )


class WorkError(RuntimeError):
    """Work ended with something that is no Exception, such as a panic in native code."""


class WorkPool:
    """Runs functions in threads, long ones apart from short ones, which so never wait for them.

    In each of the two lanes `num_threads` work, and at most `max_pending` calls wait or are worked
    on; more are refused at once.
    """

    def __init__(self, num_threads: int, max_pending: int, metrics: Metrics) -> None:
        """Makes the pool; its threads start with the first work."""
        self._short = _Lane("tokenizer-short", num_threads, max_pending)
        self._long = _Lane("tokenizer-long", num_threads, max_pending)
        self._metrics = metrics

    async def run(self, work: Callable[[], T], num_characters: int) -> T:
        """Gives `work`'s result. Raises what it raises, and RESOURCE_EXHAUSTED at the bound.

        `num_characters` tells how much it has to do.
        """
        (result,) = await self.run_all([work], num_characters)
        return result

    async def run_all(self, works: Iterable[Callable[[], T]], num_characters: int) -> list[T]:
        """Gives the results of `works`, done one after the other; otherwise the same as `run`.

        Where the call ends early, by its deadline or a cancel, the works not begun are dropped.
        """
        lane = self._long if num_characters > LONG_CHARACTERS else self._short
        submitted = time.perf_counter()
        has_ended = False

        def measured() -> list[T]:
            self._metrics.queue.observe(time.perf_counter() - submitted)
            try:
                return [work() for work in takewhile(lambda _: not has_ended, works)]
            except Exception:
                raise
            except BaseException as panic:
                # A thread has nothing to interrupt or exit; this is native code that panicked.
                raise WorkError(repr(panic)) from panic

        with lane.place(), self._metrics.inflight.track_inprogress():
            try:
                return await asyncio.get_running_loop().run_in_executor(lane.executor, measured)
            finally:
                has_ended = True

    def close(self) -> None:
        """Drops what has not begun and waits for what has."""
        for lane in (self._short, self._long):
            lane.executor.shutdown(cancel_futures=True)


class _Lane:
    """A set of threads and the number of calls that wait for one or have one."""

    def __init__(self, name: str, num_threads: int, max_pending: int) -> None:
        self.executor = ThreadPoolExecutor(num_threads, thread_name_prefix=name)
        self._max_pending = max_pending
        self._num_pending = 0

    @contextmanager
    def place(self) -> Iterator[None]:
        """Counts a call while it is under way."""
        if self._num_pending >= self._max_pending:
            raise errors.exhausted(names.QUEUE_FULL, "the tokenizer is busy", _RETRY_SECONDS)
        self._num_pending += 1
        try:
            yield
        finally:
            self._num_pending -= 1
