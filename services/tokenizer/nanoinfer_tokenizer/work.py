"""Work off the event loop: a small thread pool with a bound, measured from the outside.

tiktoken and the `tokenizers` library release the interpreter's lock, so a few threads suffice.
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from nanoinfer_common import errors, names
from nanoinfer_common.metrics import RPC_BUCKETS
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

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
    """Runs functions in threads. At most `max_pending` wait or run; more are refused at once."""

    def __init__(self, num_threads: int, max_pending: int, metrics: Metrics) -> None:
        """Makes the pool; its threads start with the first work."""
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix="tokenizer")
        self._max_pending = max_pending
        self._num_pending = 0
        self._metrics = metrics

    async def run(self, work: Callable[[], T]) -> T:
        """Gives `work`'s result. Raises what it raises, and RESOURCE_EXHAUSTED at the bound."""
        if self._num_pending >= self._max_pending:
            raise errors.exhausted(names.QUEUE_FULL, "the tokenizer is busy", _RETRY_SECONDS)
        submitted = time.perf_counter()

        def measured() -> T:
            self._metrics.queue.observe(time.perf_counter() - submitted)
            try:
                return work()
            except Exception:
                raise
            except BaseException as panic:
                # A thread has nothing to interrupt or exit; this is native code that panicked.
                raise WorkError(repr(panic)) from panic

        self._num_pending += 1
        self._metrics.inflight.inc()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, measured)
        finally:
            self._num_pending -= 1
            self._metrics.inflight.dec()

    def close(self) -> None:
        """Drops what has not begun and waits for what has."""
        self._executor.shutdown(cancel_futures=True)
