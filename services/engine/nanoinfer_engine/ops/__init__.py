"""The operations that a decoder is written in; `reference` and `cuda` implement them.

They are at the granularity at which kernels fuse: a norm with the product behind it, a product with
the residual sum, head norms with rotation, cache write and attention. How a backend launches them,
and in which form the residual stream waits between them, is its own affair.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

from torch import Tensor, nn

from nanoinfer_engine.ops.linear import Linear
from nanoinfer_engine.ops.modules import Activation, AttentionLayer, Norm

StepT = TypeVar("StepT", contravariant=True)
StreamT = TypeVar("StreamT")
InnerT = TypeVar("InnerT")


class Ops(Protocol[StepT, StreamT, InnerT]):
    """One device's operations over one KV cache.

    `StepT` says which tokens run and where they lie, `StreamT` is the residual stream
    [tokens, hidden], `InnerT` the input of a product that ends in the stream.
    """

    def embed(
        self, table: nn.Embedding, positions: nn.Embedding | None, step: StepT, scale: float = 1.0
    ) -> StreamT:
        """Rows of `table` times `scale`, plus rows of `positions` where these are learned.

        `table` holds the ids of this rank's share of the vocabulary.
        """

    def project(
        self, stream: StreamT, norm: Norm, linear: Linear, activation: Activation | None = None
    ) -> InnerT:
        """activation(linear(norm(stream))): [tokens, out], half as wide where it is gated."""

    def attend(self, layer: AttentionLayer, qkv: InnerT, step: StepT) -> InnerT:
        """Norm and rotate heads, store K and V, attend: [tokens, heads · head dim].

        `qkv` is [tokens, (heads + 2 · kv heads) · head dim].
        """

    def add(
        self, stream: StreamT, inner: InnerT, linear: Linear, norm: Norm | None = None
    ) -> StreamT:
        """stream + norm(linear(inner)), the product summed over the ranks; `stream` is used up."""

    def select(self, stream: StreamT, inner: InnerT, tokens: Tensor) -> tuple[StreamT, InnerT]:
        """Both for some tokens alone, by their index, in that order."""

    def logits(self, stream: StreamT, norm: Norm, head: Linear) -> Tensor:
        """[rows, vocabulary] of the whole vocabulary."""
