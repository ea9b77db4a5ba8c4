"""Who waits, and whose turn it is: priority, then who ran before, then fairness, then arrival.

Within a priority tenants take turns by what they have been served (virtual token counter,
arXiv:2401.00588): the one with the fewest tokens is next. Nobody saves turns up: a tenant that
begins to wait is lifted to the level of the one that was served last.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from nanoinfer_engine.core.request import Request

# Counters of tenants that do not wait are dropped beyond this number; a tenant's name is free text.
MAX_COUNTERS = 4096

_Line = tuple[int, str]  # priority and tenant


def _arrival(request: Request) -> int:
    return request.arrival_number


class WaitingQueue:
    """The waiting requests: one line, in order of arrival, for each priority and tenant."""

    def __init__(self) -> None:
        """Start empty."""
        self.num_prompt_tokens = 0
        self.num_bytes = 0
        self._num_requests = 0
        self._lines: dict[_Line, list[Request]] = {}
        self._served: dict[_Line, int] = {}  # tokens
        self._levels: dict[int, int] = {}  # by priority: what the line served last had, then

    def __len__(self) -> int:
        """Requests that wait."""
        return self._num_requests

    def __iter__(self) -> Iterator[Request]:
        """Every waiting request, line by line."""
        for line in self._lines.values():
            yield from line

    def __contains__(self, request: Request) -> bool:
        """Whether it waits."""
        line = self._lines.get(request.line, [])
        index = bisect_left(line, request.arrival_number, key=_arrival)
        return index < len(line) and line[index] is request

    @property
    def first(self) -> Request:
        """Whose turn it is; raises ValueError where nobody waits."""
        return min((line[0] for line in self._lines.values()), key=self._turn)

    def add(self, request: Request) -> None:
        """Let a request wait, for the first time or again."""
        key = request.line
        if key not in self._lines:
            self._lines[key] = []
            level = self._levels.get(request.priority, 0)
            self._served[key] = max(self._served.get(key, 0), level)
            self._drop_counters()
        insort(self._lines[key], request, key=_arrival)
        self._count(request, 1)

    def remove(self, request: Request) -> None:
        """Take a waiting request out."""
        key = request.line
        line = self._lines[key]
        del line[bisect_left(line, request.arrival_number, key=_arrival)]
        if not line:
            del self._lines[key]
        self._count(request, -1)

    def take(self, request: Request) -> None:
        """Take a request out because it starts."""
        served, level = self._served[request.line], self._levels.get(request.priority, 0)
        self._levels[request.priority] = max(level, served)
        self.remove(request)

    def charge(self, request: Request, num_tokens: int) -> None:
        """Count tokens that were computed for a request against its tenant."""
        self._served[request.line] = self._served.get(request.line, 0) + num_tokens

    def _turn(self, request: Request) -> tuple[int, bool, int, int]:
        has_not_run = request.times.scheduled is None
        served = self._served[request.line]
        return (-request.priority, has_not_run, served, request.arrival_number)

    def _count(self, request: Request, sign: int) -> None:
        self._num_requests += sign
        self.num_prompt_tokens += sign * len(request.prompt_token_ids)
        self.num_bytes += sign * request.num_bytes

    def _drop_counters(self) -> None:
        if len(self._served) > MAX_COUNTERS:
            self._served = {key: self._served[key] for key in self._lines}
