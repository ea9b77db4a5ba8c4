"""The number format that a model is computed in: what the configuration says, or the checkpoint's.

A model that was trained in bfloat16 may have activations beyond float16's 65,504 (Qwen2 is known
for it), so `auto` never narrows a checkpoint's range where the device can help it.
"""

from __future__ import annotations

import math

import torch

from nanoinfer_engine.weights.checkpoints import Checkpoint, Part

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AUTO = "auto"


def choose_dtype(wanted: str, checkpoint: Checkpoint, device: torch.device) -> str:
    """A name of DTYPES: `wanted` itself, or for `auto` float32 but on a CUDA device.

    There it is the checkpoint's own: bfloat16, float16, and for float32 or more the bfloat16 that
    has its range. A device that computes no bfloat16 takes float32 for the one and float16 for the
    other. Raises ValueError for an unknown name, CheckpointError for tensors that are no floats.
    """
    if wanted != AUTO:
        if wanted not in DTYPES:
            raise ValueError(f"dtype {wanted!r} is not one of {AUTO}, {', '.join(DTYPES)}")
        return wanted
    if device.type != "cuda":
        return "float32"
    stored = stored_format(checkpoint)
    if stored == torch.float16:
        return "float16"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bfloat16"
    return "float32" if stored == torch.bfloat16 else "float16"


def stored_format(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype of the checkpoint's largest tensor: small ones, such as norms, may be kept wider.

    Raises CheckpointError where that is no tensor of floats.
    """
    largest = max(checkpoint.shapes, key=lambda name: math.prod(checkpoint.shapes[name]))
    return checkpoint.read(largest, Part(0, 0, 1)).dtype
