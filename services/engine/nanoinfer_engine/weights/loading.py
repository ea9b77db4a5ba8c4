"""Checkpoint → model, shard by shard, every name and shape accounted for beforehand.

The fingerprint tells two sets of weights apart at the cost of reading what is loaded anyway: the
SHA-256 over all used tensors, in name order, of (name, dtype, shape, SHA-256 of three 4 KiB samples
of the stored bytes: start, middle, end). It does not depend on how the tensors are sharded. It is
no proof against tampering: bytes outside the samples may differ unseen.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanoinfer_engine.core.config import CheckpointError
from nanoinfer_engine.core.progress import LoadProgress, Progress
from nanoinfer_engine.models import Decoder
from nanoinfer_engine.models.names import CheckpointLayout
from nanoinfer_engine.ops.linear import Copy, Linear
from nanoinfer_engine.ops.modules import Norm
from nanoinfer_engine.weights.checkpoints import Checkpoint, Part
from nanoinfer_engine.weights.staging import Staging

SAMPLE_BYTES = 4096


@dataclass(frozen=True)
class Placement:
    """One checkpoint tensor and the rows [first, first + rows) of the parameter that it fills.

    Of the tensor only `part` is read, where one is given; `shape` is that part's.
    """

    stored_name: str
    parameter: str
    first: int
    shape: tuple[int, ...]
    transposed: bool
    part: Part | None = None

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape in the checkpoint."""
        return self.shape[::-1] if self.transposed else self.shape

    @property
    def numel(self) -> int:
        """Elements of the tensor."""
        return torch.Size(self.shape).numel()


def load_weights(
    model: Decoder,
    checkpoint: Checkpoint,
    layout: CheckpointLayout,
    device: torch.device,
    progress: Progress,
    placements: Sequence[Placement] | None = None,
) -> str:
    """Fill `model` (on the meta device) from `checkpoint`; returns the fingerprint in hex.

    `placements` say from where, if not as `plan_placements` does; the fingerprint is of the whole
    tensors that they name. What none fills is 0.

    Memory is allocated only once all names and shapes fit. Tensors come in the order of their
    files, so that one file is open at a time; a module keeps them in its own format.
    Raises CheckpointError naming the missing, unexpected or misshapen tensor.
    """
    if placements is None:
        placements = plan_placements(model, checkpoint, layout)
    placements = sorted(placements, key=lambda each: checkpoint.shard(each.stored_name))
    parameters = dict(model.named_parameters())
    sizes = [each.numel * parameters[each.parameter].element_size() for each in placements]
    total, loaded = sum(sizes), 0
    samples: dict[str, str] = {}
    for module in model.modules():
        if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            model.allocate(module, device)
    copy: Copy = Staging(device).copy if device.type == "cuda" else _copy
    progress(LoadProgress(0, total, 1, checkpoint.num_shards))
    for placement, size in zip(placements, sizes, strict=True):
        stored = checkpoint.read(placement.stored_name, placement.part)
        _place(model, placement, stored, copy)
        name = _plain_name(placement.stored_name, layout.prefix)
        if name not in samples:
            samples[name] = _digest(checkpoint, placement.stored_name)
        loaded += size
        shard = checkpoint.shard(placement.stored_name) + 1
        progress(LoadProgress(loaded, total, shard, checkpoint.num_shards))
    _check_tied(checkpoint, layout, placements, model)
    lines = (f"{name} {digest}\n" for name, digest in sorted(samples.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _place(model: Decoder, placement: Placement, stored: Tensor, copy: Copy) -> None:
    """Copy a tensor to where it belongs, in the format of its module."""
    tensor = stored.t() if placement.transposed else stored
    name, _, kind = placement.parameter.rpartition(".")
    module = model.get_submodule(name)
    if isinstance(module, Linear) and kind == "weight":
        module.load_rows(placement.first, tensor, copy)
        return
    target = model.get_parameter(placement.parameter)
    part = target[placement.first : placement.first + placement.shape[0]]
    copy(tensor, part)
    if isinstance(module, Norm) and kind == "weight":
        part += module.offset


def _copy(source: Tensor, target: Tensor) -> None:
    target.copy_(source)


def plan_placements(
    model: Decoder, checkpoint: Checkpoint, layout: CheckpointLayout
) -> list[Placement]:
    """Where each tensor goes; CheckpointError unless names and shapes match one to one."""
    stored = _stored_names(checkpoint, layout)
    filled = dict.fromkeys((name for name, _ in model.named_parameters()), 0)
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    placements = []
    for source in layout.sources:
        for kind in ("weight", "bias"):
            parameter = f"{source.ours}.{kind}"
            if parameter not in filled:
                continue
            name = f"{source.theirs}.{kind}"
            if name not in stored:
                raise CheckpointError(f"{name}: missing from the checkpoint")
            rows = source.rows or shapes[parameter][0]
            placement = Placement(
                stored_name=stored.pop(name),
                parameter=parameter,
                first=filled[parameter],
                shape=(rows, *shapes[parameter][1:]),
                transposed=source.transposed and kind == "weight",
            )
            _check_shape(checkpoint, placement)
            filled[parameter] += rows
            placements.append(placement)
    if layout.tied:
        stored.pop(layout.tied[0], None)
    if stored:
        raise CheckpointError(f"{min(stored.values())}: not a tensor of this architecture")
    return placements


def _stored_names(checkpoint: Checkpoint, layout: CheckpointLayout) -> dict[str, str]:
    """Name without prefixes → name in the checkpoint; what holds no weights is left out."""
    stored: dict[str, str] = {}
    for name in checkpoint.shapes:
        plain = _plain_name(name, layout.prefix)
        if plain in stored:
            raise CheckpointError(f"{name}: stored twice, also as {stored[plain]}")
        if not layout.ignored.fullmatch(plain):
            stored[plain] = name
    return stored


def _plain_name(name: str, prefix: str) -> str:
    """Drop what torch.compile and the model class put in front."""
    return name.removeprefix("_orig_mod.").removeprefix(prefix)


def _check_shape(checkpoint: Checkpoint, placement: Placement) -> None:
    shape = checkpoint.shapes[placement.stored_name]
    if shape != placement.stored_shape:
        raise CheckpointError(
            f"{placement.stored_name}: shape {list(shape)},"
            f" but the configuration wants {list(placement.stored_shape)}"
        )


def _check_tied(
    checkpoint: Checkpoint,
    layout: CheckpointLayout,
    placements: Sequence[Placement],
    model: Decoder,
) -> None:
    """A tied tensor that is stored again must say the same."""
    if layout.tied is None:
        return
    plain_name, parameter = layout.tied
    (tied,) = (each for each in placements if each.parameter == parameter)
    target = model.get_parameter(parameter)[: tied.shape[0]]
    for name, shape in checkpoint.shapes.items():
        if _plain_name(name, layout.prefix) == plain_name:
            fits = shape == checkpoint.shapes[tied.stored_name]
            if not fits or not torch.equal(checkpoint.read(name, tied.part).to(target), target):
                raise CheckpointError(f"{name}: differs from the embedding that it is tied to")


def _digest(checkpoint: Checkpoint, name: str) -> str:
    """dtype, shape and a hash of three samples of the tensor's bytes; no more of it is read."""
    shape = checkpoint.shapes[name]
    total, width = math.prod(shape), math.prod(shape[1:])
    first = checkpoint.read(name, Part(0, 0, 1))
    count = SAMPLE_BYTES // first.element_size()
    sha = hashlib.sha256()
    for start in (0, max((total - count) // 2, 0), max(total - count, 0)):
        stop, row = min(start + count, total), start // width
        rows = checkpoint.read(name, Part(0, row, -(-stop // width))).reshape(-1)
        sample = rows[start - row * width : stop - row * width].contiguous()
        sha.update(sample.view(torch.uint8).cpu().numpy().tobytes())
    return f"{first.dtype} {shape} {sha.hexdigest()}"
