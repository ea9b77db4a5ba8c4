"""Background tasks that have an owner: failures are logged, and tasks that must run start again.

A task that nobody awaits would keep its exception to itself until the process ends.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

import structlog

MIN_DELAY_SECONDS: Final = 0.1
MAX_DELAY_SECONDS: Final = 10.0

log = structlog.get_logger(__name__)
# asyncio itself holds tasks weakly
_running: set[asyncio.Task[Any]] = set()

Report = Callable[[str, bool], None]


def start(name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """Starts a task that ends by itself; an exception of it is logged."""
    task = asyncio.get_running_loop().create_task(work, name=name)
    _running.add(task)
    task.add_done_callback(_ended)
    return task


def keep_running(
    name: str,
    work: Callable[[], Awaitable[None]],
    report: Report,
    *,
    min_delay: float = MIN_DELAY_SECONDS,
    max_delay: float = MAX_DELAY_SECONDS,
) -> asyncio.Task[None]:
    """Starts a task that runs `work` until it is cancelled.

    Where `work` raises, or returns, that is logged, `report(name, True)` is called, and `work`
    starts again after a delay that doubles up to `max_delay`. Once it has run for longer than the
    delay before it, `report(name, False)` is called and the next delay is the shortest again.
    """
    return start(name, _keep_running(name, work, report, min_delay, max_delay))


async def _keep_running(
    name: str,
    work: Callable[[], Awaitable[None]],
    report: Report,
    min_delay: float,
    max_delay: float,
) -> None:
    loop = asyncio.get_running_loop()
    delay = min_delay
    is_failing = False

    def recovered() -> None:
        nonlocal delay, is_failing
        delay, is_failing = min_delay, False
        log.info("background task runs again", task=name)
        report(name, False)

    while True:
        timer = loop.call_later(delay, recovered) if is_failing else None
        try:
            await work()
            log.error("background task ended", task=name, retry_seconds=delay)
        except Exception as error:
            log.error("background task failed", task=name, retry_seconds=delay, exc_info=error)
        finally:
            if timer is not None:
                timer.cancel()
        is_failing = True
        report(name, True)
        await asyncio.sleep(delay)
        delay = min(2 * delay, max_delay)


def _ended(task: asyncio.Task[Any]) -> None:
    _running.discard(task)
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("background task failed", task=task.get_name(), exc_info=error)
