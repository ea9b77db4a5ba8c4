"""The model topologies, and how one is chosen for a configuration."""

from __future__ import annotations

import torch

from nanoinfer_engine.core.config import ModelConfig
from nanoinfer_engine.models import decoder, gpt2
from nanoinfer_engine.models.layout import CheckpointLayout

LanguageModel = decoder.Decoder | gpt2.GPT2


def build_model(
    config: ModelConfig, max_positions: int, dtype: torch.dtype, device: torch.device
) -> LanguageModel:
    """The model for `config` with parameters on the meta device: no memory, no values yet."""
    if config.topology == "gpt2":
        with torch.device("meta"):
            return gpt2.GPT2(config).to(dtype)
    rotary = decoder.rotary_table(config, max_positions, dtype, device)
    with torch.device("meta"):
        return decoder.Decoder(config, rotary).to(dtype)


def checkpoint_layout(config: ModelConfig) -> CheckpointLayout:
    """How the checkpoint's tensor names map onto `build_model(config)`'s parameters."""
    if config.topology == "gpt2":
        return gpt2.checkpoint_layout(config)
    return decoder.checkpoint_layout(config)
