"""A compact Llama decoder to train, with Hugging Face's parameter names and rotary convention."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class LlamaShape:
    """The sizes of the network; heads are `hidden // num_heads` wide."""

    vocabulary: int = 8192
    hidden: int = 384
    num_layers: int = 6
    num_heads: int = 6
    num_kv_heads: int = 2
    intermediate: int = 1024
    max_positions: int = 2048
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.num_heads


def rotary_table(shape: LlamaShape, device: torch.device) -> Tensor:
    """Returns cosines and sines [2, max_positions, head_size], halves repeated, in FP32."""
    exponent = torch.arange(0, shape.head_size, 2, device=device, dtype=torch.float32)
    frequency = shape.rope_theta ** -(exponent / shape.head_size)
    angle = torch.outer(torch.arange(shape.max_positions, device=device).float(), frequency)
    angle = torch.cat((angle, angle), dim=-1)
    return torch.stack((angle.cos(), angle.sin()))


def rotate(states: Tensor, table: Tensor) -> Tensor:
    """Turns states [rows, heads, length, head_size] by their positions."""
    cosine, sine = table[0].to(states.dtype), table[1].to(states.dtype)
    first, second = states.chunk(2, dim=-1)
    return states * cosine + torch.cat((-second, first), dim=-1) * sine


class Norm(nn.Module):
    """Root-mean-square norm with a learned gain."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, states: Tensor) -> Tensor:
        """Norms the last axis."""
        weight = self.weight.to(states.dtype)
        return functional.rms_norm(states, (states.shape[-1],), weight, self.eps)


class Attention(nn.Module):
    """Causal grouped-query attention."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.head_size = shape.head_size
        kv_size = shape.num_kv_heads * shape.head_size
        self.q_proj = nn.Linear(shape.hidden, shape.hidden, bias=False)
        self.k_proj = nn.Linear(shape.hidden, kv_size, bias=False)
        self.v_proj = nn.Linear(shape.hidden, kv_size, bias=False)
        self.o_proj = nn.Linear(shape.hidden, shape.hidden, bias=False)

    def forward(self, states: Tensor, table: Tensor) -> Tensor:
        """Mixes states [rows, length, hidden] along the length."""
        rows, length, _ = states.shape
        q, k, v = (
            projection(states).view(rows, length, -1, self.head_size).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, table), rotate(k, table)
        # Repeated by hand: every SDPA kernel then accepts the heads.
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).reshape(rows, length, -1))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """Gated SiLU feed-forward network."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.down_proj = nn.Linear(shape.intermediate, shape.hidden, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        """Maps each position on its own."""
        gated = functional.silu(self.gate_proj(states)) * self.up_proj(states)
        return self.down_proj(gated)  # type: ignore[no-any-return]


class Layer(nn.Module):
    """Attention and MLP, each normed before and added to the residual stream."""

    def __init__(self, shape: LlamaShape, dropout: float) -> None:
        super().__init__()
        self.input_layernorm = Norm(shape.hidden, shape.norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = Norm(shape.hidden, shape.norm_eps)
        self.mlp = Mlp(shape)
        self.dropout = nn.Dropout(dropout)

    def forward(self, states: Tensor, table: Tensor) -> Tensor:
        """Runs one layer over [rows, length, hidden]."""
        states = states + self.dropout(self.self_attn(self.input_layernorm(states), table))
        added: Tensor = self.dropout(self.mlp(self.post_attention_layernorm(states)))
        return states + added


class Trunk(nn.Module):
    """Embedding, layers and final norm: the `model.` part of the parameter names."""

    def __init__(self, shape: LlamaShape, dropout: float) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape, dropout) for _ in range(shape.num_layers))
        self.norm = Norm(shape.hidden, shape.norm_eps)


class Llama(nn.Module):
    """The whole network; the output weights are the embedding's."""

    def __init__(self, shape: LlamaShape, dropout: float = 0.0) -> None:
        super().__init__()
        self.shape = shape
        self.model = Trunk(shape, dropout)
        self.register_buffer("table", rotary_table(shape, torch.device("cpu")), persistent=False)
        self.apply(_initialise)
        for layer in self.model.layers:
            for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):  # type: ignore[union-attr]
                projection.weight.data /= (2 * shape.num_layers) ** 0.5  # type: ignore[union-attr]

    def forward(self, ids: Tensor) -> Tensor:
        """Returns the final hidden states [rows, length, hidden] of ids [rows, length]."""
        states = self.model.embed_tokens(ids)
        if torch.is_autocast_enabled(ids.device.type):
            states = states.to(torch.get_autocast_dtype(ids.device.type))
        table = self.table[:, : ids.shape[1]]  # type: ignore[index]
        for layer in self.model.layers:
            states = layer(states, table)
        normed: Tensor = self.model.norm(states)
        return normed

    def logits(self, states: Tensor) -> Tensor:
        """Maps hidden states [..., hidden] to scores [..., vocabulary]."""
        weight: Tensor = self.model.embed_tokens.weight
        return functional.linear(states, weight)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)


@torch.no_grad()
def complete_greedily(
    network: Llama, prompts: list[list[int]], end: int, max_tokens: int
) -> list[list[int]]:
    """Continues each prompt until `end` or `max_tokens`, all in one batch, without a cache."""
    device = network.model.embed_tokens.weight.device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    ids = torch.full((len(prompts), int(lengths.max()) + max_tokens), end, device=device)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt, device=device)
    rows = torch.arange(len(prompts), device=device)
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for step in range(max_tokens):
        width = int(lengths.max()) + step
        states = network(ids[:, :width])[rows, lengths + step - 1]
        chosen = network.logits(states).argmax(-1)
        done |= chosen == end
        ids[rows, lengths + step] = torch.where(done, end, chosen)
        if bool(done.all()):
            break
    answers = [ids[row, len(prompt) :].tolist() for row, prompt in enumerate(prompts)]
    return [answer[: answer.index(end)] if end in answer else answer for answer in answers]
