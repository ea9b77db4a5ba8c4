"""Which kernel multiplies by which weight at which batch size, measured on the weights themselves.

Timing runs over the matrices of many layers in turn, inside a CUDA graph, so that a matrix is read
from memory and not from the cache, and the host takes no part.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from nanoinfer_engine.ops.cuda.algorithms import MANY_ROWS, shortlist
from nanoinfer_engine.ops.cuda.kernels.cublaslt import Algorithm, multiply
from nanoinfer_engine.ops.cuda.kernels.linear import GemvShape, TileShape, few_rows, gemv
from nanoinfer_engine.ops.cuda.kernels.norms import gate_mul
from nanoinfer_engine.ops.cuda.kernels.quantize import quantize_rows
from nanoinfer_engine.ops.cuda.tuning import time_graph
from nanoinfer_engine.ops.quantization import scaled_product

_LOG = logging.getLogger(__name__)

Choice = GemvShape | TileShape | Algorithm | None
"""None is what cuBLAS chooses by itself, for 8-bit weights with 8-bit activations."""

FEW_ROWS = (8, 16, 32, 64)
"""Batch sizes up to which a kernel of our own is tried; beyond the last, cuBLAS multiplies."""

REFINED_ROWS = (*FEW_ROWS, 128, 256)
"""Batch sizes at which the choice is made again within whole steps."""

Lists = Mapping[int, Sequence[Algorithm]]
"""The fastest algorithms by the number of rows at which they were looked for."""

_DECODE_STEP = 32
_SEARCHED_PROMPTS = (MANY_ROWS, 2048, 16384, 65536)
# between 256 and 2,048 rows a product has few tiles, so which ones fit changes with every size
_PROMPT_ROWS = sorted(
    {*range(320, 640, 64), *range(640, 1280, 128), 1280, 1536, 1792, 4096, *_SEARCHED_PROMPTS}
)

_TUNED_BYTES = 256 << 20
_CLOSE, _BETTER = 1.15, 0.997
_GEMV_SHAPES = (
    GemvShape(1, 512, 1),
    GemvShape(1, 1024, 1),
    GemvShape(1, 1024, 2),
    GemvShape(2, 1024, 2),
    GemvShape(2, 512, 2),
    GemvShape(4, 512, 4),
    GemvShape(1, 2048, 4),
    GemvShape(1, 4096, 4),
)
_TILE_SHAPES = (
    TileShape(16, 256, 1, 2, 4),
    TileShape(32, 128, 1, 4, 5),
    TileShape(32, 128, 2, 4, 5),
    TileShape(32, 128, 4, 4, 4),
    TileShape(64, 128, 1, 4, 4),
    TileShape(64, 128, 2, 4, 4),
    TileShape(64, 128, 4, 4, 3),
    TileShape(64, 64, 2, 4, 6),
    TileShape(128, 64, 1, 4, 4),
)
# of 8-bit weights a tile of as many bytes has twice the columns
_WIDE_TILE_SHAPES = tuple(replace(shape, block_k=2 * shape.block_k) for shape in _TILE_SHAPES)


@dataclass(frozen=True)
class Linear:
    """One matrix product of the decoder.

    `scale` is for each row of an 8-bit weight. `gated` ends in `activation` · mul; one that `joins`
    goes into the residual sum, so it may be added there or given in parts; `gain` is of the RMSNorm
    before it, where a GEMV is to take that in.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: Tensor | None = None
    gated: bool = False
    activation: str = "silu"
    joins: bool = False
    gain: Tensor | None = None

    @property
    def num_outputs(self) -> int:
        """Width of the result."""
        return self.weight.shape[0] // 2 if self.gated else self.weight.shape[0]


def apply_linear(x: Tensor, linear: Linear, choice: Choice, pdl: bool) -> Tensor:
    """[rows, in] → parts [parts, rows, out] whose sum is the product; no GEMV (see there).

    Where activations of 8 bits multiply, what is not gated comes as bfloat16: whoever reads it
    converts it anyway.
    """
    shape = (len(x), linear.num_outputs)
    if isinstance(choice, TileShape):
        dtype = torch.float32 if choice.splits > 1 else x.dtype
        output = torch.empty((choice.splits, *shape), dtype=dtype, device=x.device)
        return few_rows(
            x,
            linear.weight,
            output,
            choice,
            scale=linear.scale,
            bias=linear.bias,
            gated=linear.gated,
            activation=linear.activation,
            pdl=pdl,
        )
    if isinstance(choice, Algorithm):
        product = torch.empty((len(x), len(linear.weight)), dtype=x.dtype, device=x.device)
        multiply(x, linear.weight, product, choice)
    elif linear.scale is None:
        product = torch.nn.functional.linear(x, linear.weight, linear.bias)
    else:
        product = quantized_product(quantize_rows(x, pdl=pdl), linear)
    if not linear.gated:
        return product.unsqueeze(0)
    output = torch.empty(shape, dtype=x.dtype, device=x.device)
    return gate_mul(product, linear.activation, output, pdl=pdl).unsqueeze(0)


def join_linear(
    x: Tensor, linear: Linear, choice: Choice, residual: Tensor, pdl: bool
) -> Tensor | None:
    """The same for a product that goes into `residual` [rows, out]; None once it is in there."""
    if not linear.joins or linear.scale is not None or isinstance(choice, TileShape):
        return apply_linear(x, linear, choice, pdl)
    if isinstance(choice, Algorithm):
        multiply(x, linear.weight, residual, choice, add=True)
    else:
        torch.addmm(residual, x, linear.weight.t(), out=residual)
    return None


def quantized_product(rows: tuple[Tensor, Tensor], linear: Linear) -> Tensor:
    """[rows, in] as e4m3 and scales, by an 8-bit weight → [rows, rows of the weight] in bfloat16.

    Without what `gated` does. Raises ValueError for a weight that has no scale.
    """
    if linear.scale is None:
        raise ValueError("the weight has no scale")
    product = scaled_product(*rows, linear.weight, linear.scale)
    if linear.bias is not None:
        product += linear.bias
    return product


@dataclass
class LinearTable:
    """The choices, by name of the product and batch size, for activations of `dtype`."""

    dtype: torch.dtype
    choices: dict[str, dict[int, Choice]] = field(default_factory=dict)
    _runners_up: dict[tuple[str, int], list[Choice]] = field(default_factory=dict)

    def tune(self, name: str, linears: Sequence[Linear], sizes: Sequence[int], pdl: bool) -> None:
        """Choose by measuring product `name` on the weights of several layers.

        `sizes` are numbers of rows, ascending.
        """
        count = max(1, min(len(linears), _TUNED_BYTES // linears[0].weight.nbytes + 1))
        sample = list(linears[:count])
        chosen = self.choices.setdefault(name, {})
        lists = _lists(sample, sizes)
        for rows in sizes:
            candidates = _candidates(rows, sample[0], lists)
            if len(candidates) == 1:
                chosen[rows] = candidates[0]
                continue
            timings: dict[Choice, float] = {}
            for choice in candidates:
                try:
                    timings[choice] = _time(sample, rows, choice, pdl, self.dtype)
                except Exception as error:  # a shape this device cannot hold is no candidate
                    _LOG.debug("%s × %d: %s: %s", name, rows, choice, error)
            ranked = sorted(timings, key=lambda each: timings[each])
            if not ranked:
                _LOG.warning("%s × %d: nothing could be measured", name, rows)
                chosen[rows] = None
                continue
            chosen[rows] = ranked[0]
            _LOG.debug("%s × %d: %s", name, rows, timings)
            bound = _CLOSE * timings[ranked[0]]
            close = [choice for choice in ranked[1:] if timings[choice] < bound]
            # the next one, and the next of another kind
            others = [choice for choice in close[1:] if type(choice) is not type(ranked[0])]
            self._runners_up[name, rows] = [*close[:1], *others[:1]]

    def refine(self, rows: int, measure: Callable[[], float]) -> None:
        """Keep close candidates where they make a whole step of `rows` rows shorter.

        `measure` gives the step's time in microseconds. In a step kernels begin before their
        neighbours have ended, so what one takes alone does not decide.
        """
        least = measure()
        for name, chosen in self.choices.items():
            for choice in self._runners_up.get((name, rows), ()):
                before, chosen[rows] = chosen[rows], choice
                if (time := measure()) < _BETTER * least:
                    least = time
                else:
                    chosen[rows] = before

    def choice(self, name: str, rows: int) -> Choice:
        """What multiplies `rows` rows: what the next tuned size has; a GEMV for one row alone."""
        chosen = self.choices.get(name, {})
        if rows <= 1:
            return chosen.get(1)
        larger = [size for size in chosen if size >= rows]
        return chosen[min(larger)] if larger else None


def tuned_sizes(max_rows: int, max_tokens: int) -> list[int]:
    """Numbers of rows at which products are measured: densely up to a decode step's most."""
    decode = range(FEW_ROWS[-1] + _DECODE_STEP, max_rows + _DECODE_STEP, _DECODE_STEP)
    prompts = [rows for rows in _PROMPT_ROWS if max_rows < rows < max_tokens]
    return sorted({1, *FEW_ROWS, *decode, *prompts, max(max_tokens, max_rows)})


def _lists(linears: Sequence[Linear], sizes: Sequence[int]) -> Lists:
    """For sizes that a step often has; those between them make do with their neighbours'."""
    if linears[0].bias is not None:
        return {}
    weights, joins = [each.weight for each in linears], linears[0].joins
    lists: dict[int, Sequence[Algorithm]] = {}
    for rows in {*REFINED_ROWS, *_SEARCHED_PROMPTS, sizes[-1]}.intersection(sizes) - {1}:
        try:
            lists[rows] = shortlist(weights, rows, joins=joins)
        except Exception as error:  # what cannot be looked for is cuBLAS's own choice
            _LOG.warning("%s × %d: %s", tuple(weights[0].shape), rows, error)
    return dict(sorted(lists.items()))


def _candidates(rows: int, linear: Linear, lists: Lists) -> list[Choice]:
    columns = linear.weight.shape[1]
    if rows == 1:
        # None for columns too few for any of them
        return [shape for shape in _GEMV_SHAPES if shape.block_k < 2 * columns] or [None]
    if rows >= MANY_ROWS and lists.get(rows):
        return list(lists[rows][:1])  # measured well enough where they were looked for
    candidates: list[Choice] = [None]
    if rows <= FEW_ROWS[-1]:
        shapes = _TILE_SHAPES if linear.scale is None else (*_TILE_SHAPES, *_WIDE_TILE_SHAPES)
        candidates += (
            shape
            for shape in shapes
            if columns % (shape.block_k * shape.splits) == 0 and (shape.splits == 1 or linear.joins)
        )
    if rows in lists:
        return [*candidates, *lists[rows]]
    near = [*[size for size in lists if size < rows][-1:], *[s for s in lists if s > rows][:1]]
    return [*candidates, *dict.fromkeys(each for size in near for each in lists[size])]


def _time(
    linears: Sequence[Linear], rows: int, choice: Choice, pdl: bool, dtype: torch.dtype
) -> float:
    """Median microseconds of one product."""
    weight = linears[0].weight
    x = torch.randn(rows, weight.shape[1], device=weight.device, dtype=dtype)
    output = torch.zeros(rows, linears[0].num_outputs, device=weight.device, dtype=dtype)

    def run() -> None:
        for linear in linears:
            if isinstance(choice, GemvShape):
                gemv(
                    x,
                    linear.weight,
                    output,
                    choice,
                    scale=linear.scale,
                    bias=linear.bias,
                    gain=linear.gain,
                    gated=linear.gated,
                    activation=linear.activation,
                    residual=linear.joins,
                    pdl=pdl,
                )
            else:
                join_linear(x, linear, choice, output, pdl)

    return time_graph(run) / len(linears)
