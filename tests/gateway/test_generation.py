"""The core with fakes in place of both upstreams: no network."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing, nullcontext
from typing import Any

import grpc
import pytest
from nanoinfer.v1 import engine_pb2, gateway_pb2, generation_pb2, tokenizer_pb2
from nanoinfer_common.detokenize import Spelling
from nanoinfer_common.errors import ServiceError, unavailable
from nanoinfer_common.stream_writes import WriteSlots
from nanoinfer_gateway.core.answer_bytes import AnswerBytes, Share
from nanoinfer_gateway.core.caller import Caller
from nanoinfer_gateway.core.collecting import Answer, collect
from nanoinfer_gateway.core.completions import Update
from nanoinfer_gateway.core.generation import (
    MAX_PENDING_TOKENS,
    Generation,
    Upstreams,
)
from nanoinfer_gateway.core.requests import EncodedPrompt, GenerationRequest
from nanoinfer_gateway.core.vocabulary import Vocabulary

from tests.gateway.fakes import (
    FINGERPRINT,
    NO_TOKEN,
    SPECIAL,
    TOKENS,
    Behaviour,
    EngineResponse,
    delta,
    endless,
    eventually,
    finish,
    ids_of,
    model_info,
    summary,
    tell,
)

VOCABULARY = Vocabulary(FINGERPRINT, Spelling(TOKENS), frozenset({SPECIAL}))


class Encoder:
    async def encode(
        self, text: str, caller: Caller, *, parse_special_tokens: bool = False
    ) -> EncodedPrompt:
        tokens = generation_pb2.TokenIds(ids=text.encode())
        return EncodedPrompt(tokens, FINGERPRINT, tokenize_ns=5)

    async def render_chat(
        self, messages: Iterable[tokenizer_pb2.ChatMessage], caller: Caller
    ) -> EncodedPrompt:
        text = "".join(message.role for message in messages)
        return await self.encode(text, caller)


class Source:
    """Plays a behaviour; `closed` tells that the stream was closed, `num_read` how far it got."""

    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.requests: list[engine_pb2.EngineServiceGenerateRequest] = []
        self.closed = asyncio.Event()
        self.num_read = 0

    async def generate(
        self, request: engine_pb2.EngineServiceGenerateRequest, model: str, caller: Caller
    ) -> AsyncGenerator[EngineResponse, None]:
        self.requests.append(request)
        try:
            async for message in self.behaviour(request):
                self.num_read += 1
                yield message
        finally:
            self.closed.set()


def play(*messages: EngineResponse | Exception) -> Behaviour:
    async def behave(request: Any) -> Any:
        for message in messages:
            if isinstance(message, Exception):
                raise message
            yield message

    return behave


def options(*stops: str, n: int | None = None, **stopping: Any) -> gateway_pb2.GenerationOptions:
    result = gateway_pb2.GenerationOptions(stop=stops)
    if n is not None:
        result.sampling.n = n
    if stopping:
        result.stopping.MergeFrom(generation_pb2.StoppingParams(**stopping))
    return result


def generation(
    source: Source,
    asked: gateway_pb2.GenerationOptions | None = None,
    prompt: Any = "hi",
    **model: Any,
) -> Generation:
    async def vocabulary(
        fingerprint: bytes | None, eos_token_ids: frozenset[int] | None
    ) -> Vocabulary:
        assert fingerprint == FINGERPRINT
        assert eos_token_ids == frozenset(request.model.eos_token_ids)
        return VOCABULARY

    request = GenerationRequest(
        prompt,
        asked or gateway_pb2.GenerationOptions(),
        model_info(**model),
        Caller("r-1"),
        time.perf_counter_ns(),
    )
    share = Share(AnswerBytes(2**25))
    return Generation(Upstreams(Encoder(), source, vocabulary), request, lambda _: None, share)


async def read(running: Generation, received: list[Update], pause: float = 0) -> None:
    async for update in running.updates(nullcontext):
        received.append(update)
        await asyncio.sleep(pause)


def text_of(updates: Iterable[Update]) -> str:
    return "".join(delta.text for update in updates for delta in update.deltas)


async def run(
    behaviour: Behaviour, asked: gateway_pb2.GenerationOptions | None = None, **more: Any
) -> tuple[Answer, Source]:
    source = Source(behaviour)
    updates = generation(source, asked, **more).updates(nullcontext)
    return await collect(updates), source


async def test_a_whole_answer_has_text_usage_timings_and_seed() -> None:
    answer, source = await run(tell(ids_of(b"Hello", b" world")))
    choice = answer.choices[0]
    assert choice.text == "Hello world"
    assert choice.finish == finish(seed=7)
    assert answer.prompt_info.prompt_tokens == 2
    assert (answer.summary.usage.prompt_tokens, answer.summary.usage.completion_tokens) == (2, 3)
    timings = answer.summary.timings
    assert (timings.tokenize_ns, timings.queue_ns, timings.prefill_ns, timings.decode_ns) == (
        5,
        11,
        22,
        33,
    )
    assert 0 < timings.detokenize_ns < timings.total_ns
    assert 0 < timings.time_to_first_token_ns < timings.total_ns
    assert answer.summary.model == "fake"
    assert answer.summary.request_id == "r-1"
    assert answer.summary.tokenizer_fingerprint == FINGERPRINT
    assert source.requests[0].tokenizer_fingerprint == FINGERPRINT


@pytest.mark.parametrize("skip", [True, False])
async def test_a_stop_string_that_is_a_special_tokens_text_ends_at_the_token(skip: bool) -> None:
    asked = options("<|end|>")
    asked.sampling.seed = 7
    asked.response.skip_special_tokens = skip
    answer, _ = await run(tell(ids_of(b"Hello", SPECIAL, b" world")), asked)
    choice = answer.choices[0]
    assert (choice.text, choice.finish.stop_match.stop) == ("Hello", "<|end|>")
    assert answer.summary.usage.completion_tokens == 2


async def test_what_the_client_set_goes_on_untouched_and_nothing_else() -> None:
    asked = gateway_pb2.GenerationOptions(
        sampling=generation_pb2.SamplingParams(temperature=0, top_k=0, n=2),
        stopping=generation_pb2.StoppingParams(max_tokens=9, min_tokens=0),
        response=generation_pb2.ResponseOptions(logprobs=0),
        structured_output=generation_pb2.StructuredOutput(regex="a"),
        model="fake",
        truncate_prompt_tokens=3,  # done here
        cache_salt="salt",
    )
    asked.response.echo = True  # done here too
    _, source = await run(tell(ids_of(b"Hello")), asked)
    expected = engine_pb2.EngineServiceGenerateRequest(
        prompt=generation_pb2.TokenIds(ids=b"hi"),
        sampling=asked.sampling,
        stopping=asked.stopping,
        response=generation_pb2.ResponseOptions(logprobs=0),
        structured_output=asked.structured_output,
        request_id="r-1",
        model="fake",
        cache_salt="salt",
        tokenizer_fingerprint=FINGERPRINT,
    )
    assert source.requests == [expected]
    _, source = await run(tell(ids_of(b"Hello")))
    set_fields = {descriptor.name for descriptor, _ in source.requests[0].ListFields()}
    assert set_fields == {"prompt", "request_id", "tokenizer_fingerprint"}


async def test_the_callers_own_ids_carry_no_fingerprint() -> None:
    prompt = generation_pb2.TokenIds(ids=[1, 2, 3])
    answer, source = await run(tell(ids_of(b"Hello")), prompt=prompt)
    assert source.requests[0].prompt == prompt
    assert not source.requests[0].HasField("tokenizer_fingerprint")
    assert answer.summary.timings.tokenize_ns == 0


@pytest.mark.matrix("R22")
@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("pieces", "stop", "text", "num_tokens"),
    [
        ((b"Hello", b"STOP", b" world"), "STOP", "Hello", 2),
        ((b"Hello", b" STO", b"P now", b" world"), "STOP", "Hello ", 3),
        ((b"a", "日".encode(), b"b"), "日", "a", 4),
        ((b"a", "日本".encode(), b"c"), "本", "a日", 2),
        ((b"Hello", b" STO", b" world"), "STOP", "Hello STO world", 4),
    ],
)
async def test_stop_strings_cross_tokens_characters_and_messages(
    pieces: tuple[bytes, ...], stop: str, text: str, num_tokens: int, chunk: int
) -> None:
    asked = options(stop)
    asked.response.return_token_ids = True
    ids = ids_of(*pieces)
    answer, source = await run(tell(ids, chunk=chunk), asked)
    choice = answer.choices[0]
    assert choice.text == text
    assert answer.summary.usage.completion_tokens == num_tokens
    matched = choice.finish.stop_match.WhichOneof("match") == "stop"
    assert matched == (stop not in text and num_tokens <= len(ids))
    if matched:
        assert choice.finish.stop_match.stop == stop
        assert list(choice.token_ids) == ids[:num_tokens]
    assert source.closed.is_set()


async def test_a_stop_string_ends_the_engines_call_before_the_last_message() -> None:
    source = Source(endless())
    asked = options("aaa")
    received: list[Update] = []
    await read(generation(source, asked), received)
    last = received[-1]
    assert source.closed.is_set()
    assert last.summary is not None
    assert last.summary.usage == generation_pb2.Usage(prompt_tokens=2, completion_tokens=3)
    assert last.summary.timings.decode_ns > 0
    assert text_of(received) == ""
    assert last.finishes[0].reason == generation_pb2.FINISH_REASON_STOP


async def test_an_answer_that_a_stop_string_ended_tells_the_engines_first_times() -> None:
    early = generation_pb2.Timings(queue_ns=3, prefill_ns=4, time_to_first_token_ns=7)
    behaviour = play(
        engine_pb2.EngineServiceGenerateResponse(
            prompt_info=generation_pb2.PromptInfo(prompt_tokens=2),
            deltas=[delta(ids_of(b"Hello"))],
            first_token_timings=early,
        ),
        engine_pb2.EngineServiceGenerateResponse(deltas=[delta(ids_of(b"STOP"))]),
    )
    answer, source = await run(behaviour, options("STOP"))
    timings = answer.summary.timings
    assert (timings.queue_ns, timings.prefill_ns) == (3, 4)
    assert timings.decode_ns > 0
    assert timings.time_to_first_token_ns > early.time_to_first_token_ns  # the gateway's own
    assert source.requests[0].cancels_at_stop_strings


async def test_include_stop_keeps_the_string() -> None:
    asked = options("STOP", include_stop_in_output=True)
    answer, _ = await run(tell(ids_of(b"Hello", b" STO", b"P now")), asked)
    assert answer.choices[0].text == "Hello STOP"


async def test_the_seed_is_known_though_a_stop_string_ended_the_call() -> None:
    asked = options("STOP", n=2)
    answer, source = await run(tell(ids_of(b"STOP", b"a")), asked)
    drawn = source.requests[0].sampling.seed
    assert [choice.finish.seed for choice in answer.choices] == [drawn, (drawn + 1) % 2**64]
    assert not asked.sampling.HasField("seed")
    asked.sampling.seed = 2**64 - 1
    answer, source = await run(tell(ids_of(b"STOP", b"a")), asked)
    assert source.requests[0].sampling.seed == 2**64 - 1
    assert [choice.finish.seed for choice in answer.choices] == [2**64 - 1, 0]


async def test_one_choice_stops_and_the_others_go_on() -> None:
    behaviour = play(
        EngineResponse(prompt_info=generation_pb2.PromptInfo(prompt_tokens=2)),
        EngineResponse(deltas=[delta(ids_of(b"STOP"), 0), delta(ids_of(b"Hello"), 1)]),
        EngineResponse(deltas=[delta(ids_of(b"Hello"), 0), delta(ids_of(b" world"), 1)]),
        EngineResponse(finishes=[finish(0, eos=False), finish(1)]),
        EngineResponse(summary=summary(2, 5)),
    )
    answer, source = await run(behaviour, options("STOP", n=2))
    first, second = answer.choices
    assert (first.text, first.finish.stop_match.stop) == ("", "STOP")
    assert (second.text, second.finish.stop_match.eos) == ("Hello world", True)
    # one token of the first, two and EOS of the second; not what the engine counted
    assert answer.summary.usage.completion_tokens == 1 + 3
    assert source.closed.is_set()


async def test_logprobs_get_the_tokens_bytes_and_end_with_the_match() -> None:
    logprobs = [
        generation_pb2.TokenLogprob(
            token_id=token_id,
            logprob=-0.5,
            rank=1,
            top=[generation_pb2.TopLogprob(token_id=0xE6, logprob=-0.5, rank=1)],
        )
        for token_id in ids_of(b"Hello", b"STOP", b" world")
    ]
    ids = ids_of(b"Hello", b"STOP", b" world")
    behaviour = play(
        EngineResponse(deltas=[delta(ids, logprobs=logprobs)]),
        EngineResponse(finishes=[finish()], summary=summary(2, 4)),
    )
    answer, _ = await run(behaviour, options("STOP"))
    entries = answer.choices[0].logprobs
    assert [entry.token for entry in entries] == [b"Hello", b"STOP"]
    assert entries[0].top[0].token == b"\xe6"
    assert list(answer.choices[0].token_ids) == []


async def test_prompt_logprobs_get_bytes_too() -> None:
    info = generation_pb2.PromptInfo(
        prompt_tokens=2, prompt_logprobs=[generation_pb2.TokenLogprob(token_id=ord("i"))]
    )
    behaviour = play(
        EngineResponse(prompt_info=info),
        EngineResponse(finishes=[finish()], summary=summary(2, 1)),
    )
    answer, _ = await run(behaviour)
    assert answer.prompt_info.prompt_logprobs[0].token == b"i"


@pytest.mark.parametrize(("skip", "text"), [(None, "ab"), (True, "ab"), (False, "a<|end|>b")])
async def test_special_tokens(skip: bool | None, text: str) -> None:
    asked = gateway_pb2.GenerationOptions()
    if skip is not None:
        asked.response.skip_special_tokens = skip
    answer, _ = await run(tell(ids_of(b"a", SPECIAL, NO_TOKEN, b"b", 10**6)), asked)
    assert answer.choices[0].text == text


async def test_a_character_cut_off_by_the_end_is_replaced_and_the_withheld_comes_out() -> None:
    ids = ids_of(b" STO", "日".encode()[:2])
    answer, _ = await run(tell(ids), options("STOP"))
    assert answer.choices[0].text == " STO\ufffd"


async def test_the_end_arrives_also_while_a_message_is_being_written() -> None:
    received: list[Update] = []
    await read(generation(Source(tell(ids_of(b"abc")))), received, pause=0.01)
    assert text_of(received) == "abc"
    assert received[-1].finishes == [finish()]
    assert received[-1].summary is not None


async def test_deltas_pile_up_while_no_slot_is_free() -> None:
    slots = WriteSlots(1)
    source = Source(tell(ids_of(b"a" * 50)))
    updates = generation(source).updates(slots.hold)
    received: list[Update] = []
    async with aclosing(updates):
        async with slots.hold():
            first = asyncio.create_task(anext(updates))
            await eventually(source.closed.is_set)
            assert not first.done()
        received.append(await first)
        received.extend([update async for update in updates])
    assert len(received) == 1
    assert received[0].deltas[0].text == "a" * 50
    assert received[0].prompt_info is not None
    assert received[0].summary is not None


async def test_a_reader_that_does_not_read_bounds_what_is_buffered() -> None:
    source = Source(tell([ord("a")] * (4 * MAX_PENDING_TOKENS), chunk=256))
    updates = generation(source).updates(nullcontext)
    async with aclosing(updates):
        text = "".join(delta.text for delta in (await anext(updates)).deltas)
        await asyncio.sleep(0.05)
        assert source.num_read <= 2 * (MAX_PENDING_TOKENS // 256 + 2)
        async for update in updates:
            text += "".join(delta.text for delta in update.deltas)
    assert text == "a" * (4 * MAX_PENDING_TOKENS)


async def test_closing_the_stream_closes_the_engines_stream_and_leaves_no_task() -> None:
    before = asyncio.all_tasks()
    source = Source(endless())
    updates = generation(source).updates(nullcontext)
    await anext(updates)
    await updates.aclose()
    assert source.closed.is_set()
    assert asyncio.all_tasks() == before


async def test_a_loss_mid_stream_delivers_what_came_and_counts_it() -> None:
    behaviour = play(
        EngineResponse(deltas=[delta(ids_of(b"Hello", b" world"))]),
        unavailable("ENGINE_LOST", "gone"),
    )
    received: list[Update] = []
    with pytest.raises(ServiceError) as raised:
        await read(generation(Source(behaviour)), received)
    assert text_of(received) == "Hello world"
    assert raised.value.reason == "ENGINE_LOST_MID_STREAM"
    assert raised.value.metadata == {"outputTokens": "2"}


@pytest.mark.parametrize("with_tokens", [False, True])
async def test_a_stream_that_just_ends_is_a_loss(with_tokens: bool) -> None:
    messages = [EngineResponse(prompt_info=generation_pb2.PromptInfo(prompt_tokens=2))]
    if with_tokens:
        messages.append(EngineResponse(deltas=[delta(ids_of(b"Hello"))]))
    with pytest.raises(ServiceError) as raised:
        await run(play(*messages))
    assert raised.value.code is grpc.StatusCode.UNAVAILABLE
    assert raised.value.reason == ("ENGINE_LOST_MID_STREAM" if with_tokens else "ENGINE_LOST")


async def test_a_refusal_of_the_engine_passes_through() -> None:
    refusal = ServiceError(grpc.StatusCode.INVALID_ARGUMENT, "PROMPT_TOO_LONG", "too long")
    with pytest.raises(ServiceError) as raised:
        await run(play(refusal))
    assert raised.value is refusal


async def test_n_defaults_to_what_the_model_publishes() -> None:
    behaviour = play(
        EngineResponse(deltas=[delta(ids_of(b"a"), 1)]),
        EngineResponse(finishes=[finish(0), finish(1)], summary=summary(2, 3)),
    )
    defaults = generation_pb2.SamplingParams(n=2)
    answer, _ = await run(behaviour, default_sampling=defaults)
    assert [choice.text for choice in answer.choices] == ["", "a"]


ECHOED: list[tuple[Any, int | None, bool | None, str, int]] = [
    ("hé", None, None, "hé", 3),
    ("hé", 3, None, "hé", 3),
    ("ahé", 2, None, "é", 2),
    ("ahé", 1, None, "\ufffd", 1),
    (ids_of(b"a", SPECIAL, b"Hello"), None, None, "aHello", 3),
    (ids_of(b"a", SPECIAL, b"Hello"), None, False, "a<|end|>Hello", 3),
    (ids_of(b"a", SPECIAL, b"Hello"), 2, False, "<|end|>Hello", 2),
    (ids_of(b"a", NO_TOKEN, 10**6), 3, None, "a", 3),
]


@pytest.mark.parametrize(("prompt", "last", "skip", "text", "num_tokens"), ECHOED)
async def test_echo_puts_the_prompt_that_the_model_sees_before_every_completion(
    prompt: Any, last: int | None, skip: bool | None, text: str, num_tokens: int
) -> None:
    asked = gateway_pb2.GenerationOptions(
        response=generation_pb2.ResponseOptions(
            echo=True, skip_special_tokens=skip, return_token_ids=True
        ),
        truncate_prompt_tokens=last,
    )
    asked.sampling.n = 2
    given = prompt if isinstance(prompt, str) else generation_pb2.TokenIds(ids=prompt)
    completion = ids_of(b" world")
    answer, source = await run(tell(completion), asked, prompt=given)
    assert [choice.text for choice in answer.choices] == [f"{text} world"] * 2
    assert [list(choice.token_ids) for choice in answer.choices] == [completion] * 2
    assert len(source.requests[0].prompt.ids) == num_tokens
    assert not source.requests[0].response.HasField("echo")
    asked.response.echo = False
    answer, _ = await run(tell(completion), asked, prompt=given)
    assert [choice.text for choice in answer.choices] == [" world"] * 2


async def test_echo_precedes_the_first_delta_of_a_stream_and_no_stop_string_counts_in_it() -> None:
    asked = options("Hello", "o w")
    asked.response.echo = True
    received: list[Update] = []
    source = Source(tell(ids_of(b"yo", b" world", b"Hello")))
    await read(generation(source, asked, prompt="Hello"), received)
    assert received[0].prompt_info is not None
    assert received[0].deltas[0].text.startswith("Hello")
    assert text_of(received) == "Helloy"


async def test_a_character_that_the_prompt_begins_is_whole_with_echo() -> None:
    begun, rest = "日".encode()[:1], "日".encode()[1:]
    asked = gateway_pb2.GenerationOptions(response=generation_pb2.ResponseOptions(echo=True))
    prompt = generation_pb2.TokenIds(ids=ids_of(b"a", begun))
    answer, _ = await run(tell(ids_of(rest)), asked, prompt=prompt)
    assert answer.choices[0].text == "a日"


async def test_the_prompts_log_probabilities_get_their_bytes() -> None:
    entry = generation_pb2.TokenLogprob(token_id=ids_of(b"Hello")[0], logprob=-1, rank=2)
    entry.top.add(token_id=ids_of(b" world")[0], logprob=-0.5, rank=1)
    info = generation_pb2.PromptInfo(prompt_tokens=2, prompt_logprobs=[entry])
    messages = (
        EngineResponse(prompt_info=info, deltas=[delta(ids_of(b"a"))]),
        EngineResponse(finishes=[finish()], summary=summary(2, 2)),
    )
    answer, _ = await run(play(*messages))
    (found,) = answer.prompt_info.prompt_logprobs
    assert (found.token, found.top[0].token, found.rank) == (b"Hello", b" world", 2)
