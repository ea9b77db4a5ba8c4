"""Log-probabilities of tokens under the raw distribution: temperature 1, nothing removed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nanoinfer_engine.batch import BatchRow, RowResult, ScoredPrompt
from nanoinfer_engine.errors import SamplingError, is_device_error
from nanoinfer_engine.request import Logprob, SampledToken

# Bounds the memory that scoring takes: 38 MiB of logits for a vocabulary of 150,000.
_POSITIONS_AT_ONCE = 64


def score(
    logits: Tensor, token_ids: Sequence[int], num_top: int, listed_ids: Sequence[int]
) -> list[SampledToken]:
    """The token of each row of `logits` [rows, vocabulary] with its log-probability and rank.

    `top` holds the `num_top` likeliest ids, then those of `listed_ids`, all different, that are not
    among them. Ids that tie share the better rank. Raises SamplingError for NaN.
    """
    logprobs = torch.log_softmax(logits, dim=-1)
    asked = torch.tensor([[token_id, *listed_ids] for token_id in token_ids])
    values = logprobs.gather(1, asked)
    if bool(values.isnan().any()):
        raise SamplingError("logits are not finite")
    likeliest = logprobs.topk(min(num_top, logprobs.shape[-1]), sorted=True)
    per_row = zip(
        token_ids,
        values.tolist(),
        _ranks(logprobs, values).tolist(),
        likeliest.indices.tolist(),
        likeliest.values.tolist(),
        strict=True,
    )
    tokens = []
    for token_id, own, ranks, top_ids, top_values in per_row:
        top = [
            Logprob(each, value, top_values.index(value) + 1)
            for each, value in zip(top_ids, top_values, strict=True)
        ]
        listed = map(Logprob, listed_ids, own[1:], ranks[1:])
        top += [each for each in listed if each.token_id not in top_ids]
        tokens.append(SampledToken(token_id, Logprob(token_id, own[0], ranks[0]), tuple(top)))
    return tokens


def score_prompts(
    rows: Sequence[BatchRow],
    hidden: Tensor,
    results: Sequence[RowResult],
    to_logits: Callable[[Tensor], Tensor],
) -> list[RowResult]:
    """`results`, with the `scored_token_ids` of the rows that have some; a row fails alone.

    `hidden` [tokens, width] are those of all rows, end to end; `to_logits` turns some of them into
    logits [tokens, vocabulary].
    """
    scored = list(results)
    first = 0
    for index, (row, result) in enumerate(zip(rows, results, strict=True)):
        own = hidden[first : first + len(row.scored_token_ids)]
        first += row.num_tokens
        if row.scored_token_ids and (result is None or isinstance(result, SampledToken)):
            try:
                scored[index] = ScoredPrompt(_score_prompt(row, own, to_logits), result)
            except Exception as error:  # isolation: whatever one row provokes stays with that row
                if is_device_error(error):
                    raise
                scored[index] = error
    return scored


def _score_prompt(
    row: BatchRow, hidden: Tensor, to_logits: Callable[[Tensor], Tensor]
) -> tuple[SampledToken, ...]:
    """Each of the row's `scored_token_ids`, judged at the position before it."""
    options = row.sampling
    tokens: list[SampledToken] = []
    for part in torch.split(hidden, _POSITIONS_AT_ONCE):
        ids = row.scored_token_ids[len(tokens) : len(tokens) + len(part)]
        logits = to_logits(part).float().cpu()
        tokens += score(logits, ids, options.num_prompt_logprobs or 0, options.logprob_token_ids)
    return tuple(tokens)


def _ranks(logprobs: Tensor, values: Tensor) -> Tensor:
    """[rows, values]: 1 + how many ids of the row are likelier."""
    if values.shape[-1] == 1:
        return (logprobs > values).sum(dim=-1, keepdim=True) + 1
    ascending = logprobs.sort(dim=-1).values
    return logprobs.shape[-1] - torch.searchsorted(ascending, values, right=True) + 1
