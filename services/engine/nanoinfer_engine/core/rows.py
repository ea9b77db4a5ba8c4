"""One request's row in a step: from the request's state to `BatchRow`, and from its result back."""

from __future__ import annotations

from collections.abc import Mapping

from nanoinfer_engine.core.batch import BatchRow, RowResult, ScoredPrompt
from nanoinfer_engine.core.request import FinishReason, Request, RequestOutput, SampledToken


def make_rows(
    grants: Mapping[Request, int], block_size: int, last_rows: Mapping[Request, int]
) -> tuple[BatchRow, ...]:
    """A row for each grant; `last_rows` are the requests' in the step before, while in flight."""
    rows = []
    num_rows = len(grants)
    for request, num_tokens in grants.items():
        row = _make_row(request, num_tokens, block_size, last_rows.get(request))
        if not request.completion_token_ids and not request.num_unread_tokens:
            request.num_prefill_chunks += 1
        request.num_in_flight_tokens += num_tokens
        request.num_unread_tokens += row.samples
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
    return BatchRow(
        () if start >= num_known else request.tokens(start, stop),
        start,
        request.block_ids[: -(-stop // block_size)],
        stop == num_known + num_unread,
        sampling,
        stopping.masked_token_ids(num_completion_tokens),
        request.token_counts,
        () if sampling.num_prompt_logprobs is None else request.scored_token_ids(start, stop),
        last_row if stop > num_known else None,
        request.number,
        request.prompt_key,
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
        output = output._replace(prompt_logprobs=tuple(request.prompt_logprobs))
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
