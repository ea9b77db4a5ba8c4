"""Random numbers of the draws: one exponential number for each token id of a row, by hash alone.

A row's key is a hash of seed, prompt and position; an id's number is a hash of the key and the id.
Nothing is kept between draws, so a number depends on neither the batch nor the device. The kernels
compute the same hash (`kernels.drawing`), bit by bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanoinfer_engine.core.batch import BatchRow

Words = NDArray[np.uint32]

_MASK64 = (1 << 64) - 1
_BELOW_ONE = np.float32(1 - 2**-24)


def row_keys(rows: Sequence[BatchRow]) -> Words:
    """[2, rows]: the key of each row's draw, in two words."""
    seeds = np.array([row.sampling.seed & _MASK64 for row in rows], dtype=np.uint64)
    prompts = np.array([row.prompt_key for row in rows], dtype=np.uint64)
    positions = np.array([row.context_length for row in rows], dtype=np.uint64)
    keys = _splitmix64(_splitmix64(_splitmix64(seeds) ^ prompts) ^ positions)
    return np.stack([keys.astype(np.uint32), (keys >> np.uint64(32)).astype(np.uint32)])


def exponentials(keys: Words, token_ids: Words) -> Tensor:
    """Standard exponential numbers of `token_ids` under `keys` [2, ...], which broadcast."""
    hashes = _hash(keys, token_ids)
    uniform = hashes.astype(np.float32)
    uniform += np.float32(0.5)
    uniform *= np.float32(2**-32)
    # The small numbers decide a draw and are exact; the largest would round to 1.
    np.minimum(uniform, _BELOW_ONE, out=uniform)
    return torch.from_numpy(uniform).neg_().log1p_().neg_()


def _hash(keys: Words, token_ids: Words) -> Words:
    """32 bits for each id: C. Wellons's finalizer "lowbias32", keyed before each product."""
    mixed: Words = token_ids ^ keys[0]
    shifted = mixed >> np.uint32(16)
    mixed ^= shifted
    mixed *= np.uint32(0x21F0AAAD)
    mixed ^= np.right_shift(mixed, np.uint32(15), out=shifted)
    mixed ^= keys[1]
    mixed *= np.uint32(0xD35A2D97)
    mixed ^= np.right_shift(mixed, np.uint32(15), out=shifted)
    return mixed


def _splitmix64(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (OOPSLA 2014)."""
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
