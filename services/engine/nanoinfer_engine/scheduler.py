"""Who runs in the next step, and what a step's results mean: policy alone, no torch, no threads.

There are no prefill and decode phases. A request has known tokens (prompt, then completion) and
computed ones; a step grants it n more of those that are pending. Chunked prefill is a grant smaller
than what is pending, decoding is a pending count of 1, and preemption sets the computed count back
to 0 and lets the same rule run again. Once everything known is computed, the row samples.

Order is one key everywhere: higher priority first, then arrival. The first in that order is never
preempted, so it always ends, and so does everybody behind it.
"""

from __future__ import annotations

import time
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from nanoinfer_engine.batch import Batch, BatchRow, RowResult, ScoredPrompt
from nanoinfer_engine.blocks import BlockPool
from nanoinfer_engine.capacity import Capacity, Load
from nanoinfer_engine.config import EngineConfig
from nanoinfer_engine.request import FinishReason, Request, RequestOutput, SampledToken


@dataclass
class _Plan:
    """The step being planned: tokens granted to each request, and what is left to grant."""

    budget: int
    grants: dict[Request, int] = field(default_factory=dict)

    def grant(self, request: Request, num_tokens: int) -> None:
        self.grants[request] = num_tokens
        self.budget -= num_tokens

    def revoke(self, request: Request) -> None:
        self.budget += self.grants.pop(request, 0)


def _order(request: Request) -> tuple[int, int]:
    return (-request.priority, request.arrival_number)


class Scheduler:
    """Owns the waiting queue, the running set and the block pool. For one thread alone."""

    def __init__(
        self,
        config: EngineConfig,
        capacity: Capacity,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """Own as many blocks as `capacity` holds; `clock` gives monotonic nanoseconds."""
        if config.max_batch_requests > config.max_batch_tokens:
            raise ValueError("max_batch_requests may not exceed max_batch_tokens")
        self.capacity = capacity
        self.num_preemptions = 0
        self._config = config
        self._clock = clock
        self._pool = BlockPool(capacity.kv_tokens // config.block_size)
        self._waiting: list[Request] = []  # in order
        self._waiting_prompt_tokens = 0
        self._running: dict[Request, None] = {}  # a set that keeps its order
        # the requests behind the rows of each batch that is not updated yet, the oldest first
        self._in_flight: deque[tuple[Request, ...]] = deque()
        self._num_arrived = 0

    @property
    def has_work(self) -> bool:
        """Whether `schedule` would return a batch."""
        return bool(self._running or self._waiting)

    @property
    def load(self) -> Load:
        """How busy the scheduler is now."""
        return Load(
            len(self._running), len(self._waiting), self._waiting_prompt_tokens, self._pool.usage
        )

    def add(self, request: Request) -> None:
        """Queue a request; raises CapacityError if it could never run to its end."""
        self.capacity.check(len(request.prompt_token_ids), request.stopping.max_tokens)
        self._num_arrived += 1
        request.arrival_number = self._num_arrived
        request.num_waiting_at_arrival = len(self._waiting)
        self._enqueue(request)

    def cancel(self, request: Request, error: Exception | None = None) -> RequestOutput | None:
        """End a request now, with `error` if one is to blame; None if it has ended already."""
        reason = FinishReason.ERROR if error else FinishReason.CANCELLED
        if request not in self._running and not self._is_waiting(request):
            return None
        return self._end(request, reason, error=error)

    def fail_running(self, error: Exception) -> list[RequestOutput]:
        """End everything that has been granted tokens, because a step failed as a whole."""
        self._in_flight.clear()
        for request in self._waiting:
            request.num_unread_tokens = 0  # preempted since: the token will be sampled again
        return [self._end(r, FinishReason.ERROR, error=error) for r in tuple(self._running)]

    def expire(self) -> list[RequestOutput]:
        """End every request, waiting or running, whose deadline has passed."""
        now = self._clock()
        late = [
            request
            for request in (*self._running, *self._waiting)
            if request.deadline is not None and request.deadline <= now
        ]
        return [self._end(request, FinishReason.DEADLINE) for request in late]

    def schedule(self) -> Batch | None:
        """Plan one step; None where there is nothing to do.

        Running requests come first, decodes before prefills, so that streams keep flowing; what is
        left of the budget admits from the queue, unless somebody had to give blocks up just now.
        May be called again before `update`, once: rows then continue from ids not yet known.
        """
        plan = _Plan(self._config.max_batch_tokens)
        if not self._grant_running(plan):
            self._admit_waiting(plan)
        if not plan.grants:
            return None
        last = self._in_flight[-1] if self._in_flight else ()
        places = {request: row for row, request in enumerate(last)}
        rows = tuple(self._row(r, n, places.get(r)) for r, n in plan.grants.items())
        self._in_flight.append(tuple(plan.grants))
        for request, row in zip(plan.grants, rows, strict=True):
            request.num_in_flight_tokens += row.num_tokens
            request.num_unread_tokens += row.samples
            request.may_run_ahead = row.is_plain
            request.num_steps += 1
            request.num_prefill_chunks += request.times.first_token is None
            request.max_batch_size = max(request.max_batch_size, len(plan.grants))
        return Batch(rows)

    def update(self, batch: Batch, results: Sequence[RowResult]) -> list[RequestOutput]:
        """Take a step's results: append, detect the end, free. A row that failed ends alone.

        Steps are updated in the order of their schedule. Rows whose request has ended since are
        skipped; one that was preempted since gets its token all the same.
        """
        now = self._clock()
        outputs = []
        for request, row, result in zip(
            self._in_flight.popleft(), batch.rows, results, strict=True
        ):
            if request.times.finished is not None:
                continue
            request.num_unread_tokens -= row.samples
            if request in self._running:
                request.num_in_flight_tokens -= row.num_tokens
                request.num_computed_tokens += row.num_tokens
            if isinstance(result, ScoredPrompt):
                request.prompt_logprobs[row.start :] = result.tokens
                result = result.sampled
            if isinstance(result, Exception):
                outputs.append(self._end(request, FinishReason.ERROR, error=result))
            elif isinstance(result, SampledToken):
                is_first = not request.completion_token_ids
                output = self._append(request, result, now)
                if is_first and request.prompt_logprobs:
                    output = replace(output, prompt_logprobs=tuple(request.prompt_logprobs))
                outputs.append(output)
        return outputs

    def _grant_running(self, plan: _Plan) -> bool:
        """Grant what is pending in running requests; returns whether one was preempted."""
        num_running = len(self._running)
        for request in sorted(self._running, key=lambda r: (r.num_pending_tokens > 1, *_order(r))):
            if request not in self._running or plan.budget == 0 or not request.can_go_on:
                continue
            num_tokens = min(request.num_pending_tokens, plan.budget)
            if self._reserve(request, request.num_granted_tokens + num_tokens, plan):
                plan.grant(request, num_tokens)
        return len(self._running) < num_running

    def _reserve(self, request: Request, num_tokens: int, plan: _Plan) -> bool:
        """Give `request` blocks for `num_tokens`, preempting the last in order while none are free.

        Returns False if the request itself was the last and had to go.
        """
        missing = self._num_blocks(num_tokens) - len(request.block_ids)
        while missing > self._pool.num_free:
            victim = max(self._running, key=_order)
            plan.revoke(victim)
            self._preempt(victim)
            if victim is request:
                return False
        self._allocate(request, missing)
        return True

    def _admit_waiting(self, plan: _Plan) -> None:
        """Start requests from the head of the queue while budget, rows and blocks last.

        All known tokens get their blocks at once: a prefill that has begun cannot run out half-way.
        One free block for each running request is left, so that the newcomer is not preempted by
        its elders' next tokens.
        """
        while (
            self._waiting and plan.budget and len(self._running) < self._config.max_batch_requests
        ):
            request = self._waiting[0]
            needed = self._num_blocks(request.num_tokens)
            if needed + len(self._running) > self._pool.num_free and self._running:
                return
            self._dequeue(request)
            self._running[request] = None
            self._allocate(request, needed)
            now = self._clock()
            if request.times.scheduled is None:
                request.times.scheduled = now
            else:
                request.add_event("resumed", now)
            plan.grant(request, min(request.num_pending_tokens, plan.budget))

    def _row(self, request: Request, num_tokens: int, last_row: int | None) -> BatchRow:
        """`last_row` is the request's in the step before, if that is still in flight."""
        start = request.num_granted_tokens
        stop = start + num_tokens
        return BatchRow(
            token_ids=request.tokens(start, stop),
            start=start,
            block_ids=tuple(request.block_ids[: self._num_blocks(stop)]),
            samples=stop == request.num_tokens + request.num_unread_tokens,
            sampling=request.sampling,
            masked_token_ids=request.stopping.masked_token_ids(
                len(request.completion_token_ids) + request.num_unread_tokens
            ),
            source_row=last_row if stop > request.num_tokens else None,
            token_counts=request.token_counts,
            scored_token_ids=request.scored_token_ids(start, stop),
        )

    def _append(self, request: Request, sampled: SampledToken, now: int) -> RequestOutput:
        """Add a token to its request and end the request if this token does."""
        times, stopping = request.times, request.stopping
        if times.first_token is None:
            times.first_token = now
        if times.last_token is not None:
            times.token_gap = now - times.last_token
        times.last_token = now
        request.append(sampled.token_id)
        is_stop_id = sampled.token_id in stopping.stop_token_ids
        if is_stop_id or sampled.token_id in stopping.eos_token_ids:
            visible = (sampled,) if is_stop_id and stopping.include_stop_token else ()
            return self._end(request, FinishReason.STOP, visible, stop_token_id=sampled.token_id)
        if len(request.completion_token_ids) >= stopping.max_tokens:
            return self._end(request, FinishReason.LENGTH, (sampled,))
        return RequestOutput(request, (sampled,))

    def _end(
        self,
        request: Request,
        reason: FinishReason,
        tokens: tuple[SampledToken, ...] = (),
        *,
        stop_token_id: int | None = None,
        error: Exception | None = None,
    ) -> RequestOutput:
        """Take a live request out, wherever it is, with all its blocks."""
        if request in self._running:
            del self._running[request]
        else:
            self._dequeue(request)
        self._release(request)
        request.times.finished = self._clock()
        return RequestOutput(request, tokens, reason, stop_token_id, error)

    def _preempt(self, request: Request) -> None:
        """Take a request's blocks; its arrival puts it back at the head of its class."""
        del self._running[request]
        self._release(request)
        request.num_computed_tokens = request.num_in_flight_tokens = 0
        request.num_preemptions += 1
        self.num_preemptions += 1
        request.add_event("preempted", self._clock())
        self._enqueue(request)

    def _enqueue(self, request: Request) -> None:
        insort(self._waiting, request, key=_order)
        self._waiting_prompt_tokens += len(request.prompt_token_ids)

    def _dequeue(self, request: Request) -> None:
        del self._waiting[bisect_left(self._waiting, _order(request), key=_order)]
        self._waiting_prompt_tokens -= len(request.prompt_token_ids)

    def _is_waiting(self, request: Request) -> bool:
        index = bisect_left(self._waiting, _order(request), key=_order)
        return index < len(self._waiting) and self._waiting[index] is request

    def _allocate(self, request: Request, count: int) -> None:
        if count > 0:
            request.block_ids.extend(self._pool.allocate(count, owner=request))
            request.max_blocks = max(request.max_blocks, len(request.block_ids))

    def _release(self, request: Request) -> None:
        self._pool.free(request.block_ids, owner=request)
        request.block_ids.clear()

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._config.block_size)
