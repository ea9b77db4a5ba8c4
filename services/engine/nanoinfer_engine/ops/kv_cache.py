"""The paged KV cache: one tensor of fixed-size blocks per layer, shared by all requests.

    blocks[layer, 0 = keys | 1 = values, block, offset, kv head, head dim]

A slot is a token's place: block * block_size + offset. Who owns which block is not known here.
What is stored may have fewer bits than what is computed with: e4m3 with scale 1, which saturates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanoinfer_engine.core.config import ModelConfig

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0


def stored_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """What `kv_cache_dtype` says, where `dtype` is computed with; ValueError if unknown."""
    if name not in ("auto", "fp8"):
        raise ValueError(f"kv_cache_dtype {name!r} is not one of auto, fp8")
    return FP8 if name == "fp8" else dtype


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
        stored: torch.dtype | None = None,
    ) -> None:
        """Allocate zeroed blocks (the operating system commits CPU memory on first touch).

        Keys and values come and go in `dtype` and are kept in `stored`, the same where None.
        """
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.dtype = dtype
        self.stored_dtype = stored or dtype
        self.device = device
        heads, dim = config.num_kv_heads, config.head_dim
        shape = (config.num_layers, 2, num_blocks, block_size, heads, dim)
        # PyTorch neither copies nor selects by index in 8-bit floats: in bytes it does
        memory = torch.uint8 if self.stored_dtype == FP8 else dtype
        self._storage = torch.zeros(shape, dtype=memory, device=device)
        # views made once: indexing a tensor costs microseconds, and each layer does it every step
        self._slots = self._storage.view(config.num_layers, 2, num_blocks * block_size, heads, dim)
        self._planes = self._storage.view(2 * config.num_layers, num_blocks, -1)
        self._blocks = [(layer[0], layer[1]) for layer in self._storage]
        self._layers = [
            (keys.view(self.stored_dtype), values.view(self.stored_dtype))
            for keys, values in self._blocks
        ]
        self._flat_layers = [(layer[0], layer[1]) for layer in self._slots]

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """The keys and values of a layer themselves, [blocks, block_size, kv heads, head dim]."""
        return self._layers[layer]

    def write(
        self, layer: int, slots: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Store keys and values [tokens, kv heads, head dim] at `slots` [tokens].

        Returns them as they will be read: every token must see the same of another, now and later.
        """
        flat_keys, flat_values = self._flat_layers[layer]
        keys, values = self._to_memory(keys), self._to_memory(values)
        flat_keys.index_copy_(0, slots, keys)
        flat_values.index_copy_(0, slots, values)
        return self._from_memory(keys), self._from_memory(values)

    def gather(self, layer: int, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of the keys and values in `blocks` [n]: [n, block_size, kv heads, head dim]."""
        keys, values = (each.index_select(0, blocks) for each in self._blocks[layer])
        return self._from_memory(keys), self._from_memory(values)

    def _to_memory(self, values: Tensor) -> Tensor:
        if self.stored_dtype != FP8:
            return values
        return values.clamp(-FP8_MAX, FP8_MAX).to(FP8).view(torch.uint8)

    def _from_memory(self, memory: Tensor) -> Tensor:
        if self.stored_dtype != FP8:
            return memory
        return memory.view(FP8).to(self.dtype)

    def clear(self, blocks: Tensor) -> None:
        """Zero `blocks` in every layer before a new owner writes them.

        Attention reads whole blocks and masks the slots not yet written; a mask hides any finite
        number, but not a NaN or infinity that an earlier owner left behind.
        """
        self._planes.index_fill_(1, blocks, 0)
