"""The gen_ai attributes on the gateway's server span. No prompt and no completion text, ever."""

from nanoinfer.v1 import gateway_pb2, generation_pb2
from opentelemetry.util.types import AttributeValue

from nanoinfer_gateway.core.generation import Generation
from nanoinfer_gateway.core.requests import GenerationRequest

_SAMPLING = {
    "seed": "gen_ai.request.seed",
    "temperature": "gen_ai.request.temperature",
    "top_p": "gen_ai.request.top_p",
    "top_k": "gen_ai.request.top_k",
    "frequency_penalty": "gen_ai.request.frequency_penalty",
    "presence_penalty": "gen_ai.request.presence_penalty",
}
_MAX_INT = 2**63  # attributes are signed 64-bit integers, seeds are not
_FINISH_REASONS = {
    generation_pb2.FINISH_REASON_STOP: "stop",
    generation_pb2.FINISH_REASON_LENGTH: "length",
}


def request_attributes(request: GenerationRequest, *, is_stream: bool) -> dict[str, AttributeValue]:
    """Describe what was asked; options that the client left unset are absent."""
    options = request.options
    sampling = options.sampling
    attributes: dict[str, AttributeValue] = {
        "gen_ai.operation.name": "chat" if request.is_chat else "text_completion",
        "gen_ai.provider.name": "nanoinfer",
        "gen_ai.request.model": request.model.id,
        "gen_ai.request.stream": is_stream,
        "gen_ai.response.id": request.caller.request_id,
        "gen_ai.output.type": _output_type(options),
        "nanoinfer.request.stop_count": len(options.stop),
    }
    if options.stopping.HasField("max_tokens"):
        attributes["gen_ai.request.max_tokens"] = options.stopping.max_tokens
    if request.num_choices != 1:
        attributes["gen_ai.request.choice.count"] = request.num_choices
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
        "gen_ai.response.model": model,
        "gen_ai.response.finish_reasons": [*reasons, *["abort"] * completions.num_unfinished],
        "gen_ai.usage.input_tokens": usage.prompt_tokens,
        "gen_ai.usage.output_tokens": usage.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
        "gen_ai.usage.reasoning.output_tokens": usage.reasoning_tokens,
    }
    if generation.time_to_first_token_ns is not None:
        attributes["gen_ai.response.time_to_first_chunk"] = generation.time_to_first_token_ns / 1e9
    return attributes


def _output_type(options: gateway_pb2.GenerationOptions) -> str:
    constraint = options.structured_output.WhichOneof("constraint")
    return "json" if constraint in ("json_schema", "json_object") else "text"
