"""How a checkpoint wants to be sampled: `generation_config.json` beside the weights, if any.

These are the defaults that `GetModelInfo` publishes and that an unset field takes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanoinfer_engine.config import CheckpointError


@dataclass(frozen=True)
class SamplingDefaults:
    """Values for unset fields; the initial ones hold where the checkpoint says nothing.

    `stated` names the fields that the checkpoint does say something about.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stated: frozenset[str] = field(default=frozenset(), compare=False)


def read_sampling_defaults(model_path: Path) -> SamplingDefaults:
    """The defaults of the checkpoint at `model_path`; raises CheckpointError for invalid values.

    `do_sample: false` means greedy, as it does in transformers.
    """
    path = model_path / "generation_config.json"
    if not path.is_file():
        return SamplingDefaults()
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path.name}: not JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path.name}: not an object")
    greedy = values.get("do_sample") is False
    return SamplingDefaults(
        temperature=0.0 if greedy else _number(values, "temperature", 1.0, 0, 2),
        top_p=_number(values, "top_p", 1.0, 1e-6, 1),
        top_k=int(_number(values, "top_k", 0, 0, 2**31 - 1)),
        min_p=_number(values, "min_p", 0.0, 0, 1),
        repetition_penalty=_number(values, "repetition_penalty", 1.0, 1e-6, 10),
        stated=_stated(values),
    )


def _stated(values: Mapping[str, Any]) -> frozenset[str]:
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    greedy = {"temperature"} if values.get("do_sample") is False else set()
    return frozenset(greedy | {name for name in names if values.get(name) is not None})


def _number(
    values: Mapping[str, Any], name: str, default: float, lowest: float, highest: float
) -> float:
    value = values.get(name)
    if value is None:
        return default
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not lowest <= value <= highest:
        raise CheckpointError(f"generation_config.json: {name} is {value!r}")
    return float(value)
