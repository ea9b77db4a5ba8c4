"""Whether there is anything behind the gateway: at least one tokenizer and one engine that serve.

The tokenizers' side is the state of their channel, whose client-side health checks make it READY
only while one of them reports SERVING; the engines' side comes from their load reports.
"""

import asyncio
from collections.abc import Callable

import grpc


class Readiness:
    """Follows both sides; `on_change` is told each change, of which the first is to ready."""

    def __init__(
        self,
        tokenizers: grpc.aio.Channel,
        any_engine: Callable[[], bool],
        on_change: Callable[[bool], None],
    ) -> None:
        self._tokenizers = tokenizers
        self._any_engine = any_engine
        self._on_change = on_change
        self._any_tokenizer = False
        self._is_ready = False
        self._watcher: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to follow the tokenizers' channel, which connects it."""
        self._watcher = asyncio.create_task(self._watch_tokenizers())

    async def stop(self) -> None:
        """End that."""
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)

    def update(self) -> None:
        """Look at both sides; called whenever the engines' side may have changed."""
        is_ready = self._any_tokenizer and self._any_engine()
        if is_ready != self._is_ready:
            self._is_ready = is_ready
            self._on_change(is_ready)

    async def _watch_tokenizers(self) -> None:
        while True:
            state = self._tokenizers.get_state(try_to_connect=True)
            if state is grpc.ChannelConnectivity.READY:
                self._any_tokenizer = True
            elif state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                self._any_tokenizer = False
            self.update()
            await self._tokenizers.wait_for_state_change(state)
