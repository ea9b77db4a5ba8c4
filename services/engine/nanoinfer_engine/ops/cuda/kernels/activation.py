"""The activations of a gated MLP, for kernels that end in one; names as in `ModelConfig`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """Of float32 values; "silu", "gelu" (exact) or "gelu_tanh"."""
    if ACTIVATION == "gelu":
        result = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        scaled = x
        if ACTIVATION == "gelu_tanh":
            # 0.5 * (1 + tanh(y)) is the logistic function of 2 * y
            scaled = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        result = x / (1.0 + tl.exp(-scaled))
    return result
