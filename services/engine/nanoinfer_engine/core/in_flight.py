"""Accounting of launched steps whose results nobody has read yet.

A launched step will compute tokens of its requests and sample ids for some of them. Until it ends
both count as the request's, so that the next step can be planned; this class alone changes those
two numbers of a request. A row that samples is counted as one id: of a request that may get several
no second step is in flight, so nothing is planned by that number.

    launch ──▶ num_in_flight_tokens + n, num_unread_tokens + 1 where the row samples
    end    ──▶ both back; what was computed joins num_computed_tokens, the id is known
    preempt    the blocks are gone, so what is being computed is lost; the id is still to come
    lose       no launched step will give anything: ids that were to be sampled come anew
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

from nanoinfer_engine.core.batch import BatchRow
from nanoinfer_engine.core.request import Request


class InFlight:
    """Launched steps, the oldest first: tokens granted to each request, and rows that sample."""

    def __init__(self) -> None:
        """Nothing is launched."""
        self._steps: deque[dict[Request, int]] = deque()

    def launch(self, grants: Mapping[Request, int], rows: Sequence[BatchRow]) -> None:
        """Count a step's grants; its rows are in their order."""
        for (request, num_tokens), row in zip(grants.items(), rows, strict=True):
            request.num_in_flight_tokens += num_tokens
            request.num_unread_tokens += row.samples
        self._steps.append(dict(grants))

    def last_rows(self) -> dict[Request, int]:
        """The row of each request in the step that was launched last, where that has not ended."""
        last = self._steps[-1] if self._steps else {}
        return {request: row for row, request in enumerate(last)}

    def end(self, rows: Sequence[BatchRow]) -> list[Request]:
        """End the oldest step; returns the requests of its rows, in their order."""
        granted = self._steps.popleft()
        for (request, num_tokens), row in zip(granted.items(), rows, strict=True):
            request.num_unread_tokens -= row.samples
            request.num_in_flight_tokens -= num_tokens
            request.num_computed_tokens += num_tokens
        return list(granted)

    def preempt(self, request: Request) -> None:
        """Forget what is computed and being computed for a request that loses its blocks."""
        request.num_computed_tokens = request.num_in_flight_tokens = 0
        for step in self._steps:
            if request in step:
                step[request] = 0

    def lose(self) -> None:
        """Forget all launched steps."""
        for step in self._steps:
            for request in step:
                request.num_in_flight_tokens = request.num_unread_tokens = 0
        self._steps.clear()
