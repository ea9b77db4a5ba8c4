"""What one request has produced so far: engine messages go in, text deltas come out, merged.

Synchronous and without network. All completions of a request live here, because usage is counted
over them and the engine's call ends with the last of them.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from nanoinfer.v1 import engine_pb2, gateway_pb2, generation_pb2

from nanoinfer_gateway.core.answer_bytes import ENTRY_BYTES, TOKEN_ID_BYTES
from nanoinfer_gateway.core.text import CompletionText
from nanoinfer_gateway.core.vocabulary import Vocabulary


@dataclass
class Update:
    """What is new since the update before; `summary` stands in the last one.

    `num_bytes` is about what it takes on the wire.
    """

    prompt_info: generation_pb2.PromptInfo | None = None
    deltas: list[gateway_pb2.TextDelta] = field(default_factory=list)
    finishes: list[generation_pb2.ChoiceFinish] = field(default_factory=list)
    summary: generation_pb2.GenerationSummary | None = None
    num_bytes: int = 0

    @property
    def has_content(self) -> bool:
        """Whether there is anything to send."""
        return bool(self.prompt_info or self.deltas or self.finishes or self.summary)


@dataclass
class _Completion:
    """One index: its text, and its finish once it has ended. `cut` by a stop string."""

    text: CompletionText
    finish: generation_pb2.ChoiceFinish | None = None
    cut: bool = False

    def num_tokens(self, *, include_stop: bool) -> int:
        """Tokens produced, a matched stop id or EOS included though it is no part of the output."""
        match = self.finish.stop_match.WhichOneof("match") if self.finish else None
        hidden = match == "eos" or (match == "token_id" and not include_stop)
        return self.text.num_tokens + hidden


class Completions:
    """Decodes, matches stop strings and merges. The seed must be set where there are stop strings.

    `echo` is the prompt, as text or ids, that goes before every completion; empty for none.

    A completion that a stop string ended takes no more from the engine: its ids and
    log-probabilities go up to the token that completed the string, and so does its count.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        options: gateway_pb2.GenerationOptions,
        num_choices: int,
        echo: str | Sequence[int] = "",
    ) -> None:
        stopping, response = options.stopping, options.response
        skip = not response.HasField("skip_special_tokens") or response.skip_special_tokens
        spelling = vocabulary.without_specials if skip else vocabulary.spelling
        stop_ids = {
            vocabulary.special_texts[stop.encode()]: stop
            for stop in options.stop
            if skip and stop.encode() in vocabulary.special_texts
        }
        self._vocabulary = vocabulary
        self._return_ids = response.return_token_ids
        self._include_stop = stopping.include_stop_in_output
        self._seed = options.sampling.seed
        self._echo = echo
        self._completions = [
            _Completion(
                CompletionText(
                    spelling,
                    options.stop,
                    stop_ids=stop_ids,
                    continues=isinstance(echo, str) and echo != "",
                    min_tokens=stopping.min_tokens,
                    include_stop=stopping.include_stop_in_output,
                )
            )
            for _ in range(num_choices)
        ]
        self._prompt_info = generation_pb2.PromptInfo()
        self._new_prompt_info: generation_pb2.PromptInfo | None = None
        self._deltas: dict[int, gateway_pb2.TextDelta] = {}
        self._new_finishes: list[generation_pb2.ChoiceFinish] = []
        self.num_pending_tokens = self.num_pending_bytes = 0
        self.detokenize_ns = 0
        self.first_token_ns: int | None = None
        self.last_token_ns: int | None = None

    @property
    def num_tokens(self) -> int:
        """Completion tokens so far, over all completions."""
        include = self._include_stop
        return sum(c.num_tokens(include_stop=include) for c in self._completions)

    @property
    def all_ended(self) -> bool:
        """Whether every completion has its finish."""
        return not self.num_unfinished

    @property
    def num_unfinished(self) -> int:
        """How many completions have no finish yet."""
        return sum(c.finish is None for c in self._completions)

    @property
    def any_cut(self) -> bool:
        """Whether a stop string ended one, so that the engine's own usage does not hold."""
        return any(c.cut for c in self._completions)

    @property
    def finishes(self) -> list[generation_pb2.ChoiceFinish]:
        """The finishes so far, by index."""
        return [c.finish for c in self._completions if c.finish is not None]

    @property
    def decode_ns(self) -> int:
        """From the first token to the last, as they arrived here."""
        if self.first_token_ns is None or self.last_token_ns is None:
            return 0
        return self.last_token_ns - self.first_token_ns

    @property
    def has_news(self) -> bool:
        """Whether `take` would return anything."""
        return bool(self._deltas or self._new_finishes or self._new_prompt_info)

    def feed(self, message: engine_pb2.EngineServiceGenerateResponse) -> None:
        """Take in one message of the engine."""
        started = time.perf_counter_ns()
        if message.HasField("prompt_info"):
            self._prompt_info = self._new_prompt_info = message.prompt_info
            self._fill_in(message.prompt_info.prompt_logprobs)
            for index, completion in enumerate(self._completions):
                if self._echo:
                    self._add(index, completion.text.echo(self._echo))
        for delta in message.deltas:
            self._feed_delta(delta)
        for finish in message.finishes:
            self._end(finish)
        now = time.perf_counter_ns()
        self.detokenize_ns += now - started
        if message.deltas:
            self.first_token_ns = self.first_token_ns or now
            self.last_token_ns = now

    def take(self) -> Update:
        """Return what piled up since the last call, one delta an index."""
        update = Update(
            self._new_prompt_info,
            list(self._deltas.values()),
            self._new_finishes,
            num_bytes=self.num_pending_bytes,
        )
        self._new_prompt_info, self._deltas, self._new_finishes = None, {}, []
        self.num_pending_tokens = self.num_pending_bytes = 0
        return update

    def usage(self, reported: generation_pb2.GenerationSummary | None) -> generation_pb2.Usage:
        """Return the engine's count, or our own where a stop string ended a completion."""
        if reported is not None and not self.any_cut:
            return reported.usage
        return generation_pb2.Usage(
            prompt_tokens=self._prompt_info.prompt_tokens,
            completion_tokens=self.num_tokens,
            cached_tokens=self._prompt_info.cached_tokens,
        )

    def _feed_delta(self, delta: engine_pb2.TokenDelta) -> None:
        completion = self._completions[delta.index]
        if completion.finish is not None:
            return
        before = completion.text.num_tokens
        text = completion.text.feed(delta.token_ids)
        num_taken = completion.text.num_tokens - before
        self.num_pending_tokens += num_taken
        logprobs = delta.logprobs[:num_taken]
        self._fill_in(logprobs)
        token_ids = delta.token_ids[:num_taken] if self._return_ids else ()
        self._add(delta.index, text, token_ids, logprobs)
        if completion.text.stop is not None:
            completion.cut = True
            self._finish(
                completion,
                generation_pb2.ChoiceFinish(
                    index=delta.index,
                    reason=generation_pb2.FINISH_REASON_STOP,
                    stop_match=generation_pb2.StopMatch(stop=completion.text.stop),
                    seed=(self._seed + delta.index) % 2**64,
                ),
            )

    def _end(self, finish: generation_pb2.ChoiceFinish) -> None:
        """Take the engine's finish, unless a stop string came first."""
        completion = self._completions[finish.index]
        if completion.finish is None:
            self._add(finish.index, completion.text.flush())
            self._finish(completion, finish)

    def _finish(self, completion: _Completion, finish: generation_pb2.ChoiceFinish) -> None:
        completion.finish = finish
        self._new_finishes.append(finish)

    def _add(
        self,
        index: int,
        text: str,
        token_ids: Sequence[int] = (),
        logprobs: Sequence[generation_pb2.TokenLogprob] = (),
    ) -> None:
        if not (text or token_ids or logprobs):
            return
        delta = self._deltas.get(index)
        if delta is None:
            delta = self._deltas[index] = gateway_pb2.TextDelta(index=index)
        delta.text += text
        delta.token_ids.extend(token_ids)
        delta.logprobs.extend(logprobs)
        self.num_pending_bytes += len(text) + TOKEN_ID_BYTES * len(token_ids)

    def _fill_in(self, logprobs: Sequence[generation_pb2.TokenLogprob]) -> None:
        """Add the raw bytes, which the engine does not know."""
        token = self._vocabulary.token
        num_bytes = 0
        for entry in logprobs:
            entry.token = raw = token(entry.token_id)
            num_bytes += ENTRY_BYTES + len(raw)
            for alternative in entry.top:
                alternative.token = raw = token(alternative.token_id)
                num_bytes += ENTRY_BYTES + len(raw)
        self.num_pending_bytes += num_bytes
