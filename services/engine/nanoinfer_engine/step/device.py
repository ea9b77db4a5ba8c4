"""A model on a CUDA device: its operations, its steps, and how much KV cache fits beside.

The one door to everything that needs Triton; the runner opens it on a CUDA device alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from nanoinfer_engine.core.config import EngineConfig, ModelConfig
from nanoinfer_engine.models import Decoder
from nanoinfer_engine.ops.collectives import Rank
from nanoinfer_engine.ops.cuda.attention import PagedAttention
from nanoinfer_engine.ops.cuda.backend import CudaOps
from nanoinfer_engine.ops.cuda.kernels.decode import DecodeWorkspace
from nanoinfer_engine.ops.cuda.products import read_table
from nanoinfer_engine.ops.kv_cache import KVCache, bytes_per_block
from nanoinfer_engine.step.device_steps import DeviceSteps

# what CUDA graphs, the libraries' workspaces and fragmentation may take besides
_RESERVED_BYTES = 3 << 30


def open_device(
    model: Decoder,
    config: EngineConfig,
    model_config: ModelConfig,
    max_model_len: int,
    cache: KVCache,
    rank: Rank,
    vocab_size: int,
) -> DeviceSteps | None:
    """Steps of `model` over `cache` on the device; None for what the kernels do not compute.

    `model_config` is of the rank's share, `vocab_size` of the whole model.
    """
    if cache.dtype not in (torch.float16, torch.bfloat16):
        return None
    kv_heads, dim = model_config.num_kv_heads, model_config.head_dim
    workspace = DecodeWorkspace(
        config.max_batch_requests, model_config.num_heads, kv_heads, dim, cache.device
    )
    table = read_table(torch.cuda.get_device_name(cache.device))
    attention = PagedAttention(
        cache,
        model_config.sliding_windows,
        workspace,
        lambda rows: table.attention_shape(kv_heads, dim, rows),
    )
    return DeviceSteps(
        model,
        CudaOps(attention, table, cache.dtype, rank, vocab_size),
        config,
        max_model_len,
        vocab_size,
        cache.device,
        rank,
    )


def fitting_blocks(
    config: EngineConfig,
    model_config: ModelConfig,
    make_cache: Callable[[int], KVCache],
    run_largest: Callable[[KVCache], None],
) -> int:
    """How many blocks the device's memory holds beside the largest step, found by running it.

    Raises ValueError where not even that step's own blocks fit.
    """
    trial = -(-config.max_batch_tokens // config.block_size) + config.max_batch_requests
    cache = make_cache(trial)
    one = bytes_per_block(model_config, config.block_size, cache.stored_dtype)
    torch.cuda.reset_peak_memory_stats()
    run_largest(cache)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - trial * one
    del cache
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    outside = total - free - torch.cuda.memory_reserved()
    left = int(config.device_memory_share * total) - outside - peak - _RESERVED_BYTES
    if left < trial * one:
        raise ValueError(
            f"device_memory_share {config.device_memory_share} leaves {left} bytes for the KV"
            f" cache, less than one step's {trial * one}"
        )
    return left // one
