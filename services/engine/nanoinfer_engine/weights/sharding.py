"""A model's share for one rank of several: its sizes, what it reads, what it adds up.

Cut from outside, the model files know nothing of it: heads and columns of the MLP go to the ranks
in equal parts, and what attention and MLP give is added up; of the vocabulary each rank has a range
of ids, embeddings are added up and logits gathered. Norms are everybody's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from nanoinfer_engine.core.config import ModelConfig
from nanoinfer_engine.models import Decoder, build_model, checkpoint_layout
from nanoinfer_engine.ops.collectives import Rank
from nanoinfer_engine.ops.linear import FullLinear, Linear
from nanoinfer_engine.weights.checkpoints import Checkpoint, Part
from nanoinfer_engine.weights.loading import Placement, plan_placements


@dataclass(frozen=True)
class Share:
    """A rank's model (on the meta device), its sizes, and where its parameters are stored."""

    model: Decoder
    config: ModelConfig
    placements: Sequence[Placement]
    num_parameters: int
    """Of the whole model."""


def take_share(
    checkpoint: Checkpoint,
    rank: Rank,
    max_positions: int,
    dtype: torch.dtype,
    device: torch.device,
    linear: type[Linear] = FullLinear,
) -> Share:
    """A rank's part of the checkpoint's model; the model itself where the rank is alone.

    `linear` is the format of the layers' weights.

    Raises CheckpointError for tensors that do not fit and ValueError for a model that cannot be
    shared by so many.
    """
    whole, layout = checkpoint.config, checkpoint_layout(checkpoint.config)
    config = local_config(whole, rank.size)
    model = build_model(config, max_positions, dtype, device, linear)
    of_all = model if rank.size == 1 else build_model(whole, 1, dtype, device)
    placements: Iterable[Placement] = plan_placements(of_all, checkpoint, layout)
    num_parameters = sum(placement.numel for placement in placements)
    if rank.size > 1:
        placements = (piece for each in placements for piece in _pieces(each, whole, rank))
    return Share(model, config, tuple(placements), num_parameters)


def local_config(config: ModelConfig, size: int) -> ModelConfig:
    """The sizes of one of `size` shares; ValueError names what does not divide.

    The vocabulary is rounded up: the last share may hold padding.
    """
    if size == 1:
        return config
    if config.topology != "decoder":
        raise ValueError(f"tensor_parallel is {size}, but {config.model_type} runs on one device")
    for name, value in (
        ("num_attention_heads", config.num_heads),
        ("num_key_value_heads", config.num_kv_heads),
        ("intermediate_size", config.intermediate_size),
    ):
        if value % size:
            raise ValueError(f"{name} {value} is not a multiple of tensor_parallel {size}")
    num_ids = -(-config.vocab_size // size)
    if num_ids * (size - 1) >= config.vocab_size:
        raise ValueError(f"vocab_size {config.vocab_size} is too small for tensor_parallel {size}")
    return replace(
        config,
        num_heads=config.num_heads // size,
        num_kv_heads=config.num_kv_heads // size,
        intermediate_size=config.intermediate_size // size,
        vocab_size=num_ids,
    )


def _pieces(placement: Placement, config: ModelConfig, rank: Rank) -> list[Placement]:
    """What a rank reads of a tensor of the whole model, and where it puts it."""
    module, _, kind = placement.parameter.rpartition(".")
    name = module.rpartition(".")[2]
    if name in ("embedding", "head"):
        count = -(-config.vocab_size // rank.size)
        stop = min((rank.index + 1) * count, config.vocab_size)
        return [_rows(placement, 0, rank.index * count, stop)]
    if name == "qkv":
        keys = config.num_kv_heads * config.head_dim
        return _parts(placement, (config.num_heads * config.head_dim, keys, keys), rank)
    if name == "up":
        return _parts(placement, (config.intermediate_size, config.intermediate_size), rank)
    if name in ("output", "down"):
        if kind == "bias":  # added up with the products, so by one rank alone
            return [placement] if rank.index == 0 else []
        width = placement.shape[1] // rank.size
        part = Part(1, rank.index * width, (rank.index + 1) * width)
        return [replace(placement, shape=(placement.shape[0], width), part=part)]
    return [placement]


def _parts(placement: Placement, sizes: Sequence[int], rank: Rank) -> list[Placement]:
    """A rank's rows of each part of a fused parameter that the tensor holds."""
    pieces, start = [], 0
    for size in sizes:
        if placement.first <= start < placement.first + placement.shape[0]:
            count = size // rank.size
            stored = start - placement.first + rank.index * count
            pieces.append(_rows(placement, start // rank.size, stored, stored + count))
        start += size
    return pieces


def _rows(placement: Placement, first: int, start: int, stop: int) -> Placement:
    """Rows [start, stop) of the tensor, to `first` of the parameter."""
    shape = (stop - start, *placement.shape[1:])
    return replace(placement, first=first, shape=shape, part=Part(0, start, stop))
