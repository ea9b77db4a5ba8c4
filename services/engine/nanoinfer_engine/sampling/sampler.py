"""Logits → token ids, all rows of a step together; a row's result depends on that row alone.

A distribution is made in this order: `shaping` (penalties, bias, masks), temperature, top-k, top-p
over what top-k left, min-p relative to the likeliest id. Each filter is a threshold on the logits,
so ids that tie at the border stay together and no order among them is invented. Log-probabilities
are those before all of it.

One id of what is left is drawn by an exponential race (the Gumbel-max trick): each id has an
exponential number of its own (`randomness`), and the id with the largest weight / number wins. No
id depends on those before it, so logits that differ by rounding seldom change a draw.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nanoinfer_engine.core.batch import BatchRow
from nanoinfer_engine.core.errors import SamplingError, is_device_error
from nanoinfer_engine.core.request import SampledToken
from nanoinfer_engine.sampling.logprobs import score
from nanoinfer_engine.sampling.randomness import Words, exponentials, row_keys
from nanoinfer_engine.sampling.shaping import shape

GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy: dividing by them would leave float32."""

_RACE_SIZE = 1 << 18  # weights raced at once: what the caches hold
_FEW = 4  # kept ids are picked out where they are fewer than one in so many


def sample(logits: Tensor, rows: Sequence[BatchRow]) -> list[SampledToken | Exception]:
    """One token per row of `logits` [rows, vocabulary], or why that row has none.

    `logits` is not modified. Rows are tried together first and, should anything fail, one by one.
    """
    try:
        return list(_sample(logits.float().cpu(), rows))
    except Exception as error:  # isolation: whatever one row provokes stays with that row
        if is_device_error(error):
            raise
        if len(rows) == 1:
            return [error]
        return [
            sample(logits[index : index + 1], rows[index : index + 1])[0]
            for index in range(len(rows))
        ]


def _sample(logits: Tensor, rows: Sequence[BatchRow]) -> list[SampledToken]:
    """[rows, vocabulary] float32 on the host → tokens; raises if any row fails."""
    shaped = shape(logits, rows)
    best, greedy_ids = shaped.max(dim=-1)
    # max propagates NaN; a row of -inf alone has nothing to choose
    if not bool(torch.isfinite(best).all()):
        raise SamplingError("logits are not finite, or every token id is masked")
    token_ids: list[int] = greedy_ids.tolist()
    drawn = [
        index
        for index, row in enumerate(rows)
        if row.sampling.temperature >= GREEDY_BELOW and row.sampling.top_k != 1
    ]
    if drawn:
        chosen = _draw(_select(shaped, drawn), [rows[index] for index in drawn])
        for index, token_id in zip(drawn, chosen, strict=True):
            token_ids[index] = token_id
    return _with_logprobs(logits, rows, token_ids)


def _select(values: Tensor, indices: list[int]) -> Tensor:
    return values if len(indices) == len(values) else values[indices]


def _draw(logits: Tensor, rows: Sequence[BatchRow]) -> list[int]:
    """One id of each row's filtered distribution."""
    temperatures = torch.tensor([[row.sampling.temperature] for row in rows])
    scaled = logits / temperatures
    scaled -= scaled.amax(dim=-1, keepdim=True)
    weights = scaled.exp()
    threshold = _threshold(scaled, weights, rows)
    if threshold is not None:
        weights.masked_fill_(scaled < threshold, 0)
    keys = row_keys(rows)
    count = max(_RACE_SIZE // weights.shape[-1], 1)
    token_ids: list[int] = []
    for first in range(0, len(rows), count):
        last = first + count
        token_ids += _race(weights[first:last], keys[:, first:last])
    return token_ids


def _race(weights: Tensor, keys: Words) -> list[int]:
    """Each row's winner; `weights` is divided in place. Ids without a weight take no number."""
    vocab_size = weights.shape[-1]
    kept = weights > 0
    if int(kept.count_nonzero()) < kept.numel() // _FEW:
        rows, ids = (each.numpy() for each in kept.nonzero(as_tuple=True))
        weights[kept] /= exponentials(keys[:, rows], ids.astype(np.uint32))
    else:
        weights /= exponentials(keys[:, :, None], np.arange(vocab_size, dtype=np.uint32))
    token_ids: list[int] = weights.argmax(dim=-1).tolist()
    return token_ids


def _threshold(scaled: Tensor, weights: Tensor, rows: Sequence[BatchRow]) -> Tensor | None:
    """[rows, 1]: ids whose scaled logit is below it are dropped; None if no row filters.

    `scaled` has its maximum at 0, so `weights` = exp(scaled) is relative to the likeliest id.
    `weights` is zeroed where top-k drops.
    """
    options = [row.sampling for row in rows]
    bounds = [math.log(each.min_p) if each.min_p > 0 else -math.inf for each in options]
    threshold = torch.tensor(bounds).unsqueeze(1)
    by_top_k = [i for i, each in enumerate(options) if 0 < each.top_k < scaled.shape[-1]]
    if by_top_k:
        counts = torch.tensor([[options[index].top_k] for index in by_top_k])
        likeliest = scaled[by_top_k].topk(int(counts.max())).values
        kth = likeliest.gather(1, counts - 1)
        weights[by_top_k] = weights[by_top_k].masked_fill(scaled[by_top_k] < kth, 0)
        threshold[by_top_k] = torch.maximum(threshold[by_top_k], kth)
    by_top_p = [index for index, each in enumerate(options) if each.top_p < 1]
    if by_top_p:
        shares = torch.tensor([[options[index].top_p] for index in by_top_p], dtype=torch.float64)
        last = _top_p_threshold(scaled[by_top_p], weights[by_top_p], shares)
        threshold[by_top_p] = torch.maximum(threshold[by_top_p], last)
    return None if bool(torch.isinf(threshold).all()) else threshold


def _top_p_threshold(scaled: Tensor, weights: Tensor, shares: Tensor) -> Tensor:
    """[rows, 1]: scaled logit of the last id in the smallest likeliest set that holds its share.

    Ids lighter than (1 - share) / vocabulary of the total weigh less than 1 - share together, so
    the set lies among the others: they alone are sorted. (Half that bound leaves room to round.)
    """
    totals = weights.sum(dim=-1, keepdim=True, dtype=torch.float64)
    bounds = 0.5 * (1 - shares) * totals / scaled.shape[-1]
    count = int((weights >= bounds).sum(dim=-1).max())
    likeliest = scaled.topk(count).values
    cumulative = likeliest.exp().cumsum(dim=-1, dtype=torch.float64)
    last = (cumulative < shares * totals).sum(dim=-1, keepdim=True)
    return likeliest.gather(1, last.clamp(max=count - 1))


def _with_logprobs(
    logits: Tensor, rows: Sequence[BatchRow], token_ids: Sequence[int]
) -> list[SampledToken]:
    """Attach log-probabilities where asked for, to all rows at once that ask for the same."""
    tokens = [SampledToken(token_id) for token_id in token_ids]
    groups: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for index, row in enumerate(rows):
        options = row.sampling
        if options.num_logprobs is not None:
            key = (options.num_logprobs, options.logprob_token_ids)
            groups.setdefault(key, []).append(index)
    for (num_top, listed_ids), indices in groups.items():
        chosen = [token_ids[index] for index in indices]
        scored = score(_select(logits, indices), chosen, num_top, listed_ids)
        for index, token in zip(indices, scored, strict=True):
            tokens[index] = token
    return tokens
