"""How a checkpoint wants to be sampled: `generation_config.json` beside the weights, if any.

These are the defaults that `GetModelInfo` publishes and that an unset field takes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanoinfer_engine.core.config import CheckpointError
from nanoinfer_engine.models.model_config import read_json


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

    `do_sample: false` means greedy, as it does in transformers; `top_k: -1` means off, as 0 does.
    """
    file = model_path / "generation_config.json"
    values = read_json(file) if file.is_file() else {}
    samples = values.get("do_sample")
    if samples not in (None, True, False):
        raise _refuse("do_sample", samples, "true or false")
    top_k = 0 if values.get("top_k") == -1 else _number(values, "top_k", 0, 0, 2**31 - 1)
    if top_k != int(top_k):
        raise _refuse("top_k", top_k, "an integer")
    return SamplingDefaults(
        temperature=0.0 if samples is False else _number(values, "temperature", 1.0, 0, 2),
        top_p=_number(values, "top_p", 1.0, 1e-6, 1),
        top_k=int(top_k),
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
        raise _refuse(name, value, f"a number in {lowest:g} … {highest:g}")
    return float(value)


def _refuse(name: str, value: object, wanted: str) -> CheckpointError:
    return CheckpointError(
        f"generation_config.json: {name} is {str(value)[:80]}; it must be {wanted}: correct it, or"
        " remove it for the server's own default"
    )
