"""Engine and model configuration as plain frozen data: no torch, no pydantic, no environment."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class EngineConfig:
    """What the engine's core needs to know; built once by the entry point.

    `kv_cache_bytes` is the memory budget from which the number of blocks follows. `block_size` is
    in tokens. `max_batch_tokens` and `max_batch_requests` bound one step, `max_waiting_requests`
    and `max_waiting_tokens` (prompt tokens) the queue. `max_model_len` None means what the model
    allows.
    """

    model_path: Path
    device: str = "cpu"
    dtype: str = "float32"
    num_threads: int | None = None
    kv_cache_bytes: int = 256 * 1024 * 1024
    block_size: int = 16
    max_model_len: int | None = None
    max_batch_tokens: int = 512
    max_batch_requests: int = 64
    max_waiting_requests: int = 256
    max_waiting_tokens: int = 1_000_000
