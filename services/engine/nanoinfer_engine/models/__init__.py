"""The decoder, and what a checkpoint calls its parts."""

from __future__ import annotations

import torch

from nanoinfer_engine.core.config import ModelConfig
from nanoinfer_engine.models.decoder import Decoder, rotary_tables
from nanoinfer_engine.models.names import checkpoint_layout
from nanoinfer_engine.ops.linear import FullLinear, Linear

__all__ = ["Decoder", "build_model", "checkpoint_layout"]


def build_model(
    config: ModelConfig,
    max_positions: int,
    dtype: torch.dtype,
    device: torch.device,
    linear: type[Linear] = FullLinear,
) -> Decoder:
    """The model for `config` with parameters on the meta device: no memory, no values yet.

    `linear` is the format of the layers' weights; CheckpointError where it cannot hold one.
    """
    rotary = rotary_tables(config, max_positions, dtype, device)
    with torch.device("meta"):
        return Decoder(config, dtype, linear, rotary)
