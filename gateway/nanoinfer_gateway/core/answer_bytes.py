"""The size of answers: what a whole one may have, and what all together hold in memory.

Sizes are those on the wire, estimated from counts, because protobuf tells a message's size only by
writing it. In memory an answer takes some four times as much.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from nanoinfer.v1 import gateway_pb2, generation_pb2
from nanoinfer_common import names
from nanoinfer_common.errors import Code, ServiceError, Violation, exhausted

# A log-probability with its id, rank and framing; the token's own bytes come on top. The least is
# of small ids and likely tokens, so that what exceeds a bound with it exceeds the bound for sure.
ENTRY_BYTES: Final = 24
LEAST_ENTRY_BYTES: Final = 12
TOKEN_ID_BYTES: Final = 3
RETRY_AFTER_SECONDS: Final = 1.0


class AnswerBytes:
    """The bytes of all answers that are in memory, because readers are slow or they are whole."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.num_bytes = 0

    @property
    def is_full(self) -> bool:
        """True where answers hold so much that reading from engines should pause."""
        return self.num_bytes >= self._max_bytes

    @contextmanager
    def share(self) -> Iterator["Share"]:
        """Count the bytes of one request while the block runs."""
        share = Share(self)
        try:
            yield share
        finally:
            share.set(0)

    def fits(self, num_bytes: int) -> bool:
        """True where `num_bytes` more fit; a request that is alone always fits."""
        return not self.num_bytes or self.num_bytes + num_bytes <= self._max_bytes


class Share:
    """The bytes of one request's answer."""

    def __init__(self, total: AnswerBytes) -> None:
        self.total = total
        self.num_bytes = 0

    def set(self, num_bytes: int) -> None:
        """Replace the count; nothing is refused."""
        self.total.num_bytes += num_bytes - self.num_bytes
        self.num_bytes = num_bytes

    def reserve(self, num_bytes: int) -> None:
        """Count so many more, or raise RESOURCE_EXHAUSTED with RetryInfo where they do not fit."""
        if not self.total.fits(num_bytes):
            message = "too many bytes of answers are under way"
            raise exhausted(names.QUEUE_FULL, message, RETRY_AFTER_SECONDS)
        self.set(self.num_bytes + num_bytes)


class WholeAnswer:
    """The bytes of a unary answer: bounded by themselves, and counted with all others."""

    def __init__(
        self,
        options: gateway_pb2.GenerationOptions,
        num_choices: int,
        model: generation_pb2.ModelInfo,
        max_bytes: int,
    ) -> None:
        """`max_bytes` is what one message takes."""
        self._options = options
        self._num_choices = num_choices
        self._max_tokens = options.stopping.max_tokens or model.max_model_len
        self._max_bytes = max_bytes
        self._num_bytes = 0

    def check(self) -> None:
        """Raise INVALID_ARGUMENT where the answer of the length asked for can never fit."""
        response = self._options.response
        per_token = _num_entries(response) * LEAST_ENTRY_BYTES
        per_token += TOKEN_ID_BYTES if response.return_token_ids else 0
        least = self._num_choices * self._options.stopping.max_tokens * per_token
        if least > self._max_bytes:
            raise self._too_large()

    def reserve(self, share: Share) -> None:
        """Hold room for all log-probabilities there may be; text, which is small, as it comes.

        Raises RESOURCE_EXHAUSTED with RetryInfo: while many wait for large answers, better none
        begins than all end without one.
        """
        entries = _num_entries(self._options.response) * self._num_choices * self._max_tokens
        share.reserve(min(entries * ENTRY_BYTES, self._max_bytes))

    def add(self, num_bytes: int, share: Share) -> None:
        """Count what has come; raises INVALID_ARGUMENT or RESOURCE_EXHAUSTED where too much."""
        self._num_bytes += num_bytes
        if self._num_bytes > self._max_bytes:
            raise self._too_large()
        if self._num_bytes > share.num_bytes:
            share.reserve(self._num_bytes - share.num_bytes)

    def _too_large(self) -> ServiceError:
        response = self._options.response
        asked = {
            "response.prompt_logprobs": response.HasField("prompt_logprobs"),
            "response.logprobs": response.HasField("logprobs"),
            "response.logprob_token_ids": bool(response.logprob_token_ids),
            "response.echo": response.echo,
        }
        field = next((name for name, is_asked in asked.items() if is_asked), "stopping.max_tokens")
        description = f"asks for an answer of more than {self._max_bytes} bytes: stream it instead"
        return ServiceError(
            Code.INVALID_ARGUMENT,
            names.ANSWER_TOO_LARGE,
            f"{field} {description}",
            metadata={"maxBytes": str(self._max_bytes)},
            violations=[Violation(field, description)],
        )


def prompt_bytes(response: generation_pb2.ResponseOptions, num_tokens: int) -> int:
    """Return the bytes of the log-probabilities of a prompt of so many tokens."""
    if not response.HasField("prompt_logprobs"):
        return 0
    per_token = 1 + response.prompt_logprobs + len(response.logprob_token_ids)
    return num_tokens * per_token * ENTRY_BYTES


def _num_entries(response: generation_pb2.ResponseOptions) -> int:
    if not response.HasField("logprobs") and not response.logprob_token_ids:
        return 0
    return 1 + response.logprobs + len(response.logprob_token_ids)
