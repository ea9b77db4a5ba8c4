"""The gen_ai attributes on the gateway's server span. No prompt and no completion text, ever."""

from nanoinfer.v1 import gateway_pb2, generation_pb2
from nanoinfer_common import names
from opentelemetry.util.types import AttributeValue

from nanoinfer_gateway.generation import Generation, GenerationRequest

_SAMPLING = {
    "seed": names.GEN_AI_REQUEST_SEED,
    "temperature": names.GEN_AI_REQUEST_TEMPERATURE,
    "top_p": names.GEN_AI_REQUEST_TOP_P,
    "top_k": names.GEN_AI_REQUEST_TOP_K,
    "frequency_penalty": names.GEN_AI_REQUEST_FREQUENCY_PENALTY,
    "presence_penalty": names.GEN_AI_REQUEST_PRESENCE_PENALTY,
}
_MAX_INT = 2**63  # attributes are signed 64-bit integers, seeds are not
_FINISH_REASONS = {
    generation_pb2.FINISH_REASON_STOP: "stop",
    generation_pb2.FINISH_REASON_LENGTH: "length",
}


def request_attributes(
    request: GenerationRequest, operation: str, *, is_stream: bool
) -> dict[str, AttributeValue]:
    """Describe what was asked; options that the client left unset are absent."""
    options = request.options
    sampling = options.sampling
    attributes: dict[str, AttributeValue] = {
        names.GEN_AI_OPERATION: operation,
        names.GEN_AI_PROVIDER: "nanoinfer",
        names.GEN_AI_REQUEST_MODEL: request.model.id,
        names.GEN_AI_REQUEST_STREAM: is_stream,
        names.GEN_AI_RESPONSE_ID: request.request_id,
        names.GEN_AI_OUTPUT_TYPE: _output_type(options),
        names.STOP_COUNT: len(options.stop),
    }
    if options.stopping.HasField("max_tokens"):
        attributes[names.GEN_AI_REQUEST_MAX_TOKENS] = options.stopping.max_tokens
    if request.num_choices != 1:
        attributes[names.GEN_AI_REQUEST_CHOICE_COUNT] = request.num_choices
    for field, name in _SAMPLING.items():
        if sampling.HasField(field):
            value = getattr(sampling, field)
            attributes[name] = value if value < _MAX_INT else str(value)
    return attributes


def result_attributes(generation: Generation, model: str) -> dict[str, AttributeValue]:
    """Describe what came out so far, also where the request ended early."""
    completions = generation.completions
    if completions is None:
        return {}
    reasons = [_FINISH_REASONS.get(finish.reason, "error") for finish in completions.finishes]
    usage = generation.usage()
    attributes: dict[str, AttributeValue] = {
        names.GEN_AI_RESPONSE_MODEL: model,
        names.GEN_AI_FINISH_REASONS: [*reasons, *["abort"] * completions.num_unfinished],
        names.GEN_AI_INPUT_TOKENS: usage.prompt_tokens,
        names.GEN_AI_OUTPUT_TOKENS: usage.completion_tokens,
        names.GEN_AI_CACHED_TOKENS: usage.cached_tokens,
        names.GEN_AI_REASONING_TOKENS: usage.reasoning_tokens,
    }
    if generation.time_to_first_token_ns is not None:
        attributes[names.GEN_AI_TIME_TO_FIRST_CHUNK] = generation.time_to_first_token_ns / 1e9
    return attributes


def _output_type(options: gateway_pb2.GenerationOptions) -> str:
    constraint = options.structured_output.WhichOneof("constraint")
    return "json" if constraint in ("json_schema", "json_object") else "text"
