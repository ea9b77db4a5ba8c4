"""Who runs in the next step, and what a step's results mean: policy alone, no torch, no threads.

There are no prefill and decode phases. A request has known tokens (prompt, then completion) and
computed ones; a step grants it n more of those that are pending. Chunked prefill is a grant smaller
than what is pending, decoding is a pending count of 1, and preemption sets the computed count back
to 0 and lets the same rule run again. Once everything known is computed, the row samples.

Running requests have one order: higher priority first, then arrival. The first in that order is
never preempted but for a higher priority, so it ends, and so does everybody behind it. `queue` says
whose turn it is to start, `blocks` which blocks can be had, `in_flight` what launched steps will
give.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter

from nanoinfer_engine.core.batch import Batch, BatchRow, RowResult, ScoredPrompt, StepKind
from nanoinfer_engine.core.blocks import BlockTables
from nanoinfer_engine.core.capacity import Capacity, Load
from nanoinfer_engine.core.config import EngineConfig
from nanoinfer_engine.core.errors import QueueTimeoutError, RowError
from nanoinfer_engine.core.in_flight import InFlight
from nanoinfer_engine.core.queue import WaitingQueue
from nanoinfer_engine.core.request import FinishReason, Request, RequestOutput, SampledToken

# Steps that went well, after which a step may be twice as large again.
_STEPS_TO_GROW = 256
ORDER = attrgetter("order")


@dataclass
class Plan:
    """Tokens granted to each request, and what is left to grant."""

    budget: int
    grants: dict[Request, int] = field(default_factory=dict)

    def grant(self, request: Request, num_tokens: int) -> None:
        """Grant tokens to a request that has none yet."""
        self.grants[request] = num_tokens
        self.budget -= num_tokens

    def cap(self, max_tokens: int) -> None:
        """Let the step have no more tokens in all, but for those that are granted already."""
        self.budget = min(self.budget, max(max_tokens - sum(self.grants.values()), 0))

    def revoke(self, request: Request) -> None:
        """Take back what the request was granted, if anything."""
        self.budget += self.grants.pop(request, 0)


class StepLimit:
    """Most tokens of a step: the setting's, or less for a while after memory ran out."""

    def __init__(self, max_batch_tokens: int) -> None:
        """Begin with `max_batch_tokens`, which is never exceeded."""
        self.num_tokens = max_batch_tokens
        self._most = max_batch_tokens
        self._num_good_steps = 0

    def shrink(self) -> bool:
        """Halve; False where a step cannot be smaller."""
        self._num_good_steps = 0
        self.num_tokens //= 2
        if self.num_tokens:
            return True
        self.num_tokens = 1
        return False

    def record_success(self) -> None:
        """A step went well."""
        self._num_good_steps += 1
        if self._num_good_steps % _STEPS_TO_GROW == 0:
            self.num_tokens = min(self._most, 2 * self.num_tokens)


class Scheduler:
    """Owns the waiting queue, the running set and the block pool. For one thread alone."""

    def __init__(
        self,
        config: EngineConfig,
        capacity: Capacity,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """Own as many blocks as `capacity` holds; `clock` gives monotonic nanoseconds."""
        if config.max_batch_requests > config.mixed_step_tokens:
            raise ValueError("max_batch_requests may not exceed max_batch_tokens, max_mixed_tokens")
        self.capacity = capacity
        self.num_preemptions = 0
        self._config = config
        self._clock = clock
        self._tables = BlockTables(
            capacity.kv_tokens // config.block_size, config.block_size, config.prefix_caching
        )
        self._waiting = WaitingQueue()
        self._running: dict[Request, None] = {}  # a set that keeps its order
        self._in_flight = InFlight()
        self._started: list[Request] = []
        self._num_arrived = 0
        self._limit = StepLimit(config.max_batch_tokens)

    @property
    def has_work(self) -> bool:
        """Whether `schedule` would return a batch."""
        return bool(self._running or self._waiting)

    @property
    def load(self) -> Load:
        """How busy the scheduler is now."""
        waiting, num_running = self._waiting, len(self._running)
        prompt_tokens, num_bytes = waiting.num_prompt_tokens, waiting.num_bytes
        return Load(num_running, len(waiting), prompt_tokens, num_bytes, self._tables.usage)

    def add(self, request: Request) -> None:
        """Queue a request; raises CapacityError if it could never run to its end."""
        self.capacity.check(len(request.prompt_token_ids), request.stopping.max_tokens)
        self._num_arrived += 1
        request.arrival_number = self._num_arrived
        request.order = (-request.priority, self._num_arrived)
        request.num_waiting_at_arrival = len(self._waiting)
        self._waiting.add(request)

    def cancel(
        self,
        request: Request,
        error: Exception | None = None,
        reason: FinishReason = FinishReason.CANCELLED,
    ) -> RequestOutput | None:
        """End a request now for `reason`, or with `error`; None if it has ended already."""
        if request not in self._running and request not in self._waiting:
            return None
        return self._end(request, FinishReason.ERROR if error else reason, error)

    def take_started(self) -> list[Request]:
        """The requests that were granted their first tokens since the last call."""
        started, self._started = self._started, []
        return started

    def fail_running(self, error: Exception) -> list[RequestOutput]:
        """End everything that has been granted tokens, because a step failed as a whole."""
        self._in_flight.lose()
        return [self._end(r, FinishReason.ERROR, error) for r in tuple(self._running)]

    def retry_smaller(self) -> bool:
        """Take back a step that ran out of memory: preempt its rows, halve the steps to come.

        Returns False where a step cannot be smaller: then the step is lost.
        """
        if not self._limit.shrink():
            return False
        self._in_flight.lose()
        for request in tuple(self._running):
            self._tables.forget(request)
            self._preempt(request)
        return True

    def expire(self) -> list[RequestOutput]:
        """End requests whose deadline has passed, and those that waited too long to start at all.

        The first completion's wait stands for its siblings': they start after it.
        """
        now, seconds = self._clock(), self._config.max_queue_seconds
        live = (*self._running, *self._waiting)
        late = [r for r in live if r.deadline is not None and r.deadline <= now]
        outputs = [self._end(request, FinishReason.DEADLINE) for request in late]
        if seconds is None:
            return outputs
        oldest = now - int(seconds * 1e9)
        for request in tuple(self._waiting):
            times = request.times
            if times.scheduled is None and times.arrived < oldest and request.index == 0:
                error = QueueTimeoutError(seconds)
                outputs.append(self._end(request, FinishReason.ERROR, error))
        return outputs

    def schedule(self) -> Batch | None:
        """Plan one step; None where there is nothing to do.

        Decodes come first, so that streams keep flowing, then prefills and newcomers by priority.
        Nobody starts in a step in which somebody had to give blocks up for a decode.
        May be called once more before `update`: rows then go on from ids that nobody knows yet.
        """
        plan = Plan(self._limit.num_tokens)
        self._make_way()
        decodes, prefills = _split(self._running)
        may_start = self._grant_decodes(plan, decodes)
        for request in prefills:
            if may_start:
                self._start_waiting(plan, above=request.priority)
            if plan.budget and request in self._running:  # its blocks it has had from the start
                self._grant(plan, request)
        if may_start:
            self._start_waiting(plan)
        if not plan.grants:
            return None
        rows = _make_rows(plan.grants, self._config.block_size, self._in_flight.last_rows())
        self._in_flight.launch(plan.grants, rows)
        return Batch(rows)

    def update(
        self, batch: Batch, results: Sequence[RowResult], kind: StepKind = "eager"
    ) -> list[RequestOutput]:
        """Take a step's results: append, detect the end, free. A row that failed ends alone.

        The oldest step first. Rows whose request has ended since are skipped; one that was
        preempted since gets its token all the same.
        """
        now = self._clock()
        outputs: list[RequestOutput] = []
        ended = self._in_flight.end(batch.rows)
        for request, row, result in zip(ended, batch.rows, results, strict=True):
            if request not in self._running and request not in self._waiting:
                continue
            request.num_graph_replays += kind == "graph"
            num_before = len(request.completion_token_ids)
            try:
                output = _take_result(request, row, result, now)
            except Exception as error:
                outputs.append(self._end(request, FinishReason.ERROR, error))
                continue
            if output is None:
                continue
            self._waiting.charge(request, len(request.completion_token_ids) - num_before)
            if output.finish_reason is not None:
                self._take_out(request)
            outputs.append(output)
        self._limit.record_success()
        return outputs

    def _make_way(self) -> None:
        """Preempt lower priorities, the last in order first, if that lets the next one start.

        It cannot go back and forth: what was preempted never preempts its elders in priority.
        """
        if not self._waiting:
            return
        request = self._waiting.first
        lower = [r for r in self._running if r.priority < request.priority]
        # Those of at least its priority keep what they have, and would have to leave it enough.
        num_free = self._tables.num_free + sum(len(r.block_ids) for r in lower)
        num_staying = len(self._running) - len(lower)
        if not lower or self._tables.num_needed(request) + num_staying > num_free:
            return
        for victim in sorted(lower, key=ORDER, reverse=True):
            if self._can_start(request):
                return
            self._preempt(victim)

    def _grant_decodes(self, plan: Plan, requests: Sequence[Request]) -> bool:
        """Grant each what is pending; returns whether nobody had to be preempted."""
        num_running = len(self._running)
        for request in requests:
            if request in self._running and plan.budget and self._reserve(request, plan):
                plan.grant(request, min(request.num_pending_tokens, plan.budget))
        # Now that no grant is revoked any more, what they fill can be found.
        self._remember(plan, plan.grants)
        if requests:
            plan.cap(self._config.mixed_step_tokens)
        return len(self._running) == num_running

    def _reserve(self, request: Request, plan: Plan) -> bool:
        """Give blocks for every known token, or preempt the last in order; False if that is it."""
        num_tokens = request.num_tokens + request.num_unread_tokens
        if not self._tables.num_missing(request, num_tokens):
            return True
        while self._tables.num_missing(request, num_tokens) > self._tables.num_free:
            victim = max(self._running, key=ORDER)
            plan.revoke(victim)
            self._preempt(victim)
            if victim is request:
                return False
        self._tables.grow(request, num_tokens)
        return True

    def _start_waiting(self, plan: Plan, above: int | None = None) -> None:
        """Start requests whose turn it is, while budget, rows and blocks last.

        With `above`, only those of a higher priority. All known tokens get their blocks at once: a
        prefill that has begun cannot run out half-way.
        """
        while plan.budget and self._waiting:
            request = self._waiting.first
            if above is not None and request.priority <= above:
                return
            if request.num_unread_tokens or not self._can_start(request):
                return
            self._waiting.take(request)
            self._running[request] = None
            self._tables.start(request)
            now = self._clock()
            if request.times.scheduled is None:
                request.times.scheduled = now
                self._started.append(request)
                self._waiting.charge(request, request.num_pending_tokens)
            else:
                request.add_event("resumed", now)
            self._grant(plan, request)

    def _can_start(self, request: Request) -> bool:
        """Whether rows and blocks suffice.

        One free block for each running request is left, so that the newcomer is not preempted by
        its elders' next tokens.
        """
        num_running = len(self._running)
        needed = self._tables.num_needed(request) + num_running
        return not num_running or (
            needed <= self._tables.num_free and num_running < self._config.max_batch_requests
        )

    def _grant(self, plan: Plan, request: Request) -> None:
        """Grant what is pending, or what is left; such a grant is final."""
        plan.grant(request, min(request.num_pending_tokens, plan.budget))
        self._remember(plan, [request])

    def _remember(self, plan: Plan, requests: Iterable[Request]) -> None:
        for request in requests if self._config.prefix_caching else ():
            stop = request.num_granted_tokens + plan.grants[request]
            self._tables.remember(request, min(stop, request.num_tokens))

    def _end(
        self, request: Request, reason: FinishReason, error: Exception | None = None
    ) -> RequestOutput:
        """End a live request; nobody may find what a failed one leaves behind."""
        if error is not None:
            self._tables.forget(request)
        self._take_out(request)
        return RequestOutput(request, finish_reason=reason, error=error)

    def _take_out(self, request: Request) -> None:
        """Take a live request out, wherever it is, with all its blocks."""
        if request in self._running:
            del self._running[request]
        else:
            self._waiting.remove(request)
        self._tables.release(request)
        request.times.finished = self._clock()

    def _preempt(self, request: Request) -> None:
        """Take a request's blocks; its arrival puts it back at the head of its class."""
        del self._running[request]
        self._tables.release(request)
        self._in_flight.preempt(request)
        request.num_preemptions += 1
        self.num_preemptions += 1
        request.add_event("preempted", self._clock())
        self._waiting.add(request)


def _split(running: Iterable[Request]) -> tuple[list[Request], list[Request]]:
    """Running requests that decode, and those with more to compute, both in their order."""
    decodes, prefills = [], []
    for request in sorted(running, key=ORDER):
        if not request.may_be_planned:
            continue
        if not request.is_decoding:
            prefills.append(request)
        elif request.num_pending_tokens and request.wants_more:
            decodes.append(request)
    return decodes, prefills


def _make_rows(
    grants: Mapping[Request, int], block_size: int, last_rows: Mapping[Request, int]
) -> tuple[BatchRow, ...]:
    """A row for each grant; `last_rows` are the requests' in the step before, while in flight."""
    rows = []
    num_rows = len(grants)
    for request, num_tokens in grants.items():
        row = _make_row(request, num_tokens, block_size, last_rows.get(request))
        if not request.completion_token_ids and not request.num_unread_tokens:
            request.num_prefill_chunks += 1
        request.num_steps += 1
        if num_rows > request.max_batch_size:
            request.max_batch_size = num_rows
        rows.append(row)
    return tuple(rows)


def _make_row(request: Request, num_tokens: int, block_size: int, last_row: int | None) -> BatchRow:
    start = request.num_granted_tokens
    stop = start + num_tokens
    num_known, num_unread = request.num_tokens, request.num_unread_tokens
    sampling, stopping = request.sampling, request.stopping
    num_completion_tokens = len(request.completion_token_ids) + num_unread
    samples = stop == num_known + num_unread
    reads_ids = samples and not request.may_run_ahead
    return BatchRow(
        () if start >= num_known else request.tokens(start, stop),
        start,
        request.block_ids[: -(-stop // block_size)],
        samples,
        sampling,
        stopping.masked_token_ids(num_completion_tokens),
        request.token_counts,
        () if sampling.num_prompt_logprobs is None else request.scored_token_ids(start, stop),
        last_row if stop > num_known else None,
        request.number,
        request.prompt_key,
        request.tokens(0, num_known) if reads_ids else (),
    )


def _take_result(
    request: Request, row: BatchRow, result: RowResult, now: int
) -> RequestOutput | None:
    """Add to the request what its row gave; None where the row did not sample.

    The output has a finish reason where the token ends the request. Raises the row's own failure.
    """
    if isinstance(result, Exception):
        raise result
    if isinstance(result, ScoredPrompt):
        request.prompt_logprobs[row.start :] = result.tokens
        result = result.sampled
    if row.samples != bool(result):
        raise RowError(f"a row gave {len(result)} tokens where it samples: {row.samples}")
    if not result:
        return None
    if len(result) > 1 and request.num_unread_tokens:
        raise RowError(f"a row gave {len(result)} tokens while the next step was in flight")
    is_first = not request.completion_token_ids
    output = _append(request, result, now)
    if is_first and request.prompt_logprobs:
        output = output._replace(prompt_logprobs=tuple(request.prompt_logprobs))
    return output


def _append(request: Request, sampled: tuple[SampledToken, ...], now: int) -> RequestOutput:
    """Add the tokens up to the first that ends the request; the others are dropped."""
    times, stopping = request.times, request.stopping
    if times.first_token is None:
        times.first_token = now
    visible: list[SampledToken] = []
    num_before = len(request.completion_token_ids)
    reason: FinishReason | None = None
    stop_id: int | None = None
    for token in sampled:
        request.append(token.token_id)
        is_stop_id = token.token_id in stopping.stop_token_ids
        if is_stop_id or token.token_id in stopping.eos_token_ids:
            reason, stop_id = FinishReason.STOP, token.token_id
        elif len(request.completion_token_ids) >= stopping.max_tokens:
            reason = FinishReason.LENGTH
        if stop_id is None or (is_stop_id and stopping.include_stop_token):
            visible.append(token)
        if reason is not None:
            break
    request.num_last_tokens = len(request.completion_token_ids) - num_before
    if times.last_token is not None:
        times.token_gap = (now - times.last_token) // request.num_last_tokens
    times.last_token = now
    return RequestOutput(request, tuple(visible), reason, stop_id)
