"""Plain data → proto: the messages of one stream."""

from __future__ import annotations

import time
from collections.abc import Sequence

from google.protobuf.internal.containers import RepeatedCompositeFieldContainer
from nanoinfer.v1 import engine_pb2, generation_pb2

from nanoinfer_engine.core.request import FinishReason, Logprob, RequestOutput, SampledToken
from nanoinfer_engine.core.stream import Stream
from nanoinfer_engine.server.messages import ServedModel

_REASONS = {
    FinishReason.STOP: generation_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: generation_pb2.FINISH_REASON_LENGTH,
}
_Entries = RepeatedCompositeFieldContainer[generation_pb2.TokenLogprob]


class Answer:
    """The messages of one stream, built from the outputs of all its completions."""

    def __init__(self, stream: Stream, model: ServedModel) -> None:
        """`stream` brings the outputs that `message` is then called with."""
        self.num_sent_tokens = 0
        self._stream = stream
        self._model = model
        self._num_live = len(stream.requests)
        self._is_first = True
        scorer = stream.requests[0]
        self._awaits_scores = scorer.scores_prompt and len(scorer.prompt_token_ids) > 1
        self._held: list[RequestOutput] = []

    def message(
        self, outputs: Sequence[RequestOutput]
    ) -> engine_pb2.EngineServiceGenerateResponse | None:
        """What is new in `outputs`, merged: at most one delta for each index; None if nothing is.

        Outputs that ended without a FinishReason of the contract only contribute their tokens.
        Outputs that come before the prompt's log-probabilities wait for them, because those belong
        into the first message.
        """
        if self._awaits_scores:
            self._held += outputs
            if not any(output.prompt_logprobs for output in outputs):
                return None
            self._awaits_scores, outputs = False, self._held
        message = engine_pb2.EngineServiceGenerateResponse()
        deltas: dict[int, engine_pb2.TokenDelta] = {}
        for output in outputs:
            index = output.request.index
            for token in output.tokens:
                delta = deltas.get(index) or deltas.setdefault(index, message.deltas.add())
                delta.index = index
                _add_token(delta, token)
            self.num_sent_tokens += len(output.tokens)
            if output.finish_reason in _REASONS:
                message.finishes.append(_finish(output))
                self._num_live -= 1
        if not deltas and not message.finishes:
            return None
        if self._is_first:
            message.prompt_info.prompt_tokens = len(self._stream.requests[0].prompt_token_ids)
            for output in outputs:
                for token in output.prompt_logprobs:
                    _add_logprob(message.prompt_info.prompt_logprobs, token)
            message.prompt_info.cached_tokens = self._num_cached_tokens
            message.first_token_timings.CopyFrom(_first_token_timings(outputs[0]))
            self._is_first = False
        if self._num_live == 0:
            message.summary.CopyFrom(self._summary())
        return message

    @property
    def _num_cached_tokens(self) -> int:
        # The first completion's: its siblings find in the cache what it has just computed.
        return self._stream.requests[0].num_cached_tokens or 0

    def _summary(self) -> generation_pb2.GenerationSummary:
        slowest, requests = self._stream.slowest_request, self._stream.requests
        phases = slowest.times.phases()
        firsts = [r.times.first_token for r in requests if r.times.first_token is not None]
        return generation_pb2.GenerationSummary(
            usage=generation_pb2.Usage(
                prompt_tokens=len(slowest.prompt_token_ids),
                completion_tokens=sum(len(r.completion_token_ids) for r in requests),
                cached_tokens=self._num_cached_tokens,
            ),
            timings=generation_pb2.Timings(
                queue_ns=phases.queue,
                prefill_ns=phases.prefill,
                decode_ns=phases.decode,
                total_ns=time.monotonic_ns() - slowest.times.arrived,
                time_to_first_token_ns=min(firsts) - slowest.times.arrived,
            ),
            model=self._model.name,
            tokenizer_fingerprint=self._model.tokenizer_fingerprint or b"",
            request_id=slowest.request_id,
        )


def _first_token_timings(output: RequestOutput) -> generation_pb2.Timings:
    phases = output.request.times.phases_to_first_token()
    return generation_pb2.Timings(
        queue_ns=phases.queue,
        prefill_ns=phases.prefill,
        time_to_first_token_ns=phases.total,
    )


def _finish(output: RequestOutput) -> generation_pb2.ChoiceFinish:
    request, stopped_by = output.request, output.stop_token_id
    finish = generation_pb2.ChoiceFinish(
        index=request.index,
        reason=_REASONS[output.finish_reason] if output.finish_reason else None,
        seed=request.sampling.seed,
    )
    if stopped_by is None:
        return finish
    if stopped_by in request.stopping.stop_token_ids:
        finish.stop_match.token_id = stopped_by
    else:
        finish.stop_match.eos = True
    return finish


def _add_token(delta: engine_pb2.TokenDelta, token: SampledToken) -> None:
    delta.token_ids.append(token.token_id)
    _add_logprob(delta.logprobs, token)


def _add_logprob(entries: _Entries, token: SampledToken) -> None:
    if token.logprob is not None:
        entry = entries.add()
        _fill_logprob(entry, token.logprob)
        for alternative in token.top:
            _fill_logprob(entry.top.add(), alternative)


def _fill_logprob(
    message: generation_pb2.TokenLogprob | generation_pb2.TopLogprob, value: Logprob
) -> None:
    message.token_id, message.logprob, message.rank = value.token_id, value.logprob, value.rank
