"""How a checkpoint wants to be sampled: `generation_config.json` beside the weights, if any.

These are the defaults that `GetModelInfo` publishes and that an unset field takes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from nanoinfer_engine.core.config import CheckpointError
from nanoinfer_engine.models.model_config import read_json

_READ: Final = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
# of the other fields, those that another file or the request decides about, or that say nothing
# about the text
_HARMLESS: Final = """
do_sample eos_token_id bos_token_id pad_token_id decoder_start_token_id transformers_version
_from_model_config max_length max_new_tokens use_cache cache_implementation cache_config
output_attentions output_hidden_states output_scores output_logits return_dict_in_generate
trust_remote_code chat_format
"""
# values with which a field does nothing, and the fields that do nothing at 1
_NEUTRAL: Final[tuple[Any, ...]] = (None, False, 0, [], {})
_NEUTRAL_AT_ONE: Final = """
num_beams num_beam_groups num_return_sequences typical_p length_penalty guidance_scale
encoder_repetition_penalty
"""


@dataclass(frozen=True)
class SamplingDefaults:
    """Values for unset fields; the initial ones hold where the checkpoint says nothing.

    `stated` names the fields that the checkpoint does say something about, `unread` those of the
    file that have no effect here.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stated: frozenset[str] = field(default=frozenset(), compare=False)
    unread: tuple[str, ...] = field(default=(), compare=False)


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
        unread=_unread(values),
    )


def _stated(values: Mapping[str, Any]) -> frozenset[str]:
    greedy = {"temperature"} if values.get("do_sample") is False else set()
    return frozenset(greedy | {name for name in _READ if values.get(name) is not None})


def _unread(values: Mapping[str, Any]) -> tuple[str, ...]:
    meant = {
        name
        for name, value in values.items()
        if value not in _NEUTRAL and not (value == 1 and name in _NEUTRAL_AT_ONE.split())
    }
    return tuple(sorted(meant - {*_READ} - {*_HARMLESS.split()}))


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
