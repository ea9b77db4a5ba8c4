"""The training loop: one optimizer, one schedule, cross-entropy of what is to be learned."""

import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from guide_recipe.corpus import Example, TrainingBatch, batches
from guide_recipe.llama import Llama, LlamaShape
from guide_recipe.tokenizer import SPECIAL_TOKENS


@dataclass(frozen=True)
class Recipe:
    """Every number of a training run."""

    steps: int = 9000
    max_minutes: float = 5.5
    tokens_per_batch: int = 40_960
    documents: int = 600_000
    workers: int = 16
    peak_rate: float = 1.5e-3
    warmup_steps: int = 300
    weight_decay: float = 0.1
    dropout: float = 0.1
    prompt_noise: float = 0.04
    evaluations: int = 6
    hidden: int = 384
    layers: int = 6
    device: str = "cuda"
    seed: int = 1

    @property
    def shape(self) -> LlamaShape:
        """The network's sizes; only width and depth are ever changed, to try the recipe out."""
        heads = self.hidden // 64
        return LlamaShape(
            hidden=self.hidden,
            num_layers=self.layers,
            num_heads=heads,
            num_kv_heads=2 if heads % 2 == 0 else 1,
            intermediate=self.hidden * 8 // 3,
        )


def loss_of(network: Llama, batch: TrainingBatch, recipe: Recipe) -> Tensor:
    """Returns the mean cross-entropy of the learned tokens; prompts are noised on the way in."""
    ids = torch.from_numpy(batch.ids).to(recipe.device, non_blocking=True)
    learned = torch.from_numpy(batch.learned).to(recipe.device, non_blocking=True)
    ordinary = network.shape.vocabulary - len(SPECIAL_TOKENS)
    noised = (torch.rand(ids.shape, device=ids.device) < recipe.prompt_noise) & ~learned
    noised &= ids < ordinary
    # Half of the rows stay as they were written.
    noised[::2] = False
    inputs = torch.where(noised, torch.randint_like(ids, ordinary), ids)[:, :-1]
    states = network(inputs)
    # Indices found on the host: a boolean mask would make it wait for the device.
    wanted = torch.from_numpy(np.flatnonzero(batch.learned[:, 1:])).to(recipe.device)
    logits = network.logits(states.flatten(0, 1)[wanted])
    return functional.cross_entropy(logits.float(), ids[:, 1:].flatten()[wanted])


def optimizer_of(network: Llama, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; gains are not decayed."""
    matrices = [p for p in network.parameters() if p.ndim >= 2]
    gains = [p for p in network.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": gains, "weight_decay": 0.0},
    ]
    fused = recipe.device != "cpu"
    return torch.optim.AdamW(groups, lr=recipe.peak_rate, betas=(0.9, 0.95), fused=fused)


def rate_at(step: int, progress: float, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine down to one hundredth of the peak."""
    warm = min(1.0, (step + 1) / recipe.warmup_steps)
    return recipe.peak_rate * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def optimise(
    network: Llama, examples: list[Example], recipe: Recipe, pad: int
) -> Iterator[tuple[int, float]]:
    """Trains `network` in place; yields (step, mean loss since the last time) to look at it.

    Ends after `recipe.steps` or `recipe.max_minutes`, whichever is nearer; the learning rate
    follows the same measure, so that a slow machine also ends with an annealed network.
    """
    optimizer = optimizer_of(network, recipe)
    rng = random.Random(recipe.seed)
    started = time.monotonic()
    step, looks, progress = 0, 0, 0.0
    losses: list[Tensor] = []
    while progress < 1:
        for batch in batches(examples, recipe.tokens_per_batch, pad, rng):
            elapsed = (time.monotonic() - started) / (60 * recipe.max_minutes)
            progress = max(step / recipe.steps, elapsed)
            if progress * recipe.evaluations >= looks + 1 or progress >= 1:
                looks += 1
                yield step, float(torch.stack(losses).mean())
                losses.clear()
            if progress >= 1:
                return
            for group in optimizer.param_groups:
                group["lr"] = rate_at(step, progress, recipe)
            losses.append(update(network, optimizer, batch, recipe))
            step += 1


def update(
    network: Llama, optimizer: torch.optim.Optimizer, batch: TrainingBatch, recipe: Recipe
) -> Tensor:
    """Takes one optimizer step; returns the loss, still on the device."""
    optimizer.zero_grad(set_to_none=True)
    # Processors without bfloat16 units are quicker in FP32.
    with torch.autocast(recipe.device, torch.bfloat16, enabled=recipe.device != "cpu"):
        loss = loss_of(network, batch, recipe)
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()
    return loss.detach()
