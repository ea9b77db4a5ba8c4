"""Log-probabilities on the device: measured behind the step, decoded when its results are read.

The same as `logprobs` on the host. An id outside the vocabulary is asked for as another, because a
device that reads beyond its memory is lost, and its row refused when the results are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanoinfer_engine.core.batch import BatchRow, RowResult, ScoredPrompt
from nanoinfer_engine.core.errors import SamplingError
from nanoinfer_engine.core.request import SampledToken
from nanoinfer_engine.sampling.logprobs import POSITIONS_AT_ONCE, Scores, measure, tokens_of


@dataclass(frozen=True)
class SampledScores:
    """Of the ids that some rows of the batch sample; `scores` are on their way to the host."""

    rows: dict[int, BatchRow]  # by index in the batch
    scores: Scores
    vocab_size: int

    def add_to(self, results: list[RowResult]) -> None:
        """Complete the rows' results; the step must have ended, and their ids stand there."""
        sampled = [results[index] for index in self.rows]
        ids = [each[0].token_id if isinstance(each, tuple) else -1 for each in sampled]
        options = [
            (row.sampling.num_logprobs or 0, row.sampling.logprob_token_ids)
            for row in self.rows.values()
        ]
        tokens = tokens_of(self.scores, ids, options)
        for (index, row), token in zip(self.rows.items(), tokens, strict=True):
            if isinstance(results[index], tuple):
                refusal = _refusal(row, self.vocab_size)
                results[index] = refusal or ((token,) if isinstance(token, SampledToken) else token)


@dataclass(frozen=True)
class PromptScores:
    """Of the `scored_token_ids` of row `index`; `scores` are on their way to the host."""

    index: int
    row: BatchRow
    scores: Scores
    vocab_size: int

    def add_to(self, results: list[RowResult]) -> None:
        """Complete the row's result, as `SampledScores` do."""
        options, sampled = self.row.sampling, results[self.index]
        if not isinstance(sampled, tuple):
            return
        ids = self.row.scored_token_ids
        asked = (options.num_prompt_logprobs or 0, options.logprob_token_ids)
        tokens = tokens_of(self.scores, ids, [asked] * len(ids))
        errors = [token for token in tokens if isinstance(token, SamplingError)]
        if error := _refusal(self.row, self.vocab_size) or next(iter(errors), None):
            results[self.index] = error
        else:
            scored = tuple(token for token in tokens if isinstance(token, SampledToken))
            results[self.index] = ScoredPrompt(scored, sampled)


def measure_sampled(
    rows: Sequence[BatchRow], places: Mapping[int, int], logits: Tensor, sampled: Tensor
) -> list[SampledScores]:
    """Measure for the rows that ask, in `logits` [any, vocabulary] and `sampled` at their place.

    `places` has the rows that sample, by index.
    """
    groups: dict[int, list[int]] = {}
    for index in places:
        options = rows[index].sampling
        if options.num_logprobs is not None:
            groups.setdefault(len(options.logprob_token_ids), []).append(index)
    launched = []
    for indices in groups.values():
        for first in range(0, len(indices), POSITIONS_AT_ONCE):
            part = {index: rows[index] for index in indices[first : first + POSITIONS_AT_ONCE]}
            wanted = [[places[i], *row.sampling.logprob_token_ids] for i, row in part.items()]
            on_device = _upload(wanted, logits.device)
            at, listed = on_device[:, 0], on_device[:, 1:]
            asked = torch.cat([sampled.index_select(0, at).long().unsqueeze(1), listed], dim=1)
            num_top = max(row.sampling.num_logprobs or 0 for row in part.values())
            scores = _measure(logits.index_select(0, at), asked, num_top)
            launched.append(SampledScores(part, _to_host([scores]), logits.shape[1]))
    return launched


def measure_prompts(
    rows: Sequence[BatchRow], order: Sequence[int], to_logits: Callable[[int, int], Tensor]
) -> list[PromptScores]:
    """Measure for the rows with `scored_token_ids`; `order` says how the rows' tokens lie.

    `to_logits` gives the logits [count, vocabulary] of `count` tokens from a first one on.
    """
    launched, start = [], 0
    for index in order:
        row = rows[index]
        ids, listed = row.scored_token_ids, row.sampling.logprob_token_ids
        parts = []
        for first in range(0, len(ids), POSITIONS_AT_ONCE):
            wanted = [[each, *listed] for each in ids[first : first + POSITIONS_AT_ONCE]]
            logits = to_logits(start + first, len(wanted))
            asked = _upload(wanted, logits.device)
            parts.append(_measure(logits, asked, row.sampling.num_prompt_logprobs or 0))
            vocab_size = logits.shape[1]
        if parts:
            launched.append(PromptScores(index, row, _to_host(parts), vocab_size))
        start += row.num_tokens
    return launched


def _measure(logits: Tensor, asked: Tensor, num_top: int) -> Scores:
    return measure(logits, asked.clamp(0, logits.shape[1] - 1), num_top)


def _upload(ids: list[list[int]], device: torch.device) -> Tensor:
    """[rows, any] int64; returns before the copy has happened."""
    on_host = torch.tensor(ids)
    return (on_host.pin_memory() if device.type == "cuda" else on_host).to(
        device, non_blocking=True
    )


def _to_host(parts: Sequence[Scores]) -> Scores:
    """All parts' rows, as they will be on the host once the device has come so far."""

    def joined(tensors: list[Tensor]) -> Tensor:
        whole = torch.cat(tensors)
        if not whole.is_cuda:
            return whole
        on_host = torch.empty(whole.shape, dtype=whole.dtype, pin_memory=True)
        return on_host.copy_(whole, non_blocking=True)

    return Scores(
        joined([each.values for each in parts]),
        joined([each.ranks for each in parts]),
        joined([each.top_ids for each in parts]),
        joined([each.top_values for each in parts]),
    )


def _refusal(row: BatchRow, vocab_size: int) -> SamplingError | None:
    if all(0 <= each < vocab_size for each in row.sampling.logprob_token_ids):
        return None
    return SamplingError("a token id is outside the vocabulary")
