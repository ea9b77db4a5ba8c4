"""The paged KV cache: one tensor of fixed-size blocks per layer, shared by all requests.

    blocks[layer, 0 = keys | 1 = values, block, offset, kv head, head dim]

A slot is a token's place: block * block_size + offset. Who owns which block is not known here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanoinfer_engine.config import ModelConfig


def bytes_per_block(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Memory of one block of `block_size` tokens over all layers, K and V."""
    elements = 2 * config.num_layers * block_size * config.num_kv_heads * config.head_dim
    return elements * dtype.itemsize


def num_blocks_for(
    budget_bytes: int, config: ModelConfig, block_size: int, dtype: torch.dtype
) -> int:
    """How many blocks fit in `budget_bytes`; ValueError if not even one does."""
    one = bytes_per_block(config, block_size, dtype)
    if budget_bytes < one:
        raise ValueError(f"kv_cache_bytes {budget_bytes} is less than one block of {one} bytes")
    return budget_bytes // one


class KVCache:
    """Keys and values of every cached token, addressed by slot (writes) and block (reads)."""

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Allocate zeroed blocks (the operating system commits CPU memory on first touch)."""
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.dtype = dtype
        self.device = device
        heads, dim = config.num_kv_heads, config.head_dim
        shape = (config.num_layers, 2, num_blocks, block_size, heads, dim)
        self._storage = torch.zeros(shape, dtype=dtype, device=device)
        # views made once: indexing a tensor costs microseconds, and each layer does it every step
        self._slots = self._storage.view(config.num_layers, 2, num_blocks * block_size, heads, dim)
        self._planes = self._storage.view(2 * config.num_layers, num_blocks, -1)
        self._layers = [(layer[0], layer[1]) for layer in self._storage]
        self._flat_layers = [(layer[0], layer[1]) for layer in self._slots]

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """The keys and values of a layer themselves, [blocks, block_size, kv heads, head dim]."""
        return self._layers[layer]

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store keys and values [tokens, kv heads, head dim] at `slots` [tokens]."""
        flat_keys, flat_values = self._flat_layers[layer]
        flat_keys.index_copy_(0, slots, keys)
        flat_values.index_copy_(0, slots, values)

    def gather(self, layer: int, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of the keys and values in `blocks` [n]: [n, block_size, kv heads, head dim]."""
        keys, values = self._layers[layer]
        return keys.index_select(0, blocks), values.index_select(0, blocks)

    def clear(self, blocks: Tensor) -> None:
        """Zero `blocks` in every layer before a new owner writes them.

        Attention reads whole blocks and masks the slots not yet written; a mask hides any finite
        number, but not a NaN or infinity that an earlier owner left behind.
        """
        self._planes.index_fill_(1, blocks, 0)
