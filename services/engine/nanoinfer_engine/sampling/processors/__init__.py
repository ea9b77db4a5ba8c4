"""Logits processors: what a request does to its logits before the choice, one file each.

A new one is a file here, a line in `PROCESSORS`, and a rule for its fields where all requests are
validated. The host path (`shaping`) and the device path (`device_shaping`) ask the same objects.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from nanoinfer_engine.core.batch import BatchRow
from nanoinfer_engine.core.request import SamplingOptions
from nanoinfer_engine.sampling.processors.base import DeviceBias, LogitsProcessor
from nanoinfer_engine.sampling.processors.logit_bias import LogitBias
from nanoinfer_engine.sampling.processors.masks import AllowedIds, HeldBackIds
from nanoinfer_engine.sampling.processors.no_repeat_ngram import NoRepeatNgram
from nanoinfer_engine.sampling.processors.penalties import Penalties

PROCESSORS: tuple[LogitsProcessor, ...] = (
    Penalties(),
    LogitBias(),
    AllowedIds(),
    HeldBackIds(),
    NoRepeatNgram(),
)
"""In the order in which they change the logits."""

EXTENSIONS: dict[str, Any] = {
    name: value for each in PROCESSORS for name, value in each.options.items()
}
"""Fields of the contract that become `SamplingOptions.extensions`, with their neutral values."""
# those whose additions may change from step to step: asked for each shaped row of each step
_VERSIONS = tuple(
    each.version for each in PROCESSORS if type(each).version is not LogitsProcessor.version
)


def may_run_ahead(sampling: SamplingOptions) -> bool:
    """Whether all processors do without the request's last id."""
    return not any(each.reads_token_ids(sampling) for each in PROCESSORS)


def is_shaped(row: BatchRow) -> bool:
    """Whether a processor may want the row; quick, because every row of a step is asked."""
    return bool(row.masked_token_ids) or row.sampling.shapes_logits


def device_bias(row: BatchRow) -> DeviceBias:
    """What all processors together add to the row's logits on a device."""
    bias = DeviceBias()
    for each in PROCESSORS:
        if each.wants(row):
            each.add_bias(bias, row)
    return bias


def bias_version(row: BatchRow) -> Hashable:
    """Differs between two steps of a request whose `device_bias` differs."""
    return tuple([version(row) for version in _VERSIONS])
