"""A request as the engine knows it: plain data, no torch, no proto, no text.

A `Request` is one completion. A client that asks for n completions gives n requests that share the
prompt and differ in `index` and seed. The scheduler owns the mutable part; the event loop reads
none of it and receives immutable `RequestOutput` values instead.
"""

from __future__ import annotations

import enum
import hashlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count
from typing import NamedTuple

MAX_EVENTS = 16


class FinishReason(enum.Enum):
    """Why a request ended. Only STOP and LENGTH reach the wire; the rest are RPC statuses."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen; every value resolved, none unset.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1 and `min_p` 0 are off, and so are a repetition
    penalty of 1 and the other penalties of 0. The random numbers of a token depend on `seed`, the
    prompt and its position alone, never on the batch it runs in. `allowed_token_ids` None allows
    all.
    `num_logprobs` None means no log-probabilities, 0 the sampled token's only; the same for those
    of the prompt. `logprob_token_ids` are reported wherever log-probabilities are. `extensions` are
    options of further logits processors that are set, by their names in the contract.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    num_logprobs: int | None = None
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: array[int] | None = None
    num_prompt_logprobs: int | None = None
    logprob_token_ids: tuple[int, ...] = ()
    extensions: tuple[tuple[str, float], ...] = ()

    @cached_property
    def shapes_logits(self) -> bool:
        """Whether a logits processor changes the logits before the choice."""
        listed = bool(self.logit_bias) or self.allowed_token_ids is not None
        return self.has_penalties or listed or bool(self.extensions)

    def extension(self, name: str, neutral: float) -> float:
        """The value of an option without a field here, as the contract calls it."""
        return dict(self.extensions).get(name, neutral)

    @property
    def has_penalties(self) -> bool:
        """Whether the choice depends on the ids so far."""
        return (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != (1, 0, 0)


@dataclass(frozen=True)
class StoppingOptions:
    """When a request ends. `eos_token_ids` is empty where the client ignores EOS."""

    max_tokens: int
    min_tokens: int
    stop_token_ids: frozenset[int]
    eos_token_ids: frozenset[int]
    include_stop_token: bool

    def masked_token_ids(self, num_completion_tokens: int) -> frozenset[int]:
        """Ids that may not be sampled yet: every ending id while `min_tokens` is not reached."""
        if num_completion_tokens >= self.min_tokens:
            return frozenset()
        return self.stop_token_ids | self.eos_token_ids


@dataclass(frozen=True)
class Logprob:
    """Natural-log probability of one id under the raw (temperature 1, unmasked) distribution.

    `rank` is 1 for the likeliest id.
    """

    token_id: int
    logprob: float
    rank: int


class SampledToken(NamedTuple):
    """A chosen id, or one of the prompt; `logprob` and `top` only where they were asked for.

    `top` are the likeliest ids, then those of `logprob_token_ids` that are not among them. A tuple,
    as is all that is made for every row of a step: a frozen dataclass takes thrice the time.
    """

    token_id: int
    logprob: Logprob | None = None
    top: tuple[Logprob, ...] = ()


class TokenCounts:
    """The distinct ids of a request so far: what penalties need, brought up to date per token.

    `token_ids` are in the order of their first occurrence; `counts` says how often each occurred in
    the completion, 0 for an id of the prompt alone. Both are int64 and no longer than the
    vocabulary, however long the request. `num_counted` completion tokens have come. A copy in
    another process can be read, not added to.
    """

    def __init__(self, prompt_token_ids: Iterable[int]) -> None:
        """Count nothing yet: the prompt's ids have occurred 0 times in the completion."""
        self.token_ids = array("q", dict.fromkeys(prompt_token_ids))
        self.counts = array("q", bytes(self.token_ids.itemsize * len(self.token_ids)))
        self.num_counted = 0
        self._positions = {token_id: i for i, token_id in enumerate(self.token_ids)}

    def __getstate__(self) -> dict[str, object]:
        """All but what `add` needs."""
        return {name: value for name, value in vars(self).items() if name != "_positions"}

    def add(self, token_id: int) -> None:
        """Count one more completion token."""
        position = self._positions.setdefault(token_id, len(self.token_ids))
        if position == len(self.token_ids):
            self.token_ids.append(token_id)
            self.counts.append(0)
        self.counts[position] += 1
        self.num_counted += 1


def prompt_key(token_ids: Sequence[int]) -> int:
    """A 64-bit hash of a prompt: one seed draws other numbers for another prompt."""
    digest = hashlib.blake2b(array("q", token_ids), digest_size=8).digest()
    return int.from_bytes(digest, "little")


@dataclass(frozen=True)
class Phases:
    """Nanoseconds spent in each phase; `queue + prefill + decode` is `total`."""

    queue: int
    prefill: int
    decode: int

    @property
    def total(self) -> int:
        """From arrival to the end."""
        return self.queue + self.prefill + self.decode


@dataclass
class RequestTimes:
    """Monotonic nanoseconds at which the request passed each gate; None until it has.

    `token_gap` is the time from the tokens before the last ones, shared among those that came
    together, for the inter-token histogram.
    """

    arrived: int
    scheduled: int | None = None
    first_token: int | None = None
    last_token: int | None = None
    token_gap: int | None = None
    finished: int | None = None

    def phases(self) -> Phases:
        """The phases of a request that has ended; one it never reached took no time."""
        end = self.arrived if self.finished is None else self.finished
        scheduled = end if self.scheduled is None else self.scheduled
        first_token = end if self.first_token is None else self.first_token
        return Phases(scheduled - self.arrived, first_token - scheduled, end - first_token)

    def phases_to_first_token(self) -> Phases:
        """The phases of a request that has its first token, without its decode."""
        return replace(self, finished=self.first_token).phases()


@dataclass(eq=False)
class Request:
    """One completion on its way through the engine.

    `num_computed_tokens` counts the tokens (prompt, then completion) whose K and V are in
    `block_ids`; preemption sets it back to 0. `num_in_flight_tokens` more are being computed by
    steps that have not ended, and `num_unread_tokens` ids are sampled there that nobody knows yet.
    With `may_run_ahead` False the next step is planned only when all ids are known.
    `num_last_tokens` is how many ids came together last: so many are pending while decoding.
    `deadline` is in monotonic nanoseconds. `events` are names (preempted, resumed) with monotonic
    nanoseconds, at most MAX_EVENTS. `number` is another one for every request of the process.
    `prompt_key` is that of the prompt, hashed once and shared by all completions.
    `token_counts` is there where penalties are; `prompt_logprobs` has one entry for each prompt
    token but the first, as far as they are computed, where they are asked for.
    `block_names` names the contents of full blocks in order; `num_cached_tokens` says how many
    prompt tokens came from the prefix cache, None where it was not asked. `num_bytes` is what the
    request takes in the queue; there it stands in `line`, and `order` sorts those that run: higher
    priority first, then arrival. Without `cache_salt` the tenant separates prefix-cache entries.
    Invariant: 0 <= num_computed_tokens <= num_tokens.
    """

    request_id: str
    index: int
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingOptions
    stopping: StoppingOptions
    times: RequestTimes
    priority: int = 0
    tenant: str = ""
    deadline: int | None = None
    cache_salt: str | None = None
    num_bytes: int = 0
    prompt_key: int = 0
    may_run_ahead: bool = True
    number: int = field(default_factory=count().__next__)
    # owned by the scheduler
    arrival_number: int = 0
    order: tuple[int, int] = (0, 0)
    completion_token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_in_flight_tokens: int = 0
    num_unread_tokens: int = 0
    num_last_tokens: int = 1
    block_ids: array[int] = field(default_factory=lambda: array("i"))
    block_names: list[bytes] = field(default_factory=list)
    num_cached_tokens: int | None = None
    num_preemptions: int = 0
    num_prefill_chunks: int = 0
    num_waiting_at_arrival: int = 0
    max_batch_size: int = 0
    num_steps: int = 0
    num_graph_replays: int = 0
    max_blocks: int = 0
    events: list[tuple[str, int]] = field(default_factory=list)
    token_counts: TokenCounts | None = None
    prompt_logprobs: list[SampledToken] = field(default_factory=list)
    # prompt and completion tokens known so far; kept, because a step asks for it several times
    num_tokens: int = field(init=False)
    line: tuple[int, str] = field(init=False)

    def __post_init__(self) -> None:
        """Begin to count, also single ids where penalties need it."""
        self.num_tokens = len(self.prompt_token_ids) + len(self.completion_token_ids)
        self.line = (self.priority, self.tenant)
        if self.sampling.has_penalties:
            self.token_counts = TokenCounts(self.prompt_token_ids)

    @property
    def scores_prompt(self) -> bool:
        """Whether every position of the prompt must be computed, none taken from a cache."""
        return self.sampling.num_prompt_logprobs is not None

    @property
    def num_granted_tokens(self) -> int:
        """Tokens computed, or being computed."""
        return self.num_computed_tokens + self.num_in_flight_tokens

    @property
    def num_pending_tokens(self) -> int:
        """Tokens that are sampled, known or not, and granted to no step yet; few while decoding."""
        sampled = self.num_tokens + self.num_unread_tokens
        return sampled - self.num_computed_tokens - self.num_in_flight_tokens

    @property
    def wants_more(self) -> bool:
        """Whether its length allows more than the ids that are known or still to be read."""
        num_completion_tokens = len(self.completion_token_ids) + self.num_unread_tokens
        return num_completion_tokens < self.stopping.max_tokens

    @property
    def may_be_planned(self) -> bool:
        """Whether the next step can be planned now, though ids may still be unread."""
        return self.may_run_ahead or not self.num_unread_tokens

    @property
    def is_decoding(self) -> bool:
        """Whether nothing is pending but the ids that came last."""
        return self.num_pending_tokens <= self.num_last_tokens

    def append(self, token_id: int) -> None:
        """Add a completion token."""
        self.completion_token_ids.append(token_id)
        self.num_tokens += 1
        if self.token_counts is not None:
            self.token_counts.add(token_id)

    def scored_token_ids(self, start: int, stop: int) -> tuple[int, ...]:
        """Prompt ids that positions [start, stop) predict, if those are still to be reported."""
        if not self.scores_prompt or self.completion_token_ids:
            return ()
        return self.prompt_token_ids[start + 1 : stop + 1]

    def add_event(self, name: str, time: int) -> None:
        """Remember an event for the trace; beyond MAX_EVENTS it is dropped (the counts remain)."""
        if len(self.events) < MAX_EVENTS:
            self.events.append((name, time))

    def tokens(self, start: int, stop: int) -> tuple[int, ...]:
        """Token ids of positions [start, stop) over prompt and completion."""
        prompt = self.prompt_token_ids
        if stop <= len(prompt):
            return prompt[start:stop]
        offset = len(prompt)
        tail = self.completion_token_ids[max(start - offset, 0) : stop - offset]
        return (*prompt[start:], *tail) if start < offset else tuple(tail)


class RequestOutput(NamedTuple):
    """What one step gave one request; immutable, crosses from the engine thread to the event loop.

    `tokens` holds what the client may see (a stop id only where asked for). `prompt_logprobs` come
    with the first token, where they are asked for. `finish_reason` is set on the last output; then
    `stop_token_id` says which id ended it, if one did, and `error` why it failed, where the reason
    is ERROR.
    """

    request: Request
    tokens: tuple[SampledToken, ...] = ()
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: Exception | None = None
    prompt_logprobs: tuple[SampledToken, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens that came, a stop id that the client does not see included."""
        if self.stop_token_id is None:
            return len(self.tokens)
        shows_stop = bool(self.tokens) and self.tokens[-1].token_id == self.stop_token_id
        return len(self.tokens) + (not shows_stop)
