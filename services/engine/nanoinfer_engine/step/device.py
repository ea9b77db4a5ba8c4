"""How a model comes to run on a CUDA device: whether kernels fit it, how much cache fits beside.

The one door to everything that needs Triton; the runner opens it on a CUDA device alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import triton

from nanoinfer_engine.core.config import EngineConfig, ModelConfig
from nanoinfer_engine.models import LanguageModel
from nanoinfer_engine.models.decoder import Decoder
from nanoinfer_engine.models.fused import FusedDecoder
from nanoinfer_engine.ops.collectives import Rank
from nanoinfer_engine.ops.cuda.attention import TUNED_CONTEXT, PagedAttention
from nanoinfer_engine.ops.cuda.choices import ChoiceFile, source_digest
from nanoinfer_engine.ops.cuda.kernels import cublaslt
from nanoinfer_engine.ops.cuda.kernels.decode import AttentionShape, DecodeWorkspace
from nanoinfer_engine.ops.cuda.kernels.linear import GemvShape, TileShape
from nanoinfer_engine.ops.kv_cache import KVCache, bytes_per_block
from nanoinfer_engine.step.device_steps import DeviceSteps

# what CUDA graphs, the libraries' workspaces and fragmentation may take besides
_RESERVED_BYTES = 3 << 30


def open_device(
    model: LanguageModel,
    config: EngineConfig,
    model_config: ModelConfig,
    max_model_len: int,
    cache: KVCache,
    rank: Rank,
    vocab_size: int,
) -> DeviceSteps | None:
    """Fused steps of `model` over `cache`; None for what only the plain path computes.

    `model_config` is of the rank's share, `vocab_size` of the whole model.
    """
    if not isinstance(model, Decoder) or cache.dtype not in (torch.float16, torch.bfloat16):
        return None
    workspace = DecodeWorkspace(
        config.max_batch_requests,
        model_config.num_heads,
        model_config.num_kv_heads,
        model_config.head_dim,
        cache.device,
    )
    backend = PagedAttention(cache, model_config.sliding_windows, workspace)
    room = min(cache.num_blocks * cache.block_size, TUNED_CONTEXT)  # contexts are cut to it
    sizes = (config.max_batch_requests, config.max_batch_tokens, max_model_len, room)
    formats = (str(cache.dtype), str(cache.stored_dtype), config.quantization)
    facts = {
        "shapes": [repr(model_config), cache.block_size, *sizes, *formats],
        "rank": [rank.index, rank.size],
    }
    return DeviceSteps(
        FusedDecoder(model, model_config, backend, rank, vocab_size),
        vocab_size,
        cache.block_size,
        config.max_batch_requests,
        config.max_batch_tokens,
        max_model_len,
        cache.num_blocks,
        cache.device,
        _choice_file(cache.device, facts),
        rank,
        config.mixed_graphs,
    )


def _choice_file(device: torch.device, facts: Mapping[str, object]) -> ChoiceFile:
    """Where choices for these `facts` are kept: they depend on device, libraries and code, too."""
    properties = torch.cuda.get_device_properties(device)
    here = {
        "device": [properties.name, properties.multi_processor_count, properties.total_memory],
        "libraries": [torch.__version__, triton.__version__, cublaslt.version()],
        "code": source_digest(),
    }
    kinds = (GemvShape, TileShape, cublaslt.Algorithm, AttentionShape)
    return ChoiceFile(Path(triton.knobs.cache.dir), {**here, **facts}, kinds)


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
