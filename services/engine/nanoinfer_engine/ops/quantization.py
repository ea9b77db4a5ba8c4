"""FP8 from outside: 8-bit linears in the place of a model's own, made while weights are loaded.

e4m3 has three bits of mantissa and reaches ±448. A weight has a scale for each output, an
activation one for each row, so that neither a large channel nor another request's token costs
anybody precision. This is the plain form; `linears` has the one for the decoder's kernels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from nanoinfer_engine.core.config import CheckpointError, EngineConfig
from nanoinfer_engine.ops.kv_cache import FP8, FP8_MAX

SMALLEST_SCALE = 1e-12
"""What a row of zeros is divided by."""

_MULTIPLE = 16  # of both sides of a weight: the matrix units' tiles
_CAPABILITY = (8, 9)
_ROWS_AT_ONCE = 1024


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """[rows, width] → e4m3 values and float32 scales [rows, 1] whose product is x, rounded.

    A NaN or infinity makes its whole row NaN when that is multiplied.
    """
    largest = x.abs().amax(-1, keepdim=True)
    scales = (largest.float() / FP8_MAX).clamp(min=SMALLEST_SCALE)
    return (x / scales).to(FP8), scales


def scaled_product(values: Tensor, scales: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """(values · scales) @ (weight · weight_scale) transposed, in bfloat16, on a CUDA device.

    [rows, in] e4m3 with [rows, 1], [out, in] e4m3 with [out]. bfloat16 is the one result that
    `torch._scaled_mm` gives everywhere where every row has its scale.
    """
    return torch._scaled_mm(
        values,
        weight.t(),
        scales,
        weight_scale.unsqueeze(0),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


class Fp8Linear(nn.Module):
    """A linear layer of e4m3 weights [out, in] and float32 scales [out]; e4m3 activations."""

    def __init__(self, linear: nn.Linear) -> None:
        """Quantise `linear`, a thousand outputs at a time; the bias is shared."""
        super().__init__()
        source = linear.weight
        weight = torch.empty(source.shape, dtype=FP8, device=source.device)
        scale = torch.empty(len(source), dtype=torch.float32, device=source.device)
        for start in range(0, len(source), _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            weight[part], scales = quantize_rows(source[part])
            scale[part] = scales[:, 0]
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """[rows, in] → [rows, out] in the dtype of `x`; on the CPU the same sums, slowly."""
        values, scales = quantize_rows(x)
        if x.is_cuda:
            product = scaled_product(values, scales, self.weight, self.scale).to(x.dtype)
        else:
            product = values.float() @ self.weight.float().t()
            product = (product * scales * self.scale).to(x.dtype)
        return product if self.bias is None else product + self.bias


def check_device(config: EngineConfig, device: torch.device) -> None:
    """ValueError where the configuration asks for FP8 of a CUDA device that does not know it."""
    if "fp8" not in (config.quantization, config.kv_cache_dtype) or device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < _CAPABILITY:
        raise ValueError(
            f"fp8 needs compute capability {_CAPABILITY[0]}.{_CAPABILITY[1]},"
            f" the device has {capability[0]}.{capability[1]}"
        )


def quantizer(scheme: str, model: nn.Module) -> Callable[[str], None]:
    """What to call with the name of each module of `model` once its weights are there.

    It puts Fp8Linear in the place of the layers' linears; head, embeddings and norms stay. Raises
    ValueError for an unknown scheme, and CheckpointError for a linear that does not fit.
    """
    if scheme not in ("none", "fp8"):
        raise ValueError(f"quantization {scheme!r} is not one of none, fp8")
    linears = {
        name: module
        for name, module in model.named_modules()
        if scheme == "fp8" and name.startswith("layers.") and isinstance(module, nn.Linear)
    }
    for name, linear in linears.items():
        if linear.in_features % _MULTIPLE or linear.out_features % _MULTIPLE:
            raise CheckpointError(
                f"{name}: {linear.out_features} × {linear.in_features} cannot be quantised to fp8:"
                f" both must be multiples of {_MULTIPLE}"
            )

    def quantize(name: str) -> None:
        linear = linears.pop(name, None)
        if linear is not None:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, Fp8Linear(linear))

    return quantize
