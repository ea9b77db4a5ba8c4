"""The gateway under attacks on its memory, as a process with the memory limit of its pod."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from nanoinfer.v1 import gateway_pb2 as pb
from nanoinfer.v1 import gateway_pb2_grpc, generation_pb2, tokenizer_pb2

from tests.gateway.fakes import (
    Behaviour,
    EngineResponse,
    FakeEngine,
    FakeTokenizer,
    delta,
    eventually,
    finish,
    model_info,
    serving,
    summary,
)

DEPLOYMENT = Path(__file__).parents[2] / "deploy/k8s/base/gateway.yaml"
GROUPS = (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup"))
LIMIT_FILES = ("memory.limit_in_bytes", "memory.max")
LONG = 120.0  # ends a test that hangs; nothing is measured by it
MIB = 1024**2
ALTERNATIVES, LISTED = 20, 128
CODES = grpc.StatusCode


def pod_limit() -> int:
    """Bytes of memory that the gateway's container has in Kubernetes."""
    for document in yaml.safe_load_all(DEPLOYMENT.read_text(encoding="utf-8")):
        if document["kind"] == "Deployment":
            (container,) = document["spec"]["template"]["spec"]["containers"]
            return int(container["resources"]["limits"]["memory"].removesuffix("Mi")) * MIB
    raise AssertionError("no deployment")


@contextmanager
def limited(process: int, num_bytes: int) -> Iterator[None]:
    """Put the process into a control group with this limit, where one can be made."""
    made = None
    for root, limit_file in zip(GROUPS, LIMIT_FILES, strict=True):
        group = root / f"nanoinfer-test-{uuid.uuid4().hex}"
        with contextlib.suppress(OSError):
            group.mkdir()
            made = group
            (group / limit_file).write_text(str(num_bytes))
            (group / "cgroup.procs").write_text(str(process))
            break
    try:
        yield
    finally:
        if made is not None:
            with contextlib.suppress(OSError):  # the process may take a moment to leave
                made.rmdir()


@dataclass
class Process:
    """A gateway of its own process."""

    process: asyncio.subprocess.Process
    address: str

    @property
    def peak_bytes(self) -> int:
        """Most memory that it ever had."""
        assert self.process.returncode is None, "the gateway is dead"
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024


@asynccontextmanager
async def gateway_process(engine: FakeEngine, folder: Path) -> AsyncIterator[Process]:
    port_file = folder / "port"
    async with serving(FakeTokenizer()) as one, serving(engine) as two:
        arguments = ["--port", "0", "--metrics-port", "none", "--port-file", str(port_file)]
        arguments += ["--tokenizer", one.address, "--engine", two.address]
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "nanoinfer_gateway", *arguments),
            stdout=asyncio.subprocess.DEVNULL,
            env={**os.environ, "NANOINFER_LOG_LEVEL": "error"},
        )
        with limited(process.pid, pod_limit()):
            try:
                await eventually(port_file.exists, LONG)
                address = port_file.read_text(encoding="ascii").split()[-1]
                await eventually(lambda: engine.num_reports > 0, LONG)
                yield Process(process, address)
            finally:
                if process.returncode is None:
                    process.kill()
                await process.wait()


@asynccontextmanager
async def stub_of(process: Process) -> AsyncIterator[Any]:
    options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    options.append(("grpc.use_local_subchannel_pool", 1))
    async with grpc.aio.insecure_channel(process.address, options=options) as channel:
        stub = gateway_pb2_grpc.GatewayServiceStub(channel)
        await stub.GetServerInfo(pb.GatewayServiceGetServerInfoRequest(), wait_for_ready=True)
        yield stub


async def outcome(call: Any) -> grpc.StatusCode:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return CODES.OK


def wordy(length: int | None) -> Behaviour:
    """Bring all the log-probabilities there can be, `length` times or for ever."""
    entry = generation_pb2.TokenLogprob(token_id=97, logprob=-1.5, rank=3)
    for token_id in range(ALTERNATIVES + LISTED):
        entry.top.add(token_id=token_id, logprob=-2.5, rank=token_id + 1)

    async def behave(request: Any) -> AsyncIterator[EngineResponse]:
        n = request.sampling.n or 1
        step = EngineResponse(deltas=[delta([97], index, [entry]) for index in range(n)])
        yield EngineResponse(prompt_info=generation_pb2.PromptInfo(prompt_tokens=2))
        number = 0
        while length is None or number < length:
            number += 1
            yield step
            await asyncio.sleep(0)
        finishes = [finish(index, eos=False) for index in range(n)]
        yield EngineResponse(finishes=finishes, summary=summary(2, n * number))

    return behave


def wordy_options(max_tokens: int | None) -> pb.GenerationOptions:
    return pb.GenerationOptions(
        sampling=generation_pb2.SamplingParams(n=16),
        stopping=generation_pb2.StoppingParams(max_tokens=max_tokens),
        response=generation_pb2.ResponseOptions(
            logprobs=ALTERNATIVES, logprob_token_ids=range(LISTED)
        ),
    )


def wordy_engine(length: int | None) -> FakeEngine:
    features = [generation_pb2.FEATURE_LOGPROBS, generation_pb2.FEATURE_MULTIPLE_CHOICES]
    features.append(generation_pb2.FEATURE_LOGPROB_TOKEN_IDS)
    return FakeEngine(wordy(length), model_info(features=features, max_model_len=4096))


pytestmark = pytest.mark.slow


@pytest.mark.matrix("R6")
@pytest.mark.parametrize("size", [8_300_000, 2_000_000, MIB], ids=["8.3 MB", "2 MB", "1 MiB"])
async def test_a_hundred_large_requests_at_once_do_not_kill_the_gateway(
    size: int, tmp_path: Path
) -> None:
    async with gateway_process(FakeEngine(), tmp_path) as running:
        request = pb.GatewayServiceCountTokensRequest(text="x" * size)
        async with contextlib.AsyncExitStack() as stack:
            stubs = [await stack.enter_async_context(stub_of(running)) for _ in range(10)]
            calls = [outcome(stub.CountTokens(request)) for stub in stubs for _ in range(10)]
            codes = Counter(await asyncio.gather(*calls))
            small = pb.GatewayServiceCountTokensRequest(text="abc")
            assert (await stubs[0].CountTokens(small)).num_tokens == 3
        assert codes[CODES.UNAVAILABLE] == 0
        assert running.peak_bytes < pod_limit()


@pytest.mark.parametrize("text", [None, "x"], ids=["of no kind", "short"])
async def test_a_million_parts_that_parsed_are_far_more_do_not_kill_the_gateway(
    text: str | None, tmp_path: Path
) -> None:
    part = tokenizer_pb2.ContentPart(text=text)
    num_parts = 2_000_000 // (part.ByteSize() + 2)
    message = tokenizer_pb2.ChatMessage(role="user", content=[part] * num_parts)
    request = pb.GatewayServiceChatRequest(messages=[message])
    async with gateway_process(FakeEngine(), tmp_path) as running, stub_of(running) as stub:
        codes = Counter(await asyncio.gather(*[outcome(stub.Chat(request)) for _ in range(20)]))
        assert codes.keys() <= {CODES.INVALID_ARGUMENT, CODES.RESOURCE_EXHAUSTED}
        assert running.peak_bytes < pod_limit()


async def test_a_whole_answer_that_no_message_takes_is_refused_at_once(tmp_path: Path) -> None:
    engine = wordy_engine(1600)
    async with gateway_process(engine, tmp_path) as running, stub_of(running) as stub:
        request = pb.GatewayServiceGenerateRequest(text="hi", options=wordy_options(1600))
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.Generate(request)
        assert raised.value.code() is CODES.INVALID_ARGUMENT
        assert not engine.requests
        request.options.stopping.ClearField("max_tokens")  # its length is known only at its end
        calls = [outcome(stub.Generate(request)) for _ in range(8)]
        codes = Counter(await asyncio.gather(*calls))
        assert codes.keys() <= {CODES.INVALID_ARGUMENT, CODES.RESOURCE_EXHAUSTED}
        assert codes[CODES.INVALID_ARGUMENT] > 0
        assert running.peak_bytes < pod_limit()


async def test_unread_streams_hold_bytes_not_tokens(tmp_path: Path) -> None:
    engine = wordy_engine(None)
    async with gateway_process(engine, tmp_path) as running, stub_of(running) as stub:
        request = pb.GatewayServiceGenerateStreamRequest(text="hi", options=wordy_options(1600))
        calls = [stub.GenerateStream(request) for _ in range(48)]
        await asyncio.gather(*[call.read() for call in calls])
        # Until nothing moves: what the gateway does not read, the engine cannot write.
        async with asyncio.timeout(LONG):
            before, now = -1, running.peak_bytes
            while before != now:
                await asyncio.sleep(2)
                before, now = now, running.peak_bytes
        assert running.peak_bytes < pod_limit()
        for call in calls:
            call.cancel()
        await eventually(lambda: engine.num_running == 0, LONG)
