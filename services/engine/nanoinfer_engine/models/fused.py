"""The decoder's weights run by fused kernels: the CUDA form of `models.decoder`, same arithmetic.

Applied from outside to a loaded `Decoder`; its parameters are shared, not copied. A residual sum
waits as parts until the next norm adds it up, so that a product may be split without a launch to
join it. A step of one row goes through GEMVs that take norm, activation and residual in.

Of several ranks each has its share of `parallel`. They add up whole products, never a residual or
parts: which kernel a rank has chosen changes neither what they exchange nor what it means.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from nanoinfer_engine.core.config import ModelConfig
from nanoinfer_engine.models.decoder import Decoder, Layer
from nanoinfer_engine.models.fused_layer import (
    MAX_FUSED_NORM,
    FusedLayer,
    Hidden,
    StepTokens,
    fused_layer,
)
from nanoinfer_engine.ops.collectives import Rank
from nanoinfer_engine.ops.cuda.attention import Heads, PagedAttention, PagedPlan
from nanoinfer_engine.ops.cuda.choices import Choices
from nanoinfer_engine.ops.cuda.kernels.linear import GemvShape, gemv
from nanoinfer_engine.ops.cuda.kernels.norms import add_norm, embed
from nanoinfer_engine.ops.cuda.kernels.quantize import quantize_rows
from nanoinfer_engine.ops.cuda.linears import (
    FEW_ROWS,
    Linear,
    LinearTable,
    apply_linear,
    join_linear,
    quantized_product,
    tuned_sizes,
)
from nanoinfer_engine.ops.kv_cache import FP8

PRODUCTS = ("qkv", "output", "gate_up", "down", "head")
_ATTENTION = "attention"


class FusedDecoder:
    """Runs steps of a decoder on the device; the backend does everything between the products."""

    def __init__(
        self,
        model: Decoder,
        config: ModelConfig,
        backend: PagedAttention,
        rank: Rank,
        vocab_size: int,
    ) -> None:
        """Share the weights of `model`, which must be on a CUDA device in half precision.

        `config` is of the rank's share; `vocab_size` of the whole model.
        """
        self._rank = rank
        self._vocab_size = vocab_size
        self._config = config
        self._backend = backend
        self._embedding = model.embedding.weight
        self.table = LinearTable(self._embedding.dtype)
        self._gain = model.norm.weight
        head = self._embedding if model.head is None else model.head.weight
        fuses = config.hidden_size <= MAX_FUSED_NORM and rank.size == 1
        self._head = Linear(head, gain=self._gain if fuses else None)
        layers = (cast(Layer, layer) for layer in model.layers)
        self._layers = [fused_layer(layer, model, config, rank) for layer in layers]

    def tune(self, max_rows: int, max_tokens: int, pdl_rows: int) -> None:
        """Choose kernels per batch size up to `max_rows` rows, or `max_tokens` of prompts."""
        heads = self._heads(
            torch.randn(
                (max_rows, self._layers[0].products["qkv"].num_outputs),
                dtype=self._embedding.dtype,
                device=self._embedding.device,
            )
        )
        self._backend.tune(heads, self._layers[0].transform, pdl_rows)
        pdl = pdl_rows >= FEW_ROWS[-1]
        sizes = tuned_sizes(max_rows, max_tokens)
        for name in PRODUCTS[:-1]:
            linears = [layer.products[name] for layer in self._layers]
            self.table.tune(name, linears, sizes, pdl)
        rows = [size for size in sizes if size <= max(max_rows, FEW_ROWS[-1])]
        self.table.tune("head", [self._head], rows, pdl)

    @property
    def choices(self) -> Choices:
        """What `tune` and `table.refine` have chosen."""
        return {**self.table.choices, _ATTENTION: self._backend.shapes}

    def restore(self, choices: Choices) -> bool:
        """Take what was chosen before; False where that is not all that is chosen here."""
        if set(choices) != {*PRODUCTS, _ATTENTION}:
            return False
        self.table.choices = {name: dict(choices[name]) for name in PRODUCTS}
        self._backend.shapes = dict(choices[_ATTENTION])
        return True

    def forward(
        self,
        tokens: StepTokens,
        plan: PagedPlan,
        *,
        kept: Tensor | None = None,
        pdl: bool = False,
        kept_pdl: bool = False,
    ) -> Hidden:
        """All layers of a step; what they leave is not added up and not normalised yet.

        Of the `kept` tokens, in that order, where they are given: see `models.decoder`. `kept_pdl`
        is for what runs for them alone.
        """
        count = len(tokens.token_ids)
        residual = self._empty(count, self._config.hidden_size)
        first = self._rank.index * len(self._embedding)
        sources, table = tokens.sources, self._embedding
        embed(tokens.token_ids, sources, tokens.sampled, table, residual, first=first, pdl=pdl)
        self._rank.add_up(residual)
        delta: Tensor | None = None
        for index, layer in enumerate(self._layers):
            attended = self._attention(index, layer, residual, delta, plan, pdl)
            if kept is not None and index == len(self._layers) - 1:
                if not len(kept):
                    return Hidden(residual[:0], None)
                attended = attended.index_select(0, kept)
                residual, pdl = residual.index_select(0, kept), kept_pdl
            delta = self._rest(layer, attended, residual, pdl)
        return Hidden(residual, delta)

    def logits(self, hidden: Hidden, *, pdl: bool = False) -> Tensor:
        """Final norm and head of [rows, hidden] → [rows, vocabulary]."""
        return self._rank.gather(self._logits(hidden, pdl), self._vocab_size)

    def _logits(self, hidden: Hidden, pdl: bool) -> Tensor:
        """Those of the rank's share of the vocabulary."""
        residual, eps = hidden.residual, self._config.norm_eps
        choice = self.table.choice("head", len(residual))
        if hidden.delta is None and self._head.gain is not None and isinstance(choice, GemvShape):
            output = self._empty(1, self._head.num_outputs)
            return gemv(
                residual, self._head.weight, output, choice, gain=self._gain, eps=eps, pdl=pdl
            )
        normed = torch.empty_like(residual)
        add_norm(residual, hidden.delta, self._gain, eps, normed, pdl=pdl)
        if isinstance(choice, GemvShape):
            output = self._empty(1, self._head.num_outputs)
            return gemv(normed, self._head.weight, output, choice, pdl=pdl)
        return apply_linear(normed, self._head, choice, pdl)[0]

    def _attention(
        self,
        index: int,
        layer: FusedLayer,
        residual: Tensor,
        delta: Tensor | None,
        plan: PagedPlan,
        pdl: bool,
    ) -> Tensor:
        """Add `delta` to the residual and attend; [tokens, heads · dim], not projected yet."""
        gain = layer.attention_gain
        if self._runs_gemvs(residual):
            qkv = self._normed_gemv("qkv", layer, residual, gain, pdl)
        elif self._in_8_bits(residual):
            normed = self._quantized_norm(residual, delta, gain, pdl)
            qkv = quantized_product(normed, layer.products["qkv"])
        else:
            hidden = torch.empty_like(residual)
            add_norm(residual, delta, gain, self._config.norm_eps, hidden, pdl=pdl)
            qkv = self._product("qkv", layer, hidden, pdl)
        return self._attend(index, layer, qkv, plan, pdl)

    def _rest(
        self, layer: FusedLayer, attended: Tensor, residual: Tensor, pdl: bool
    ) -> Tensor | None:
        """Project what was attended, add it to the residual, run the MLP and return its parts.

        None where they are in the residual already.
        """
        if self._runs_gemvs(residual):
            self._gemv("output", layer, attended, pdl, residual=residual)
            inner = self._normed_gemv("gate_up", layer, residual, layer.mlp_gain, pdl)
            self._gemv("down", layer, inner, pdl, residual=residual)
            return None
        if self._in_8_bits(residual):
            return self._rest_in_8_bits(layer, attended, residual, pdl)
        parts = self._join("output", layer, attended, residual, pdl)
        eps, hidden = self._config.norm_eps, torch.empty_like(residual)
        add_norm(residual, parts, layer.mlp_gain, eps, hidden, pdl=pdl)
        inner = self._product("gate_up", layer, hidden, pdl)
        return self._join("down", layer, inner, residual, pdl)

    def _rest_in_8_bits(
        self, layer: FusedLayer, attended: Tensor, residual: Tensor, pdl: bool
    ) -> Tensor:
        """The same where what makes an input quantises it."""
        products = layer.products
        parts = quantized_product(quantize_rows(attended, pdl=pdl), products["output"]).unsqueeze(0)
        normed = self._quantized_norm(residual, self._rank.add_up(parts), layer.mlp_gain, pdl)
        gate_up = quantized_product(normed, products["gate_up"])
        inner = quantize_rows(gate_up, self._config.activation, pdl=pdl)
        return self._rank.add_up(quantized_product(inner, products["down"]).unsqueeze(0))

    def _runs_gemvs(self, rows: Tensor) -> bool:
        """Whether all products are GEMVs: for one row, in five launches a layer, or seven."""
        is_gemv = (isinstance(self.table.choice(name, 1), GemvShape) for name in PRODUCTS)
        return len(rows) == 1 and self._rank.size == 1 and all(is_gemv)

    def _in_8_bits(self, rows: Tensor) -> bool:
        """Whether products of 8-bit weights quantise their input: for many rows."""
        quantized = self._layers[0].products["qkv"].scale is not None
        return quantized and len(rows) > FEW_ROWS[-1]

    def _quantized_norm(
        self, residual: Tensor, delta: Tensor | None, gain: Tensor, pdl: bool
    ) -> tuple[Tensor, Tensor]:
        values = torch.empty_like(residual, dtype=FP8)
        scales = torch.empty((len(residual), 1), dtype=torch.float32, device=residual.device)
        eps = self._config.norm_eps
        return add_norm(residual, delta, gain, eps, values, scales=scales, pdl=pdl), scales

    def _attend(
        self, index: int, layer: FusedLayer, qkv: Tensor, plan: PagedPlan, pdl: bool
    ) -> Tensor:
        output = self._empty(len(qkv), self._config.num_heads, self._config.head_dim)
        heads = self._heads(qkv)
        output = self._backend.attend(index, heads, layer.transform, plan, output, pdl=pdl)
        return output.flatten(1)

    def _heads(self, qkv: Tensor) -> Heads:
        """Views of query, key and value, [rows, heads of each, head dim]."""
        heads, kv_heads = self._config.num_heads, self._config.num_kv_heads
        parts = qkv.view(len(qkv), heads + 2 * kv_heads, self._config.head_dim)
        return parts[:, :heads], parts[:, heads : heads + kv_heads], parts[:, heads + kv_heads :]

    def _product(self, name: str, layer: FusedLayer, x: Tensor, pdl: bool) -> Tensor:
        choice = self.table.choice(name, len(x))
        if isinstance(choice, GemvShape):  # one row, where not all products have a GEMV
            return self._gemv(name, layer, x, pdl)
        return apply_linear(x, layer.products[name], choice, pdl)[0]

    def _join(
        self, name: str, layer: FusedLayer, x: Tensor, residual: Tensor, pdl: bool
    ) -> Tensor | None:
        """Parts that the residual still lacks; None where the product is in it."""
        if self._rank.size > 1:
            # whatever kernel a rank has chosen, all add up the same format
            product = self._product(name, layer, x, pdl).to(residual.dtype)
            return self._rank.add_up(product.unsqueeze(0))
        choice = self.table.choice(name, len(x))
        return join_linear(x, layer.products[name], choice, residual, pdl)

    def _normed_gemv(
        self, name: str, layer: FusedLayer, x: Tensor, gain: Tensor, pdl: bool
    ) -> Tensor:
        if layer.products[name].gain is None:
            x = add_norm(x, None, gain, self._config.norm_eps, torch.empty_like(x), pdl=pdl)
        return self._gemv(name, layer, x, pdl, gain=layer.products[name].gain)

    def _gemv(
        self,
        name: str,
        layer: FusedLayer,
        x: Tensor,
        pdl: bool,
        *,
        gain: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        linear, shape = layer.products[name], self.table.choice(name, 1)
        if not isinstance(shape, GemvShape):
            raise TypeError(f"{name} has no GEMV shape")
        output = self._empty(1, linear.num_outputs) if residual is None else residual
        return gemv(
            x,
            linear.weight,
            output,
            shape,
            scale=linear.scale,
            bias=linear.bias,
            gain=gain,
            eps=self._config.norm_eps,
            gated=linear.gated,
            activation=linear.activation,
            residual=residual is not None,
            pdl=pdl,
        )

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self._embedding.dtype, device=self._embedding.device)
