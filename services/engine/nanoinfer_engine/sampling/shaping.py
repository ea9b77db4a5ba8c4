"""What a request does to its logits before the choice: penalties, bias, masks, in this order.

Only the ids concerned are read and written, all rows of a step in one gather and one scatter. The
ids are checked on the host first, because a position beyond a row's end would be another row's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanoinfer_engine.core.batch import BatchRow
from nanoinfer_engine.core.errors import SamplingError

# Penalised logits stay within it: the smallest temperature cannot carry them out of float32.
_LARGEST = 1e30


def shape(logits: Tensor, rows: Sequence[BatchRow]) -> Tensor:
    """`logits` [rows, vocabulary] float32 on the host, or a copy in which what rows ask is done.

    Raises SamplingError for an id outside the vocabulary.
    """
    penalised = {i: row for i, row in enumerate(rows) if row.token_counts is not None}
    biased = {i: row for i, row in enumerate(rows) if row.sampling.logit_bias}
    allowed = {
        i: np.array(row.sampling.allowed_token_ids)
        for i, row in enumerate(rows)
        if row.sampling.allowed_token_ids is not None
    }
    masked = {i: _ids(row.masked_token_ids) for i, row in enumerate(rows) if row.masked_token_ids}
    if not (penalised or biased or allowed or masked):
        return logits
    shaped = logits.clone(memory_format=torch.contiguous_format)
    if penalised:
        _penalise(shaped, penalised)
    if biased:
        _add_bias(shaped, biased)
    if allowed:
        _keep(shaped, allowed)
    if masked:
        shaped.view(-1)[_positions(masked, shaped.shape[-1])] = -math.inf
    return shaped


def _penalise(logits: Tensor, rows: Mapping[int, BatchRow]) -> None:
    """Repetition (CTRL, arXiv 1909.05858), then frequency and presence (as OpenAI defines them).

    Repetition concerns prompt and completion, the other two the completion alone.
    """
    counts = [row.token_counts for row in rows.values() if row.token_counts is not None]
    ids = dict(zip(rows, (np.array(each.token_ids) for each in counts), strict=True))
    positions = _positions(ids, logits.shape[-1])
    times = torch.from_numpy(np.concatenate([np.array(each.counts) for each in counts])).float()
    lengths = torch.tensor([len(each) for each in ids.values()])
    options = [row.sampling for row in rows.values()]
    penalties = [
        (each.repetition_penalty, each.frequency_penalty, each.presence_penalty) for each in options
    ]
    repetition, frequency, presence = torch.tensor(penalties).repeat_interleave(lengths, 0).T
    values = logits.view(-1)[positions]
    values = torch.where(values < 0, values * repetition, values / repetition)
    values -= frequency * times + presence * (times > 0)
    logits.view(-1)[positions] = values.clamp(-_LARGEST, _LARGEST)


def _add_bias(logits: Tensor, rows: Mapping[int, BatchRow]) -> None:
    pairs = {i: row.sampling.logit_bias for i, row in rows.items()}
    ids = {i: _ids(token_id for token_id, _ in each) for i, each in pairs.items()}
    values = [value for each in pairs.values() for _, value in each]
    logits.view(-1)[_positions(ids, logits.shape[-1])] += torch.tensor(values)


def _keep(logits: Tensor, ids: Mapping[int, NDArray[np.int64]]) -> None:
    """Remove every other id of these rows."""
    positions = _positions(ids, logits.shape[-1])
    kept = logits.view(-1)[positions]
    logits[list(ids)] = -math.inf
    logits.view(-1)[positions] = kept


def _ids(values: Iterable[int]) -> NDArray[np.int64]:
    return np.fromiter(values, np.int64)


def _positions(ids: Mapping[int, NDArray[np.int64]], vocab_size: int) -> Tensor:
    """Where the ids of each row lie in the flat logits; SamplingError for one beyond its row."""
    columns = np.concatenate(list(ids.values()))
    if columns.size and not 0 <= columns.min() <= columns.max() < vocab_size:
        raise SamplingError("a token id is outside the vocabulary")
    row_indices = np.repeat(np.array(list(ids)), [len(each) for each in ids.values()])
    return torch.from_numpy(row_indices * vocab_size + columns)
