"""Log-probabilities of tokens under the raw distribution: temperature 1, nothing removed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanoinfer_engine.core.batch import BatchRow, RowResult, ScoredPrompt
from nanoinfer_engine.core.errors import SamplingError, is_device_error
from nanoinfer_engine.core.request import Logprob, SampledToken

# Bound the memory that scoring takes: 38 MiB of logits for a vocabulary of 150,000.
POSITIONS_AT_ONCE = 64
_VALUES_AT_ONCE = 8


@dataclass(frozen=True)
class Scores:
    """What is measured for some rows: log-probabilities and ranks, wherever the logits are."""

    values: Tensor  # [rows, asked]
    ranks: Tensor  # [rows, asked]
    top_ids: Tensor  # [rows, top], the likeliest first
    top_values: Tensor  # [rows, top]


def measure(logits: Tensor, asked: Tensor, num_top: int) -> Scores:
    """Score the ids `asked` [rows, any] and the `num_top` likeliest of each row of `logits`.

    Nothing waits for the device. Ids must lie in the vocabulary.
    """
    logprobs = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    values = logprobs.gather(1, asked)
    likeliest = logprobs.topk(min(num_top, logprobs.shape[-1]), sorted=True)
    return Scores(values, _ranks(logprobs, values), likeliest.indices, likeliest.values)


def tokens_of(
    scores: Scores, token_ids: Sequence[int], options: Sequence[tuple[int, Sequence[int]]]
) -> list[SampledToken | SamplingError]:
    """The token of each row of `scores`, which are on the host; an error where there is NaN.

    `options` are each row's number of likeliest ids and listed ids; asked were, at least, the
    token's own id and then those.
    """
    per_row = zip(
        token_ids,
        options,
        scores.values.tolist(),
        scores.ranks.tolist(),
        scores.top_ids.tolist(),
        scores.top_values.tolist(),
        strict=True,
    )
    tokens: list[SampledToken | SamplingError] = []
    for token_id, (num_top, listed_ids), own, ranks, all_top_ids, top_values in per_row:
        if any(map(math.isnan, own)):
            tokens.append(SamplingError("logits are not finite"))
            continue
        top_ids = all_top_ids[:num_top]
        top = [
            Logprob(each, value, top_values.index(value) + 1)
            for each, value in zip(top_ids, top_values, strict=False)
        ]
        listed = map(Logprob, listed_ids, own[1:], ranks[1:])
        top += [each for each in listed if each.token_id not in top_ids]
        tokens.append(SampledToken(token_id, Logprob(token_id, own[0], ranks[0]), tuple(top)))
    return tokens


def score(
    logits: Tensor, token_ids: Sequence[int], num_top: int, listed_ids: Sequence[int]
) -> list[SampledToken]:
    """The token of each row of `logits` [rows, vocabulary] with its log-probability and rank.

    `top` holds the `num_top` likeliest ids, then those of `listed_ids`, all different, that are not
    among them. Ids that tie share the better rank. Raises SamplingError for NaN.
    """
    asked = torch.tensor([[token_id, *listed_ids] for token_id in token_ids])
    scores = measure(logits, asked, num_top)
    tokens = []
    for token in tokens_of(scores, token_ids, [(num_top, listed_ids)] * len(token_ids)):
        if isinstance(token, SamplingError):
            raise token
        tokens.append(token)
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
        if row.scored_token_ids and isinstance(result, tuple):
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
    for part in torch.split(hidden, POSITIONS_AT_ONCE):
        ids = row.scored_token_ids[len(tokens) : len(tokens) + len(part)]
        logits = to_logits(part).float().cpu()
        tokens += score(logits, ids, options.num_prompt_logprobs or 0, options.logprob_token_ids)
    return tuple(tokens)


def _ranks(logprobs: Tensor, values: Tensor) -> Tensor:
    """[rows, values]: 1 + how many ids of the row are likelier."""
    if values.shape[-1] > 1 and logprobs.device.type == "cpu":
        ascending = logprobs.sort(dim=-1).values
        return logprobs.shape[-1] - torch.searchsorted(ascending, values, right=True) + 1
    return 1 + _num_larger(logprobs, values)


def _num_larger(logprobs: Tensor, values: Tensor) -> Tensor:
    """[rows, values] by counting: a device is faster at it than at sorting the vocabulary."""
    counts = [
        (logprobs.unsqueeze(1) > some.unsqueeze(2)).sum(dim=-1)
        for some in torch.split(values, _VALUES_AT_ONCE, dim=-1)
    ]
    return torch.cat(counts, dim=-1)
