"""Proto ⇄ plain data: what a request asks for, and what an answer says.

`ServedModel` resolves every unset field, so nothing below knows presence. `Answer` remembers what
was sent, so that every message is a delta.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass

from nanoinfer.v1 import engine_pb2, generation_pb2
from nanoinfer_common import errors, names
from nanoinfer_common.errors import Violation
from nanoinfer_common.validation import Limits, RequestMetadata

from nanoinfer_engine.capacity import Capacity
from nanoinfer_engine.defaults import SamplingDefaults
from nanoinfer_engine.request import (
    FinishReason,
    Logprob,
    Request,
    RequestOutput,
    RequestTimes,
    SampledToken,
    SamplingOptions,
    StoppingOptions,
)
from nanoinfer_engine.stream import Stream

FEATURES = frozenset(
    {generation_pb2.FEATURE_LOGPROBS, generation_pb2.FEATURE_MULTIPLE_CHOICES},
)
GREEDY_BELOW = 1e-5
FINGERPRINT_BYTES = 32
_REASONS = {
    FinishReason.STOP: generation_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: generation_pb2.FINISH_REASON_LENGTH,
}


@dataclass(frozen=True)
class ServedModel:
    """Everything about the loaded model that the contract shows or a request depends on."""

    name: str
    architecture: str
    dtype: str
    vocab_size: int
    num_parameters: int
    capacity: Capacity
    eos_token_ids: tuple[int, ...]
    defaults: SamplingDefaults
    tokenizer_fingerprint: bytes | None
    weights_fingerprint: bytes

    @property
    def limits(self) -> Limits:
        """What the common validator checks a request against."""
        return Limits(
            vocab_size=self.vocab_size,
            max_model_len=self.capacity.max_model_len,
            features=FEATURES,
        )

    def info(self) -> generation_pb2.ModelInfo:
        """The description that `GetModelInfo` gives, the default of every sampling field set."""
        return generation_pb2.ModelInfo(
            id=self.name,
            max_model_len=self.capacity.max_model_len,
            max_output_tokens=self.capacity.max_output_tokens,
            vocab_size=self.vocab_size,
            eos_token_ids=self.eos_token_ids,
            default_sampling=generation_pb2.SamplingParams(
                temperature=self.defaults.temperature,
                top_p=self.defaults.top_p,
                top_k=self.defaults.top_k,
                min_p=self.defaults.min_p,
                repetition_penalty=1.0,
                frequency_penalty=0.0,
                presence_penalty=0.0,
                n=1,
            ),
            features=sorted(FEATURES),
            tokenizer_fingerprint=self.tokenizer_fingerprint,
            weights_fingerprint=self.weights_fingerprint,
            architecture=self.architecture,
            num_parameters=self.num_parameters,
            dtype=self.dtype,
        )

    def check_tokenizer(self, proto: engine_pb2.EngineServiceGenerateRequest) -> None:
        """Raise FAILED_PRECONDITION if the ids come from another tokenizer than the model's.

        Not checked where the caller vouches for its ids or the model brings no tokenizer.
        """
        if not proto.HasField("tokenizer_fingerprint"):
            return
        given, own = proto.tokenizer_fingerprint, self.tokenizer_fingerprint
        if len(given) != FINGERPRINT_BYTES:
            description = f"must have {FINGERPRINT_BYTES} bytes"
            raise errors.invalid(
                names.INVALID_REQUEST,
                f"tokenizer_fingerprint {description}",
                Violation("tokenizer_fingerprint", description),
            )
        if own is not None and given != own:
            raise errors.precondition(
                names.TOKENIZER_MISMATCH,
                "the prompt's ids come from another tokenizer than the model's",
                requestFingerprint=given.hex(),
                modelFingerprint=own.hex(),
            )

    def requests(
        self,
        proto: engine_pb2.EngineServiceGenerateRequest,
        metadata: RequestMetadata,
        deadline: int | None,
    ) -> list[Request]:
        """One request for each completion of a validated `proto`; raises CapacityError.

        Completion i uses seed + i, modulo 2^64. `deadline` is in monotonic nanoseconds.
        """
        prompt = tuple(proto.prompt.ids)
        stopping = self._stopping(proto.stopping, len(prompt))
        sampling = proto.sampling
        seed = sampling.seed if sampling.HasField("seed") else secrets.randbits(64)
        arrived = time.monotonic_ns()
        return [
            Request(
                request_id=metadata.request_id,
                index=index,
                prompt_token_ids=prompt,
                sampling=self._sampling(sampling, proto.response, (seed + index) % 2**64),
                stopping=stopping,
                times=RequestTimes(arrived),
                priority=metadata.priority,
                tenant=metadata.tenant or "",
                deadline=deadline,
            )
            for index in range(sampling.n if sampling.HasField("n") else 1)
        ]

    def _sampling(
        self,
        params: generation_pb2.SamplingParams,
        response: generation_pb2.ResponseOptions,
        seed: int,
    ) -> SamplingOptions:
        defaults = self.defaults
        temperature = params.temperature if params.HasField("temperature") else defaults.temperature
        top_k = params.top_k if params.HasField("top_k") else defaults.top_k
        return SamplingOptions(
            temperature=0.0 if temperature < GREEDY_BELOW else temperature,
            top_k=min(top_k, self.vocab_size),
            top_p=params.top_p if params.HasField("top_p") else defaults.top_p,
            min_p=params.min_p if params.HasField("min_p") else defaults.min_p,
            seed=seed,
            num_logprobs=response.logprobs if response.HasField("logprobs") else None,
        )

    def _stopping(
        self, params: generation_pb2.StoppingParams, num_prompt_tokens: int
    ) -> StoppingOptions:
        asked = params.max_tokens if params.HasField("max_tokens") else None
        return StoppingOptions(
            max_tokens=self.capacity.max_tokens(num_prompt_tokens, asked),
            min_tokens=params.min_tokens,
            stop_token_ids=frozenset(params.stop_token_ids),
            eos_token_ids=frozenset(() if params.ignore_eos else self.eos_token_ids),
            include_stop_token=params.include_stop_in_output,
        )


class Answer:
    """The messages of one stream, built from the outputs of all its completions."""

    def __init__(self, stream: Stream, model: ServedModel) -> None:
        """`stream` brings the outputs that `message` is then called with."""
        self.num_sent_tokens = 0
        self._stream = stream
        self._model = model
        self._num_live = len(stream.requests)
        self._is_first = True

    def message(
        self, outputs: Sequence[RequestOutput]
    ) -> engine_pb2.EngineServiceGenerateResponse | None:
        """What is new in `outputs`, merged: at most one delta for each index; None if nothing is.

        Outputs that ended without a FinishReason of the contract only contribute their tokens.
        """
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
            self._is_first = False
        if self._num_live == 0:
            message.summary.CopyFrom(self._summary())
        return message

    def _summary(self) -> generation_pb2.GenerationSummary:
        slowest, requests = self._stream.slowest_request, self._stream.requests
        phases = slowest.times.phases()
        firsts = [r.times.first_token for r in requests if r.times.first_token is not None]
        return generation_pb2.GenerationSummary(
            usage=generation_pb2.Usage(
                prompt_tokens=len(slowest.prompt_token_ids),
                completion_tokens=sum(len(r.completion_token_ids) for r in requests),
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
    if token.logprob is not None:
        entry = delta.logprobs.add()
        _fill_logprob(entry, token.logprob)
        for alternative in token.top:
            _fill_logprob(entry.top.add(), alternative)


def _fill_logprob(
    message: generation_pb2.TokenLogprob | generation_pb2.TopLogprob, value: Logprob
) -> None:
    message.token_id, message.logprob, message.rank = value.token_id, value.logprob, value.rank
