"""The vocabulary cache: once per fingerprint, one fetch for all who wait."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import grpc
import pytest
from nanoinfer_common.detokenize import Spelling
from nanoinfer_common.errors import ServiceError
from nanoinfer_gateway.core.vocabulary import MAX_FETCHES, MAX_KEPT, Vocabularies, Vocabulary


def vocabulary(number: int = 0) -> Vocabulary:
    return Vocabulary(bytes([number]) * 32, Spelling((b"a", b"<s>", b"c")), frozenset({1}))


class Source:
    """Hands out the vocabularies in turn, the last one for ever; `gate` holds fetches up."""

    def __init__(self, *vocabularies: Vocabulary) -> None:
        self.left = list(vocabularies)
        self.num_fetches = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self) -> Vocabulary:
        self.num_fetches += 1
        await self.gate.wait()
        return self.left.pop(0) if len(self.left) > 1 else self.left[0]


def test_the_table_without_specials_keeps_every_place() -> None:
    assert vocabulary().without_specials.tokens == (b"a", b"", b"c")
    assert vocabulary().token(1) == b"<s>"
    assert vocabulary().token(99) == b""


async def test_many_waiters_share_one_fetch_and_later_ones_the_result() -> None:
    source = Source(vocabulary())
    source.gate.clear()
    kept = Vocabularies(source)
    waiters = [asyncio.create_task(kept.get(bytes(32))) for _ in range(20)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    waiters[0].cancel()
    source.gate.set()
    results = await asyncio.gather(*waiters, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert results[1:] == [vocabulary()] * 19
    assert await kept.get() == vocabulary()
    assert source.num_fetches == 1


async def test_an_unknown_fingerprint_is_fetched_and_the_old_one_kept() -> None:
    source = Source(vocabulary(0), vocabulary(1))
    kept = Vocabularies(source)
    assert (await kept.get()).fingerprint == bytes(32)
    assert (await kept.get(b"\x01" * 32)).fingerprint == b"\x01" * 32
    assert (await kept.get(bytes(32))).fingerprint == bytes(32)
    assert source.num_fetches == 2
    assert (await kept.get()).fingerprint == b"\x01" * 32


async def test_fetches_go_on_while_two_tokenizers_answer_in_turn() -> None:
    kept = Vocabularies(Source(vocabulary(0), vocabulary(0), vocabulary(1)))
    assert (await kept.get(b"\x01" * 32)).fingerprint == b"\x01" * 32


@pytest.mark.matrix("R63")
async def test_a_fingerprint_that_nobody_has_is_a_mismatch() -> None:
    source = Source(vocabulary(0))
    with pytest.raises(ServiceError) as raised:
        await Vocabularies(source).get(b"\x09" * 32)
    assert raised.value.code is grpc.StatusCode.FAILED_PRECONDITION
    assert raised.value.reason == "TOKENIZER_MISMATCH"
    assert raised.value.metadata == {"expected": "09" * 32, "actual": "00" * 32}
    assert source.num_fetches == MAX_FETCHES


@pytest.mark.matrix("R63")
async def test_a_tokenizer_with_another_eos_is_a_mismatch_until_it_has_the_engines() -> None:
    old, new = replace(vocabulary(), eos_token_ids=frozenset({1})), frozenset({1, 2})
    source = Source(old, old, replace(old, eos_token_ids=new))
    kept = Vocabularies(source)
    assert await kept.get(bytes(32), frozenset({1})) == old
    with pytest.raises(ServiceError) as raised:
        await kept.get(bytes(32), new)
    assert raised.value.code is grpc.StatusCode.FAILED_PRECONDITION
    assert raised.value.reason == "TOKENIZER_MISMATCH"
    assert raised.value.metadata == {"tokenizerEos": "1", "engineEos": "1, 2"}
    # the tokenizer has started again with other files beside the same tokenizer.json
    assert (await kept.get(bytes(32), new)).eos_token_ids == new
    assert source.num_fetches == 3


async def test_a_tokenizer_that_tells_no_eos_and_an_engine_without_a_tokenizer_are_let_be() -> None:
    silent = Vocabularies(Source(vocabulary()))
    assert await silent.get(bytes(32), frozenset({5})) == vocabulary()
    told = replace(vocabulary(), eos_token_ids=frozenset({1}))
    assert await Vocabularies(Source(told)).get(bytes(32), None) == told


async def test_only_the_last_few_are_kept() -> None:
    source = Source(*[vocabulary(number) for number in range(MAX_KEPT + 1)], vocabulary(0))
    kept = Vocabularies(source)
    for number in range(MAX_KEPT + 1):
        await kept.get(bytes([number]) * 32)
    await kept.get(bytes([1]) * 32)
    assert source.num_fetches == MAX_KEPT + 1
    await kept.get(bytes(32))
    assert source.num_fetches == MAX_KEPT + 2


async def test_a_failed_fetch_fails_its_waiters_and_the_next_one_tries_again() -> None:
    results: list[Exception | Vocabulary] = [OSError("gone"), vocabulary()]

    async def fetch() -> Vocabulary:
        result = results.pop(0)
        if isinstance(result, Exception):
            raise result
        return result

    kept = Vocabularies(fetch)
    with pytest.raises(OSError, match="gone"):
        await kept.get()
    assert await kept.get() == vocabulary()


async def test_close_ends_a_fetch() -> None:
    source = Source(vocabulary())
    source.gate.clear()
    kept = Vocabularies(source)
    waiter = asyncio.create_task(kept.get())
    await asyncio.sleep(0.01)
    await kept.close()
    with pytest.raises(asyncio.CancelledError):
        await waiter
