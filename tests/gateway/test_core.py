"""The whole core with fakes in place of the upstreams: no server, no channel, no context."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import pytest
from nanoinfer.v1 import gateway_pb2, generation_pb2, tokenizer_pb2
from nanoinfer_common import names
from nanoinfer_common.errors import ServiceError
from nanoinfer_gateway.core import requests
from nanoinfer_gateway.core.admission import Bounds
from nanoinfer_gateway.core.caller import Caller
from nanoinfer_gateway.core.gateway import Gateway, Sizes
from nanoinfer_gateway.core.generation import Upstreams
from nanoinfer_gateway.core.metrics import GatewayMetrics

from tests.gateway.fakes import Behaviour, endless, ids_of, model_info, tell
from tests.gateway.test_generation import VOCABULARY, Encoder, Source

OPTIONS = gateway_pb2.GenerationOptions()
CHAT = [
    tokenizer_pb2.ChatMessage(role="user", content=[tokenizer_pb2.ContentPart(text="hi")]),
    tokenizer_pb2.ChatMessage(role="assistant", content=[tokenizer_pb2.ContentPart(text="yes")]),
]


class Served:
    """One model; counts how often it is asked for."""

    def __init__(self) -> None:
        self.num_asked = 0

    def models(self) -> list[generation_pb2.ModelInfo]:
        return [model_info()]

    def model(self, name: str | None) -> generation_pb2.ModelInfo:
        self.num_asked += 1
        return model_info()


class Listening(Encoder):
    """Remembers the callers."""

    def __init__(self) -> None:
        self.callers: list[Caller] = []

    async def encode(self, text: str, caller: Caller, **options: bool) -> Any:
        self.callers.append(caller)
        return await super().encode(text, caller, **options)


class Built:
    """A gateway and its fakes."""

    def __init__(self, behaviour: Behaviour, tenants: int | None = None) -> None:
        self.encoder, self.source, self.served = Listening(), Source(behaviour), Served()

        async def vocabulary(*_: object) -> Any:
            return VOCABULARY

        self.gateway = Gateway(
            Upstreams(self.encoder, self.source, vocabulary),
            self.served,
            Bounds(8, 1000, 1000, tenants),
            Sizes(500, 2**20, 2**20),
            GatewayMetrics(),
        )


async def test_a_whole_answer_is_the_stream_collected_whoever_carries_it() -> None:
    built = Built(tell(ids_of(b"Hello", b" world")))
    caller = Caller("r-7", 5, "blue")
    whole = await built.gateway.answer("hi", OPTIONS, caller)
    updates = [update async for update in built.gateway.generate("hi", OPTIONS, caller)]
    text = "".join(delta.text for update in updates for delta in update.deltas)
    assert whole.choices[0].text == text == "Hello world"
    assert whole.summary is not None
    assert whole.summary.request_id == "r-7"
    assert whole.summary.usage == updates[-1].summary.usage  # type: ignore[union-attr]
    assert built.encoder.callers == [caller, caller]


async def test_a_chat_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: Counter[str] = Counter()

    def counting(name: str) -> Callable[..., Any]:
        real = getattr(requests, name)

        def count(*given: Any) -> Any:
            seen[name] += 1
            return real(*given)

        return count

    steps = ("validate_request", "validate_messages", "_conversation_bytes")
    for name in steps:
        monkeypatch.setattr(requests, name, counting(name))
    built = Built(tell(ids_of(b"Hello")))
    answer = await built.gateway.answer(CHAT, OPTIONS, Caller())
    assert answer.choices[0].text == "Hello"
    assert seen == dict.fromkeys(steps, 1)
    assert built.served.num_asked == 1


async def test_a_tenants_bound_counts_callers_of_any_face_and_ends_with_the_stream() -> None:
    built = Built(endless(), tenants=1)
    gateway = built.gateway
    async with aclosing(gateway.generate("hi", OPTIONS, Caller(tenant="blue"))) as held:
        await anext(held)
        assert gateway.admission.num_requests == 1
        with pytest.raises(ServiceError) as raised:
            await gateway.answer("hi", OPTIONS, Caller(tenant="blue"))
        assert raised.value.reason == names.QUOTA_EXCEEDED
        assert await gateway.count_tokens(CHAT, Caller(tenant="red")) == len("userassistant")
    assert built.source.closed.is_set()
    assert (gateway.admission.num_requests, gateway.admission.num_prompt_bytes) == (0, 0)


@pytest.mark.parametrize("prompt", [CHAT, generation_pb2.TokenIds(ids=[1])])
async def test_an_option_for_text_is_refused_for_everything_else(prompt: Any) -> None:
    gateway = Built(tell(ids_of(b"Hello"))).gateway
    with pytest.raises(ServiceError) as raised:
        await gateway.answer(prompt, OPTIONS, Caller(), parse_special_tokens=True)
    assert raised.value.violations[0].field == "parse_special_tokens"
    with pytest.raises(ServiceError) as raised:
        gateway.generate("x" * 501, OPTIONS, Caller())
    assert raised.value.reason == names.INPUT_TOO_LARGE
    assert gateway.admission.num_requests == 0
