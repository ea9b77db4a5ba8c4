"""What runs in one step: the immutable value that goes down from scheduler to runner.

Plain data, no torch. `Batch` goes down, one `RowResult` a row comes up. Nobody fills in another's
fields. `Runner` is all that the engine knows of who runs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from nanoinfer_engine.core.config import ModelConfig
from nanoinfer_engine.core.request import SampledToken, SamplingOptions, TokenCounts


class BatchRow(NamedTuple):
    """One request's share of a step: `token_ids` at positions [start, start + len(token_ids)).

    `block_ids` covers every position up to the end of this share, in order; array("i") is copied at
    once. With `samples` the logits of the last token are sampled; `masked_token_ids` may then not
    be chosen.
    The sampled token's position is start + len(token_ids): the position of its random numbers,
    which depend on the seed and on `prompt_key` besides.
    `token_counts` is the request's own, read and not changed here; a row with penalties has it.
    `scored_token_ids` are the prompt ids that follow the first of `token_ids`, one each: the
    log-probabilities of those are asked for. A row may see blocks that another row of the same
    step fills: in each layer all keys and values are stored before any attention is computed.
    With `source_row` one more token follows `token_ids`: the one that this row of the previous
    batch samples, whose id nobody here knows yet; `token_counts` lacks it too.
    `known_token_ids` are all of prompt and completion, where the row samples and its request may
    not run ahead.
    `request_number` tells the rows of one request from all others of the process.
    """

    token_ids: tuple[int, ...]
    start: int
    block_ids: Sequence[int]
    samples: bool
    sampling: SamplingOptions
    masked_token_ids: frozenset[int] = frozenset()
    token_counts: TokenCounts | None = None
    scored_token_ids: tuple[int, ...] = ()
    source_row: int | None = None
    request_number: int = -1
    prompt_key: int = 0
    known_token_ids: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens computed for this row in this step."""
        return len(self.token_ids) + (self.source_row is not None)

    @property
    def context_length(self) -> int:
        """Tokens whose K and V the row's last token may see, itself included."""
        return self.start + self.num_tokens


@dataclass(frozen=True)
class Batch:
    """The rows of one step, at least one."""

    rows: tuple[BatchRow, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens computed in this step over all rows."""
        return sum(row.num_tokens for row in self.rows)


@dataclass(frozen=True)
class ScoredPrompt:
    """What a row with `scored_token_ids` gives: those ids with their log-probabilities.

    `sampled` is what the row would have given without them.
    """

    tokens: tuple[SampledToken, ...]
    sampled: tuple[SampledToken, ...] = ()


RowResult = tuple[SampledToken, ...] | ScoredPrompt | Exception
"""What `execute` returns per row: tokens, why this row alone failed, or () (row not sampled).

A row that samples gives one token or several, each following the one before. Several come only
where no later step of the request is in flight: its request may not run ahead.
"""


StepKind = Literal["eager", "graph"]
"""Whether a step was launched kernel by kernel, or as one captured graph."""


@dataclass(frozen=True)
class StepTiming:
    """What the device did with a step, in seconds.

    `busy` from the step's first copy or launch to its last; `idle` from the end of the step before
    to there, which is to nobody's blame where there was no work; `waited` is what `results` waited.
    """

    kind: StepKind
    busy: float
    idle: float
    waited: float = 0.0


class Step(Protocol):
    """A launched step."""

    def results(self) -> list[RowResult]:
        """Wait for the step; one result per row. What it raises concerns the whole batch."""

    def timing(self) -> StepTiming | None:
        """After `results`: what the device did; None where all was done within `launch`."""


@dataclass(frozen=True)
class FinishedStep:
    """A step that had run by the time `launch` returned."""

    row_results: list[RowResult]

    def results(self) -> list[RowResult]:
        """One result per row."""
        return self.row_results

    def timing(self) -> None:
        """The launch was the step."""


@dataclass(frozen=True)
class EndedStep:
    """What ran, what came of it and what it took.

    `started` and `ended` are monotonic nanoseconds, from when it had the device. `timing.idle` is 0
    where there was no work meanwhile. `host` is in seconds: what its thread did since the step
    before has ended, without waiting for the device.
    """

    batch: Batch
    results: list[RowResult]
    started: int
    ended: int
    timing: StepTiming
    host: float


class Runner(Protocol):
    """What the engine needs of a model runner; `ModelRunner` is one, tests bring others."""

    num_blocks: int
    block_size: int
    max_model_len: int
    num_parameters: int
    weights_fingerprint: str  # 32 bytes in hex
    number_format: str  # as `EngineConfig` writes it, with `auto` decided
    model_config: ModelConfig

    @property
    def vocab_size(self) -> int:
        """Ids the model accepts and produces lie below it."""

    @property
    def runs_ahead(self) -> bool:
        """Whether `launch` returns before the step has run, so that the next can be planned."""

    def launch(self, batch: Batch) -> Step:
        """Begin one step; what it raises concerns the whole batch."""

    def warm_up(self) -> float:
        """Run made-up steps before serving; returns the seconds they took."""
