"""One request's row in a step: from the request's state to `BatchRow`, and from its result back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from nanoinfer_engine.batch import BatchRow, RowResult, ScoredPrompt
from nanoinfer_engine.request import FinishReason, Request, RequestOutput, SampledToken


def make_rows(
    grants: Mapping[Request, int],
    num_blocks: Callable[[int], int],
    last_rows: Mapping[Request, int],
) -> tuple[BatchRow, ...]:
    """A row for each grant; `last_rows` are the requests' in the step before, if still in flight.

    `num_blocks` says how many blocks a number of tokens takes.
    """
    rows = []
    for request, num_tokens in grants.items():
        blocks = num_blocks(request.num_granted_tokens + num_tokens)
        row = _make_row(request, num_tokens, blocks, last_rows.get(request))
        request.num_in_flight_tokens += num_tokens
        request.num_unread_tokens += row.samples
        request.num_steps += 1
        request.num_prefill_chunks += request.times.first_token is None
        request.max_batch_size = max(request.max_batch_size, len(grants))
        rows.append(row)
    return tuple(rows)


def _make_row(request: Request, num_tokens: int, num_blocks: int, last_row: int | None) -> BatchRow:
    start = request.num_granted_tokens
    stop = start + num_tokens
    return BatchRow(
        token_ids=request.tokens(start, stop),
        start=start,
        block_ids=tuple(request.block_ids[:num_blocks]),
        samples=stop == request.num_tokens + request.num_unread_tokens,
        sampling=request.sampling,
        masked_token_ids=request.stopping.masked_token_ids(
            len(request.completion_token_ids) + request.num_unread_tokens
        ),
        token_counts=request.token_counts,
        scored_token_ids=request.scored_token_ids(start, stop),
        source_row=last_row if stop > request.num_tokens else None,
        request_number=request.number,
    )


def take_result(
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
    if result is None:
        return None
    is_first = not request.completion_token_ids
    output = _append(request, result, now)
    if is_first and request.prompt_logprobs:
        output = replace(output, prompt_logprobs=tuple(request.prompt_logprobs))
    return output


def _append(request: Request, sampled: SampledToken, now: int) -> RequestOutput:
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
        return RequestOutput(request, visible, FinishReason.STOP, sampled.token_id)
    is_last = len(request.completion_token_ids) >= stopping.max_tokens
    return RequestOutput(request, (sampled,), FinishReason.LENGTH if is_last else None)
