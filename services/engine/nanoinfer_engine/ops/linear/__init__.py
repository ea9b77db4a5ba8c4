"""Linear layers by weight format: one file a format, one table of their names."""

from __future__ import annotations

from nanoinfer_engine.core.config import WeightFormat
from nanoinfer_engine.ops.linear.base import Copy, Linear
from nanoinfer_engine.ops.linear.fp8 import Fp8Linear
from nanoinfer_engine.ops.linear.full import FullLinear
from nanoinfer_engine.ops.linear.int8 import Int8Linear

__all__ = ["FORMATS", "Copy", "Fp8Linear", "FullLinear", "Linear", "linear_format"]

FORMATS: dict[WeightFormat, type[Linear]] = {
    "none": FullLinear,
    "fp8": Fp8Linear,
    "int8": Int8Linear,
}
"""Weight formats by the name in the setting `quantization`."""


def linear_format(name: str) -> type[Linear]:
    """The format called `name`; ValueError where there is none."""
    for known, linear in FORMATS.items():
        if name == known:
            return linear
    raise ValueError(f"quantization {name!r} is not one of {', '.join(FORMATS)}")
