"""The operations on a CUDA device: Triton kernels where they win, cuBLAS and PyTorch elsewhere.

The residual stream waits as parts until the next norm adds them up, so that a product may be split
without a launch to join it. For one row a GEMV takes in the norm before it, the gate and the
residual sum. Of several ranks each adds up whole products, never a residual or parts: which kernel
a rank has chosen changes neither what they exchange nor what it means.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from nanoinfer_engine.ops.collectives import ALONE, Rank
from nanoinfer_engine.ops.cuda.attention import PagedAttention, PagedPlan
from nanoinfer_engine.ops.cuda.kernels.heads import HeadTransform
from nanoinfer_engine.ops.cuda.kernels.linear import GemvShape, TileShape, few_rows, gemv
from nanoinfer_engine.ops.cuda.kernels.norms import add_norm, embed, gate_mul
from nanoinfer_engine.ops.cuda.kernels.quantize import quantize_rows
from nanoinfer_engine.ops.cuda.products import FEW_ROWS, ProductKind, TuningTable
from nanoinfer_engine.ops.kv_cache import FP8
from nanoinfer_engine.ops.linear import Fp8Linear, FullLinear, Linear
from nanoinfer_engine.ops.linear.fp8 import scaled_product
from nanoinfer_engine.ops.modules import Activation, AttentionLayer, Norm

_MAX_FUSED_NORM = 2048  # hidden sizes beyond cost a GEMV too many registers for the norm
# beyond these rows the launches are long enough to hide one another; with several ranks none starts
# early, because NCCL's kernels stand between ours
PDL_ROWS = 64


@dataclass(frozen=True)
class CudaStep:
    """[tokens] int32 ids; where `sources` is not negative, `sampled[source]` is the id instead."""

    token_ids: Tensor
    sources: Tensor
    sampled: Tensor
    plan: PagedPlan

    def positions(self) -> Tensor:
        """[tokens] of decode rows and prompts; 0 for padding."""
        decodes = (self.plan.contexts - 1).clamp_(min=0)
        if self.plan.prompts is None:
            return decodes
        return torch.cat([decodes, self.plan.prompts.positions])


@dataclass
class Stream:
    """The residual stream [tokens, hidden] and parts still to be added, [parts, tokens, hidden].

    The next norm adds them. With `pdl` kernels may start before their predecessors have ended.
    """

    residual: Tensor
    delta: Tensor | None
    pdl: bool

    def select(self, tokens: Tensor) -> Stream:
        """Copies of some tokens' rows."""
        delta = None if self.delta is None else self.delta.index_select(1, tokens)
        return replace(self, residual=self.residual.index_select(0, tokens), delta=delta)


@dataclass(frozen=True)
class Gated:
    """A product of 8-bit operands whose activation is left to the kernel that quantises it."""

    product: Tensor
    activation: str


Inner = Tensor | Gated


@dataclass(frozen=True)
class _Product:
    """A linear layer as the kernels take it; `shapes` has a tile for each number of few rows."""

    linear: Linear
    weight: Tensor
    kind: ProductKind
    scale: Tensor | None
    activation: Activation | None
    gemv: GemvShape | None
    shapes: dict[int, TileShape | None]

    @property
    def gated(self) -> bool:
        return self.activation is not None and self.activation.gated

    @property
    def num_outputs(self) -> int:
        return self.linear.out_features // 2 if self.gated else self.linear.out_features


class CudaOps:
    """Operations over one paged cache, for steps of any mix of rows."""

    def __init__(
        self,
        attention: PagedAttention,
        table: TuningTable,
        dtype: torch.dtype,
        rank: Rank = ALONE,
        vocab_size: int = 0,
        pdl_rows: int = PDL_ROWS,
    ) -> None:
        """`vocab_size` is the whole model's, `dtype` that of activations.

        Steps of up to `pdl_rows` rows use programmatic dependent launch.
        """
        self._attention, self._table, self._dtype = attention, table, dtype
        self._rank, self._vocab_size = rank, vocab_size
        self.pdl_rows = pdl_rows if rank.size == 1 else 0
        self._products: dict[Linear, _Product] = {}
        self._transforms: dict[AttentionLayer, HeadTransform] = {}

    def embed(
        self,
        table: nn.Embedding,
        positions: nn.Embedding | None,
        step: CudaStep,
        scale: float = 1.0,
    ) -> Stream:
        """Ids that the step before has sampled are read on the device."""
        weight, count = table.weight, len(step.token_ids)
        pdl = step.plan.prompts is None and count <= self.pdl_rows
        residual = torch.empty((count, weight.shape[1]), dtype=self._dtype, device=weight.device)
        first = self._rank.index * len(weight)
        embed(step.token_ids, step.sources, step.sampled, weight, residual, first=first, pdl=pdl)
        self._rank.add_up(residual)
        if scale != 1.0:
            residual *= scale
        if positions is not None:
            residual += functional.embedding(step.positions(), positions.weight)
        return Stream(residual, None, pdl)

    def project(
        self, stream: Stream, norm: Norm, linear: Linear, activation: Activation | None = None
    ) -> Inner:
        """Norm, product and gate in one launch for one row, in two or three for more."""
        product = self._product(linear, activation)
        rows = len(stream.residual)
        if not rows:
            return self._empty(0, product.num_outputs)
        fuses = norm.kind == "rms" and self._rank.size == 1
        fuses = fuses and linear.in_features <= _MAX_FUSED_NORM and stream.delta is None
        if rows == 1 and product.gemv is not None and fuses:
            return self._gemv(product, product.gemv, stream.residual, stream.pdl, norm=norm)
        if _in_8_bits(product, rows) and norm.kind == "rms":
            values = torch.empty_like(stream.residual, dtype=FP8)
            scales = self._empty(rows, 1, dtype=torch.float32)
            self._add_norm(stream, norm, values, scales)
            wide = _scaled(values, scales, product)
            if activation is None:
                return wide
            return Gated(wide, activation.name) if activation.gated else activation(wide)
        return self._multiply(product, self._normed(stream, norm), stream.pdl)

    def attend(self, layer: AttentionLayer, qkv: Inner, step: CudaStep) -> Tensor:
        """Decode rows by one kernel, prompts by others; the plan says which rows are which."""
        if isinstance(qkv, Gated):
            raise TypeError("heads have no activation")
        if layer not in self._transforms:
            norms = layer.query_norm, layer.key_norm
            gains = [None if norm is None else norm.weight for norm in norms]
            eps = 0.0 if layer.query_norm is None else layer.query_norm.eps
            self._transforms[layer] = HeadTransform(layer.rotary, gains[0], gains[1], eps)
        count, pdl = len(qkv), step.plan.prompts is None and len(qkv) <= self.pdl_rows
        output = self._empty(count, layer.num_heads, layer.head_dim)
        output = self._attention.attend(
            layer.index,
            layer.heads(qkv),
            self._transforms[layer],
            step.plan,
            output,
            scale=layer.scale,
            softcap=layer.softcap,
            pdl=pdl,
        )
        return output.flatten(1)

    def add(self, stream: Stream, inner: Inner, linear: Linear, norm: Norm | None = None) -> Stream:
        """The product goes into the residual at once, or waits as parts."""
        _settle(stream)
        if norm is not None:
            return self._add_normed(stream, inner, linear, norm)
        product = self._product(linear, None, joins=True)
        rows, pdl = len(stream.residual), stream.pdl
        if not rows:
            return stream
        if isinstance(inner, Gated):
            values, scales = quantize_rows(inner.product, inner.activation, pdl=pdl)
            return self._with_parts(stream, _scaled(values, scales, product))
        if _in_8_bits(product, rows):
            return self._with_parts(stream, _scaled(*quantize_rows(inner, pdl=pdl), product))
        if self._rank.size > 1:
            # whatever kernel a rank has chosen, all add up the same format
            whole = self._multiply(product, inner, pdl)
            return self._with_parts(stream, whole.to(stream.residual.dtype))
        if rows == 1 and product.gemv is not None:
            self._gemv(product, product.gemv, inner, pdl, residual=stream.residual)
            return stream
        shape = self._tile(product, rows)
        if shape is not None:
            return replace(stream, delta=self._few_rows(product, shape, inner, pdl))
        if isinstance(linear, FullLinear) and linear.bias is None:
            torch.addmm(stream.residual, inner, linear.weight.t(), out=stream.residual)
            return stream
        return self._with_parts(stream, self._multiply(product, inner, pdl))

    def _add_normed(self, stream: Stream, inner: Inner, linear: Linear, norm: Norm) -> Stream:
        """The norm needs the product whole; what it gives waits as a part."""
        product = self._product(linear, None)
        rows, pdl = len(stream.residual), stream.pdl
        if not rows:
            return stream
        if isinstance(inner, Gated):
            values, scales = quantize_rows(inner.product, inner.activation, pdl=pdl)
            whole = _scaled(values, scales, product)
        else:
            whole = self._multiply(product, inner, pdl)
        whole = self._rank.add_up(whole.to(stream.residual.dtype))
        return replace(stream, delta=self._normed(Stream(whole, None, pdl), norm).unsqueeze(0))

    def select(self, stream: Stream, inner: Inner, tokens: Tensor) -> tuple[Stream, Tensor]:
        """The kernels behind are those of a decode step of so many rows: compiled before."""
        if isinstance(inner, Gated):
            raise TypeError("only attention's output is cut")
        chosen = stream.select(tokens)
        pdl = len(tokens) <= self.pdl_rows
        return replace(chosen, pdl=pdl), inner.index_select(0, tokens)

    def logits(self, stream: Stream, norm: Norm, head: Linear) -> Tensor:
        """The ranks' shares, gathered."""
        logits = self.project(stream, norm, head)
        if isinstance(logits, Gated):
            raise TypeError("a head has no activation")
        return self._rank.gather(logits, self._vocab_size)

    def _with_parts(self, stream: Stream, product: Tensor) -> Stream:
        return replace(stream, delta=self._rank.add_up(product.unsqueeze(0)))

    def _product(
        self, linear: Linear, activation: Activation | None, *, joins: bool = False
    ) -> _Product:
        product = self._products.get(linear)
        if product is None:
            gated = activation is not None and activation.gated
            scale = linear.scale if isinstance(linear, Fp8Linear) else None
            joins = joins and self._rank.size == 1 and linear.bias is None
            outputs = linear.out_features // 2 if gated else linear.out_features
            kind = ProductKind(outputs, linear.in_features, gated, joins, scale is not None)
            ours = isinstance(linear, FullLinear | Fp8Linear)
            one_row = self._table.gemv(kind) if ours else None
            shapes: dict[int, TileShape | None] = {}
            if ours:
                shapes = {rows: self._table.tile(kind, rows) for rows in range(1, FEW_ROWS[-1] + 1)}
            weight = linear.get_parameter("weight") if ours else self._empty(0)
            product = _Product(linear, weight, kind, scale, activation, one_row, shapes)
            self._products[linear] = product
        return product

    def _tile(self, product: _Product, rows: int) -> TileShape | None:
        return product.shapes.get(rows)

    def _normed(self, stream: Stream, norm: Norm) -> Tensor:
        if norm.kind == "rms":
            return self._add_norm(stream, norm, torch.empty_like(stream.residual))
        _settle(stream)
        return norm(stream.residual)  # type: ignore[no-any-return]

    def _add_norm(
        self, stream: Stream, norm: Norm, output: Tensor, scales: Tensor | None = None
    ) -> Tensor:
        """RMSNorm of the stream, whose parts are added to the residual in place."""
        delta, stream.delta = stream.delta, None
        return add_norm(
            stream.residual,
            delta,
            norm.weight,
            norm.eps,
            output,
            scales=scales,
            pdl=stream.pdl,
        )

    def _multiply(self, product: _Product, x: Tensor, pdl: bool) -> Tensor:
        """[rows, in] → [rows, out], the activation included.

        Where activations of 8 bits multiply it comes as bfloat16: its reader converts it anyway.
        """
        rows, linear, activation = len(x), product.linear, product.activation
        shape = self._tile(product, rows)
        fused = activation is None or activation.gated
        if rows == 1 and product.gemv is not None and fused:
            return self._gemv(product, product.gemv, x, pdl)
        if rows > 1 and shape is not None and shape.splits == 1 and fused:
            return self._few_rows(product, shape, x, pdl)[0]
        if product.scale is not None and rows > 1:
            wide = _scaled(*quantize_rows(x, pdl=pdl), product)
        else:
            wide = linear(x)
        if activation is None:
            return wide
        if not activation.gated:
            return activation(wide)
        return gate_mul(wide, activation.name, self._empty(rows, product.num_outputs), pdl=pdl)

    def _gemv(
        self,
        product: _Product,
        shape: GemvShape,
        x: Tensor,
        pdl: bool,
        *,
        norm: Norm | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        linear = product.linear
        output = self._empty(1, product.num_outputs) if residual is None else residual
        activation = product.activation
        return gemv(
            x,
            product.weight,
            output,
            shape,
            scale=product.scale,
            bias=linear.bias,
            gain=None if norm is None else norm.weight,
            eps=0.0 if norm is None else norm.eps,
            gated=product.gated,
            activation="silu" if activation is None else activation.name,
            residual=residual is not None,
            pdl=pdl,
        )

    def _few_rows(self, product: _Product, shape: TileShape, x: Tensor, pdl: bool) -> Tensor:
        """Parts [splits, rows, out] whose sum is the product."""
        linear, activation = product.linear, product.activation
        dtype = torch.float32 if shape.splits > 1 else self._dtype
        return few_rows(
            x,
            product.weight,
            self._empty(shape.splits, len(x), product.num_outputs, dtype=dtype),
            shape,
            scale=product.scale,
            bias=linear.bias,
            gated=product.gated,
            activation="silu" if activation is None else activation.name,
            pdl=pdl,
        )

    def _empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self._dtype, device=self._attention.device)


def _settle(stream: Stream) -> None:
    """Add the parts to the residual without a norm."""
    if stream.delta is not None:
        stream.residual.add_(stream.delta.sum(0))
        stream.delta = None


def _in_8_bits(product: _Product, rows: int) -> bool:
    """Whether the input is quantised, too: for more rows than our own kernels multiply."""
    return product.scale is not None and rows > FEW_ROWS[-1]


def _scaled(values: Tensor, scales: Tensor, product: _Product) -> Tensor:
    """[rows, in] as e4m3 and scales, by an 8-bit weight → [rows, out] in bfloat16."""
    if product.scale is None:
        raise TypeError("the weight has no scale")
    wide = scaled_product(values, scales, product.weight, product.scale)
    if product.linear.bias is not None:
        wide += product.linear.bias
    return wide
