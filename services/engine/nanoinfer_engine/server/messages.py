"""Proto → plain data: what a request asks for, and what is served.

`ServedModel` resolves every unset field, so nothing below knows presence.
"""

from __future__ import annotations

import secrets
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

from nanoinfer.v1 import engine_pb2, generation_pb2
from nanoinfer_common import errors, names
from nanoinfer_common.errors import Violation
from nanoinfer_common.validation import Limits, RequestMetadata

from nanoinfer_engine.core.capacity import Capacity
from nanoinfer_engine.core.request import (
    Request,
    RequestTimes,
    SamplingOptions,
    StoppingOptions,
    prompt_key,
)
from nanoinfer_engine.sampling.processors import EXTENSIONS, may_run_ahead
from nanoinfer_engine.weights.generation_config import SamplingDefaults

FEATURES = frozenset(
    {
        generation_pb2.FEATURE_LOGPROBS,
        generation_pb2.FEATURE_PROMPT_LOGPROBS,
        generation_pb2.FEATURE_LOGPROB_TOKEN_IDS,
        generation_pb2.FEATURE_MULTIPLE_CHOICES,
        generation_pb2.FEATURE_PENALTIES,
        generation_pb2.FEATURE_LOGIT_BIAS,
        generation_pb2.FEATURE_ALLOWED_TOKEN_IDS,
        generation_pb2.FEATURE_TRUNCATE_PROMPT,
    }
)
GREEDY_BELOW = 1e-5
FINGERPRINT_BYTES = 32
# The prompt's log-probabilities travel in one message, which may have 8 MiB: 64 bytes for each.
MAX_PROMPT_ENTRIES = 1 << 17


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
    caches_prefixes: bool = True

    @property
    def features(self) -> frozenset[generation_pb2.Feature]:
        """What a request may ask for, and what the engine does by itself."""
        own = {generation_pb2.FEATURE_PREFIX_CACHING} if self.caches_prefixes else set()
        return FEATURES | own

    @property
    def limits(self) -> Limits:
        """What the common validator checks a request against."""
        return Limits(
            vocab_size=self.vocab_size,
            max_model_len=self.capacity.max_model_len,
            features=self.features,
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
                repetition_penalty=self.defaults.repetition_penalty,
                frequency_penalty=0.0,
                presence_penalty=0.0,
                n=1,
                **EXTENSIONS,
            ),
            stated_sampling=generation_pb2.SamplingParams(
                **{name: getattr(self.defaults, name) for name in self.defaults.stated}
            ),
            features=sorted(self.features),
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

        Completion i uses seed + i, modulo 2^64; the first alone scores the prompt for all.
        `deadline` is in monotonic nanoseconds.
        """
        prompt = tuple(prompt_ids(proto))
        stopping = self._stopping(proto.stopping, len(prompt))
        sampling = proto.sampling
        seed = sampling.seed if sampling.HasField("seed") else secrets.randbits(64)
        first = self._sampling(sampling, proto.response, seed)
        _check_choice(first, stopping)
        _check_scores(first, len(prompt))
        others = replace(first, num_prompt_logprobs=None)
        arrived, num_bytes, key = time.monotonic_ns(), proto.ByteSize(), prompt_key(prompt)
        runs_ahead = may_run_ahead(first)
        return [
            Request(
                request_id=metadata.request_id,
                index=index,
                prompt_token_ids=prompt,
                sampling=replace(others if index else first, seed=(seed + index) % 2**64),
                stopping=stopping,
                times=RequestTimes(arrived),
                priority=metadata.priority,
                tenant=metadata.tenant or "",
                deadline=deadline,
                cache_salt=proto.cache_salt if proto.HasField("cache_salt") else None,
                num_bytes=num_bytes,
                prompt_key=key,
                may_run_ahead=runs_ahead,
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
        default = defaults.repetition_penalty
        listed = tuple(dict.fromkeys(response.logprob_token_ids))
        # listed ids make an entry for each token necessary, as if `logprobs` were 0
        has_logprobs = response.HasField("logprobs") or listed
        scores_prompt = response.HasField("prompt_logprobs")
        allowed = params.allowed_token_ids
        return SamplingOptions(
            temperature=0.0 if temperature < GREEDY_BELOW else temperature,
            top_k=min(top_k, self.vocab_size),
            top_p=params.top_p if params.HasField("top_p") else defaults.top_p,
            min_p=params.min_p if params.HasField("min_p") else defaults.min_p,
            seed=seed,
            num_logprobs=response.logprobs if has_logprobs else None,
            repetition_penalty=(
                params.repetition_penalty if params.HasField("repetition_penalty") else default
            ),
            frequency_penalty=params.frequency_penalty,
            presence_penalty=params.presence_penalty,
            logit_bias=tuple(params.logit_bias.items()),
            allowed_token_ids=array("q", allowed) if allowed else None,
            num_prompt_logprobs=response.prompt_logprobs if scores_prompt else None,
            logprob_token_ids=listed,
            extensions=tuple(
                (name, getattr(params, name))
                for name, neutral in EXTENSIONS.items()
                if params.HasField(name) and getattr(params, name) != neutral
            ),
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


def prompt_ids(proto: engine_pb2.EngineServiceGenerateRequest) -> Sequence[int]:
    """The prompt's ids, the last `truncate_prompt_tokens` of them where that is set."""
    ids = proto.prompt.ids
    return ids[-proto.truncate_prompt_tokens :] if proto.truncate_prompt_tokens else ids


def _check_choice(sampling: SamplingOptions, stopping: StoppingOptions) -> None:
    """Raise INVALID_ARGUMENT where no id may be chosen until `min_tokens` is reached."""
    allowed = sampling.allowed_token_ids
    if allowed is not None and stopping.masked_token_ids(0).issuperset(allowed):
        _refuse(
            names.INVALID_SAMPLING_PARAMS,
            "sampling.allowed_token_ids",
            "must have an id that does not end the completion before min_tokens",
        )


def _check_scores(sampling: SamplingOptions, num_prompt_tokens: int) -> None:
    """Raise INVALID_ARGUMENT for more log-probabilities of the prompt than one message takes."""
    if sampling.num_prompt_logprobs is None:
        return
    per_token = 1 + sampling.num_prompt_logprobs + len(sampling.logprob_token_ids)
    if num_prompt_tokens * per_token > MAX_PROMPT_ENTRIES:
        _refuse(
            names.INVALID_RESPONSE_OPTIONS,
            "response.prompt_logprobs",
            f"asks for {num_prompt_tokens} x {per_token} entries; one answer has room for"
            f" {MAX_PROMPT_ENTRIES}",
        )


def _refuse(reason: str, field: str, description: str) -> NoReturn:
    raise errors.invalid(reason, f"{field} {description}", Violation(field, description))
