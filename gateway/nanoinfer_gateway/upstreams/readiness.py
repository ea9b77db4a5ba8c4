"""Whether the gateway is ready: at least one tokenizer and one engine behind it serve."""

from collections.abc import Callable


class Readiness:
    """Follows both sides; `on_change` is told each change, of which the first is to ready."""

    def __init__(
        self,
        any_tokenizer: Callable[[], bool],
        any_engine: Callable[[], bool],
        on_change: Callable[[bool], None],
    ) -> None:
        self._any_tokenizer = any_tokenizer
        self._any_engine = any_engine
        self._on_change = on_change
        self._is_ready = False

    def update(self) -> None:
        """Look at both sides; called whenever one of them may have changed."""
        is_ready = self._any_tokenizer() and self._any_engine()
        if is_ready != self._is_ready:
            self._is_ready = is_ready
            self._on_change(is_ready)
