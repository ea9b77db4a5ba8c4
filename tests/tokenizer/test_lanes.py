"""Long texts hold nobody up: neither short texts, nor the event loop, nor those who gave up."""

import asyncio
import json
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nanoinfer.v1 import tokenizer_pb2 as pb
from nanoinfer_common import names
from nanoinfer_tokenizer import encodings
from nanoinfer_tokenizer.document import read_added_tokens
from nanoinfer_tokenizer.encodings import (
    AddedToken,
    AddedTokens,
    Encoding,
    longest_of,
    translated,
)
from nanoinfer_tokenizer.library import LibraryEncoding
from nanoinfer_tokenizer.loading import LoadedTokenizer

from tests.tokenizer.serving import Serve, Served, conversation, eventually, refused, serving

LONG = "a" * 20_000
# Long enough that a busy machine answers within it; only a call that never comes fails by it.
PATIENCE = 60.0

DirectoryOf = Callable[[str], Path]


class Gate:
    """Stands in for an encoder: what is long stays in its thread until the gate opens."""

    def __init__(self, encode: Callable[..., Any]) -> None:
        self._encode = encode
        self._opened = threading.Event()
        self.begun: list[str] = []

    def __call__(self, text: str, **options: bool) -> Any:
        self.begun.append(text)
        if len(text) >= len(LONG):
            assert self._opened.wait(PATIENCE)
        return self._encode(text, **options)

    def open(self) -> None:
        self._opened.set()


@pytest.fixture
async def serve(directory_of: DirectoryOf) -> AsyncIterator[Serve]:
    """Starts services: `await serve("qwen2", max_characters=100)`."""
    async with AsyncExitStack() as stack:

        async def start(model: str | Path, **options: Any) -> Served:
            path = directory_of(model) if isinstance(model, str) else model
            return await stack.enter_async_context(serving(path, **options))

        yield start


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Served], Gate]]:
    """Puts a gate into a service's encoder; it opens at the end of the test at the latest."""
    gates: list[Gate] = []

    def put(served: Served) -> Gate:
        encoding = served.service._served.encoding
        gates.append(Gate(encoding.encode))
        monkeypatch.setattr(encoding, "encode", gates[-1])
        return gates[-1]

    yield put
    for each in gates:
        each.open()


def encode(served: Served, text: str, **options: Any) -> "asyncio.Future[Any]":
    request = pb.TokenizerServiceEncodeRequest(text=text)
    return asyncio.ensure_future(served.stub.Encode(request, **{"timeout": PATIENCE, **options}))


# --- short texts pass long ones ---


@pytest.mark.matrix("R13")
async def test_a_short_text_never_waits_for_long_ones(
    serve: Serve, gate: Callable[[Served], Gate]
) -> None:
    served = await serve("qwen2", num_threads=2)
    closed = gate(served)
    long = [encode(served, LONG + "b" * i) for i in range(4)]  # more than there are threads
    await eventually(lambda: len(closed.begun) == 2)
    assert (await encode(served, "x")).tokens.ids
    batch = pb.TokenizerServiceEncodeBatchRequest(texts=["x", "y"])
    assert len((await served.stub.EncodeBatch(batch, timeout=PATIENCE)).tokens) == 2
    chat = served.stub.RenderChat(conversation(("user", "Hi")), timeout=PATIENCE)
    assert (await chat).tokens.ids
    assert not any(call.done() for call in long)
    closed.open()
    assert all(answer.tokens.ids for answer in await asyncio.gather(*long))


async def test_a_batch_is_as_long_as_all_its_texts(
    serve: Serve, gate: Callable[[Served], Gate]
) -> None:
    served = await serve("qwen2", num_threads=1)
    closed = gate(served)
    long = encode(served, LONG)
    await eventually(lambda: closed.begun == [LONG])
    request = pb.TokenizerServiceEncodeBatchRequest(texts=["y" * 100] * 200)
    batch = asyncio.ensure_future(served.stub.EncodeBatch(request, timeout=PATIENCE))
    assert (await encode(served, "x")).tokens.ids
    assert closed.begun == [LONG, "x"]
    closed.open()
    assert len((await batch).tokens) == 200
    await long


async def test_a_short_conversation_never_waits_for_long_ones(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = await serve("qwen2")
    chat = served.service._served.chat
    assert chat is not None
    closed = Gate(lambda text, messages, **options: render(messages, **options))
    render = chat.render
    monkeypatch.setattr(
        chat,
        "render",
        lambda messages, **options: closed(messages[0].content, messages=messages, **options),
    )
    long = [
        asyncio.ensure_future(served.stub.RenderChat(conversation(("user", LONG))))
        for _ in range(3)
    ]
    await eventually(lambda: closed.begun == [LONG])
    try:
        short = served.stub.RenderChat(conversation(("user", "Hi")), timeout=PATIENCE)
        assert (await short).tokens.ids
        assert not any(call.done() for call in long)
    finally:
        closed.open()
    assert all(answer.tokens.ids for answer in await asyncio.gather(*long))


async def test_many_long_texts_do_not_refuse_short_ones(
    serve: Serve, gate: Callable[[Served], Gate]
) -> None:
    served = await serve("qwen2", num_threads=1, max_pending=2)
    closed = gate(served)
    long = [encode(served, LONG) for _ in range(2)]
    await eventually(lambda: served.registry.get_sample_value("nanoinfer_tokenizer_inflight") == 2)
    error = await refused(encode(served, LONG))
    assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, names.QUEUE_FULL)
    assert (await encode(served, "x")).tokens.ids
    closed.open()
    await asyncio.gather(*long)


# --- deadlines ---


async def test_a_deadline_holds_while_a_text_is_encoded_and_drops_what_waits(
    serve: Serve, gate: Callable[[Served], Gate]
) -> None:
    served = await serve("qwen2", num_threads=1)
    closed = gate(served)
    long = encode(served, LONG)
    await eventually(lambda: closed.begun == [LONG])
    waiting = [encode(served, LONG + "b", timeout=0.3) for _ in range(3)]
    for call in waiting:
        assert (await refused(call)).code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert not long.done()
    await eventually(lambda: served.registry.get_sample_value("nanoinfer_tokenizer_inflight") == 1)
    closed.open()
    await long
    assert (await encode(served, LONG + "c")).tokens.ids
    assert closed.begun == [LONG, LONG + "c"]


async def test_a_batch_whose_call_has_ended_stops_at_its_next_text(
    serve: Serve, gate: Callable[[Served], Gate]
) -> None:
    served = await serve("qwen2", num_threads=1)
    closed = gate(served)
    request = pb.TokenizerServiceEncodeBatchRequest(texts=[LONG, "x", "y"])
    error = await refused(served.stub.EncodeBatch(request, timeout=0.3))
    assert error.code is grpc.StatusCode.DEADLINE_EXCEEDED
    await eventually(lambda: served.registry.get_sample_value("nanoinfer_tokenizer_inflight") == 0)
    assert closed.begun == [LONG]
    closed.open()
    assert (await encode(served, LONG + "c")).tokens.ids  # the one thread is free again
    assert closed.begun == [LONG, LONG + "c"]


# --- the interpreter's lock ---


def library_encoding(directory: Path) -> LibraryEncoding:
    """The family's tokenizer on the `tokenizers` library, which must not need tiktoken to do it."""
    document = json.loads((directory / "tokenizer.json").read_text())
    return LibraryEncoding(document, read_added_tokens(document), "test")


async def gets_a_turn_during(work: Callable[[], object]) -> bool:
    """Says whether the event loop gets a turn in the middle of what a thread works on."""
    turns: list[float] = []

    def timed() -> tuple[float, float]:
        start = time.monotonic()
        work()
        return start, time.monotonic()

    working = asyncio.ensure_future(asyncio.to_thread(timed))
    while not working.done():
        turns.append(time.monotonic())
        await asyncio.sleep(0.0005)
    start, end = await working
    quarter = (end - start) / 4
    return any(start + quarter < turn < end - quarter for turn in turns)


@pytest.mark.matrix("R13")
@pytest.mark.parametrize("unit", [" ", "a", "^", "\u0301", "😀", "\n"])
@pytest.mark.parametrize("backend", ["tiktoken", "tokenizers"])
async def test_the_event_loop_goes_on_while_a_hostile_text_is_encoded(
    backend: str, unit: str, loaded: Callable[[str], LoadedTokenizer], directory_of: DirectoryOf
) -> None:
    encoding: Encoding = loaded("llama3").encoding
    if backend == "tokenizers":
        encoding = library_encoding(directory_of("llama3"))
    assert encoding.info.backend == backend
    text = unit * 500_000
    # Some take a few milliseconds, in which a busy machine may not run the loop by chance.
    tries = 1
    while not await gets_a_turn_during(lambda: encoding.encode(text)):
        assert (tries := tries + 1) < 5


@pytest.mark.matrix("R13")
async def test_a_short_encode_passes_hostile_ones(
    serve: Serve, directory_of: DirectoryOf, tmp_path: Path
) -> None:
    document = json.loads((directory_of("llama3") / "tokenizer.json").read_text())
    document["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = True  # not for tiktoken
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    served = await serve(tmp_path, num_threads=1)
    hostile = [encode(served, " " * 500_000) for _ in range(8)]

    def num_done() -> int:
        return sum(call.done() for call in hostile)

    inflight = partial(served.registry.get_sample_value, "nanoinfer_tokenizer_inflight")
    passed = []
    for _ in range(2):
        await eventually(lambda: (inflight() or 0) >= 2)
        before = num_done()
        assert (await encode(served, "short")).tokens.ids
        passed.append(num_done() - before)
    # In one queue the two in flight would have to be done before; one may happen to be.
    assert min(passed) <= 1
    assert all(answer.tokens.ids for answer in await asyncio.gather(*hostile))


# --- added tokens are found in linear time, in runs ---

alphabet = st.text("ab<|>", max_size=6)


@settings(max_examples=300, deadline=None)
@given(texts=st.lists(alphabet, max_size=12), searched=st.text("ab<|>", max_size=60))
def test_a_pattern_finds_the_leftmost_and_longest(texts: list[str], searched: str) -> None:
    words = {text for text in texts if text}
    flat = "|".join(map(re.escape, sorted(words, key=len, reverse=True))) or "(?!)"
    ours = [match.span() for match in re.finditer(longest_of(words), searched)]
    assert ours == [match.span() for match in re.finditer(flat, searched)]


def test_a_pattern_of_texts_nested_deeply_compiles() -> None:
    pattern = re.compile(longest_of({" " * length for length in range(1, 400)}))
    for length in (1, 31, 32, 33, 34, 200, 399):
        found = pattern.match(" " * length)
        assert found is not None
        assert found.end() == length
    assert re.search(longest_of(set()), "anything") is None


@settings(max_examples=300, deadline=None)
@given(
    contents=st.lists(alphabet.filter(bool), max_size=6, unique=True),
    text=st.text("ab<|> ", max_size=60),
    run=st.integers(1, 9),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_runs_change_no_split(
    contents: list[str], text: str, run: int, flags: tuple[bool, bool, bool]
) -> None:
    lstrip, rstrip, single_word = flags
    tokens = [
        AddedToken(index, content, lstrip=lstrip, rstrip=rstrip, single_word=single_word)
        for index, content in enumerate(contents)
    ]
    added = AddedTokens(tokens[1:], hidden=tokens[:1])
    whole = list(added.split(text))
    table = {ord("a"): ord("b"), ord("<"): ord("😀")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encodings, "_RUN", run)
        assert list(added.split(text)) == whole
        assert translated(text, table) == text.translate(table)


def test_the_number_of_special_tokens_costs_nothing() -> None:
    text = "<|" * 100_000
    one = AddedTokens([AddedToken(0, "<|end|>")])
    many = AddedTokens([AddedToken(i, f"<|reserved_special_token_{i}|>") for i in range(800)])

    def cpu_seconds(added: AddedTokens) -> float:
        start = time.thread_time()
        for _ in range(3):
            assert list(added.split(text)) == [text]
        return time.thread_time() - start

    cpu_seconds(one)
    assert cpu_seconds(many) < 20 * cpu_seconds(one)  # the plain alternation: more than 100 times
