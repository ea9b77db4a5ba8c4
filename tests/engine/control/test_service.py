"""The service over a real aio server: streams, refusals, cancels, load and description."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from nanoinfer.v1 import engine_pb2
from nanoinfer.v1 import generation_pb2 as pb
from nanoinfer_common.server import StartError, running
from nanoinfer_engine.core.request import prompt_key
from nanoinfer_engine.server.service import EngineService
from nanoinfer_engine.server.settings import EngineSettings

from tests.engine.control.conftest import Engine, Message, StartFake
from tests.engine.fakes import EOS, FakeRunner, expected_tokens

TEN = pb.StoppingParams(max_tokens=10)
SEED = pb.SamplingParams(seed=0)


async def test_a_stream_brings_deltas_then_finish_and_summary(fake: Engine) -> None:
    began = time.monotonic_ns()
    answer = await fake.generate(sampling=SEED, stopping=TEN, request_id="r-1")
    spent = time.monotonic_ns() - began
    assert answer.tokens() == expected_tokens([11, 12, 13], 10)
    assert answer.messages[0].prompt_info.prompt_tokens == 3
    assert not any(m.HasField("prompt_info") for m in answer.messages[1:])
    assert [m.HasField("summary") for m in answer.messages[:-1]] == [False] * (
        len(answer.messages) - 1
    )
    finish = answer.finishes[0]
    assert (finish.reason, finish.seed) == (pb.FINISH_REASON_LENGTH, 0)
    summary = answer.summary
    assert (summary.usage.prompt_tokens, summary.usage.completion_tokens) == (3, 10)
    assert (summary.model, summary.request_id) == ("fake", "r-1")
    timings = summary.timings
    phases = timings.queue_ns + timings.prefill_ns + timings.decode_ns
    assert 0 < timings.time_to_first_token_ns <= phases <= timings.total_ns < spent
    await fake.idle()


async def test_several_completions_use_consecutive_seeds_in_one_stream(fake: Engine) -> None:
    answer = await fake.generate(sampling=pb.SamplingParams(seed=2**64 - 2, n=4), stopping=TEN)
    for index, seed in enumerate([2**64 - 2, 2**64 - 1, 0, 1]):
        assert answer.finishes[index].seed == seed
        assert answer.tokens(index) == expected_tokens([11, 12, 13], 10, seed)
    assert answer.summary.usage.prompt_tokens == 3
    assert answer.summary.usage.completion_tokens == 40


async def test_all_completions_of_a_prompt_draw_by_its_key(fake: Engine) -> None:
    async def keys(prompt: list[int], **fields: object) -> set[int]:
        fake.runner.batches.clear()
        await fake.generate(prompt, sampling=pb.SamplingParams(seed=5, n=3), stopping=TEN, **fields)
        return {row.prompt_key for batch in fake.runner.batches for row in batch.rows}

    assert await keys([11, 12, 13]) == {prompt_key((11, 12, 13))}
    assert await keys([11, 12, 14]) == {prompt_key((11, 12, 14))}
    assert await keys([10, 11, 12, 13], truncate_prompt_tokens=3) == {prompt_key((11, 12, 13))}


async def test_a_message_has_one_delta_for_an_index(start_fake: StartFake) -> None:
    async with start_fake(FakeRunner(step_seconds=0.001)) as engine:
        streams = [engine.generate(sampling=SEED, stopping=TEN) for _ in range(8)]
        for answer in await asyncio.gather(*streams):
            assert answer.tokens() == expected_tokens([11, 12, 13], 10)
            for message in answer.messages:
                indexes = [delta.index for delta in message.deltas]
                assert len(indexes) == len(set(indexes))


async def test_the_seed_is_drawn_and_told_when_unset(fake: Engine) -> None:
    seeds = {(await fake.generate(stopping=TEN)).finishes[0].seed for _ in range(3)}
    assert len(seeds) == 3
    again = seeds.pop()
    answer = await fake.generate(sampling=pb.SamplingParams(seed=again), stopping=TEN)
    assert answer.tokens() == expected_tokens([11, 12, 13], 10, again)


async def test_eos_and_stop_ids_are_told_apart(fake: Engine) -> None:
    fake.runner.forced[6] = EOS
    by_eos = await fake.generate(stopping=TEN)
    assert by_eos.finishes[0].reason == pb.FINISH_REASON_STOP
    assert by_eos.finishes[0].stop_match.eos
    assert len(by_eos.tokens()) == 3
    assert by_eos.summary.usage.completion_tokens == 4
    by_id = await fake.generate(stopping=pb.StoppingParams(max_tokens=10, stop_token_ids=[EOS]))
    assert by_id.finishes[0].stop_match.token_id == EOS


async def test_a_client_that_cancels_frees_its_blocks_within_a_step(start_fake: StartFake) -> None:
    async with start_fake(FakeRunner(step_seconds=0.01)) as engine:
        call = engine.call()
        await call.read()
        assert (await engine.load()).kv_cache_usage > 0
        before = len(engine.runner.batches)
        call.cancel()
        await engine.idle()
        assert len(engine.runner.batches) <= before + 4


@pytest.mark.matrix("R40")
async def test_a_cancelled_queued_request_never_runs(start_fake: StartFake) -> None:
    async with start_fake(FakeRunner(step_seconds=0.03), max_batch_requests=1) as engine:
        first = engine.call(stopping=pb.StoppingParams(max_tokens=30))
        await engine.until(lambda load: load.running_requests == 1)
        second = engine.call([9], stopping=TEN)
        await engine.until(lambda load: load.waiting_requests == 1)
        second.cancel()
        load = await engine.until(lambda load: load.waiting_requests == 0)
        assert load.running_requests == 1  # the slot is free long before the first one ends
        assert await _rest(first)
        await engine.idle()
        rows = [row for batch in engine.runner.batches for row in batch.rows]
        assert all(row.token_ids[0] != 9 for row in rows)


@pytest.mark.matrix("R46")
async def test_a_deadline_ends_the_call_and_frees(start_fake: StartFake) -> None:
    async with start_fake(FakeRunner(step_seconds=0.01)) as engine:
        request = engine_pb2.EngineServiceGenerateRequest(prompt=pb.TokenIds(ids=[11]))
        refused = await engine.refused(_rest(engine.stub.Generate(request, timeout=0.15)))
        assert refused.code is grpc.StatusCode.DEADLINE_EXCEEDED
        await engine.idle()


@pytest.mark.matrix("R47")
async def test_the_default_deadline_applies(start_fake: StartFake) -> None:
    async with start_fake(FakeRunner(step_seconds=0.01), default_deadline_seconds=0.15) as engine:
        request = engine_pb2.EngineServiceGenerateRequest(prompt=pb.TokenIds(ids=[11]))
        refused = await engine.refused(_rest(engine.stub.Generate(request)))
        assert refused.code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert refused.info.reason == "DEADLINE_EXCEEDED"
        await engine.idle()


async def test_a_full_queue_is_an_immediate_answer(start_fake: StartFake) -> None:
    async with start_fake(max_batch_requests=1, max_waiting_requests=2) as engine:
        engine.runner.gate.clear()
        calls = [engine.call(stopping=TEN)]
        await engine.until(lambda load: load.running_requests == 1)
        calls += [engine.call(stopping=TEN) for _ in range(2)]
        load = await engine.until(lambda load: load.waiting_requests == 2)
        assert load.admission_state == engine_pb2.ADMISSION_STATE_FULL
        assert load.waiting_prompt_tokens == 6
        call = engine.call(stopping=TEN)
        refused = await engine.refused(_rest(call))
        assert not any(call.done() for call in calls)  # it waited for none of them
        assert refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (refused.info.reason, refused.info.domain) == ("QUEUE_FULL", "nanoinfer-engine")
        assert refused.retry_seconds is not None
        assert 0.1 <= refused.retry_seconds <= 30
        assert list(await call.initial_metadata() or ()) == []
        engine.runner.gate.set()
        for call in calls:
            assert (await _rest(call))[-1].summary.usage.completion_tokens == 10


async def test_who_waits_too_long_is_told_when_to_retry(start_fake: StartFake) -> None:
    async with start_fake(
        FakeRunner(step_seconds=0.01), max_batch_requests=1, max_queue_seconds=0.2
    ) as engine:
        first = engine.call(sampling=SEED, stopping=pb.StoppingParams(max_tokens=60))
        await engine.until(lambda load: load.running_requests == 1)
        refused = await engine.refused(engine.generate(stopping=TEN))
        assert refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert refused.info.reason == "QUEUE_TIMEOUT"
        assert refused.retry_seconds == pytest.approx(0.2)
        assert (await _rest(first))[-1].summary.usage.completion_tokens == 60


async def test_the_bytes_of_a_request_count_in_the_queue(start_fake: StartFake) -> None:
    async with start_fake(max_batch_requests=1, max_waiting_bytes="1KiB") as engine:
        engine.runner.gate.clear()
        first = engine.call(stopping=TEN)
        await engine.until(lambda load: load.running_requests == 1)
        large = pb.SamplingParams(logit_bias={900 + i: 1.0 for i in range(90)})
        waiting = engine.call(sampling=large, stopping=TEN)
        await engine.until(lambda load: load.waiting_requests == 1)
        refused = await engine.refused(engine.generate(sampling=large, stopping=TEN))
        assert refused.info.reason == "QUEUE_FULL"
        assert "bytes" in refused.message
        engine.runner.gate.set()
        await asyncio.gather(_rest(first), _rest(waiting))


@pytest.mark.matrix("R50")
async def test_a_flood_of_one_tenant_does_not_hold_another_up(start_fake: StartFake) -> None:
    settings = {"max_batch_requests": 2, "max_waiting_requests": 64}
    async with start_fake(FakeRunner(step_seconds=0.002), **settings) as engine:
        flood = [
            engine.call([20 + i], stopping=TEN, metadata=[("x-nanoinfer-tenant", "flood")])
            for i in range(40)
        ]
        await engine.until(lambda load: load.waiting_requests > 30)
        answer = await engine.generate(
            [11], stopping=TEN, metadata=[("x-nanoinfer-tenant", "other")]
        )
        assert len(answer.tokens()) == 10
        assert (await engine.load()).waiting_requests > 20
        for call in flood:
            call.cancel()
        await engine.idle()


@pytest.mark.matrix("R5")
async def test_what_can_never_fit_is_refused(start_fake: StartFake) -> None:
    async with start_fake(FakeRunner(num_blocks=4)) as engine:
        too_much = pb.StoppingParams(max_tokens=14)
        refused = await engine.refused(engine.generate(stopping=too_much))
        assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
        assert refused.info.reason == "EXCEEDS_KV_CAPACITY"
        assert refused.fields == ["stopping.max_tokens"]
        unset = await engine.generate(stopping=pb.StoppingParams(ignore_eos=True))
        assert unset.summary.usage.completion_tokens == 13
        whole = await engine.refused(engine.generate(prompt=[11] * 16))
        assert whole.info.reason == "EXCEEDS_KV_CAPACITY"
        info = await engine.stub.GetModelInfo(engine_pb2.EngineServiceGetModelInfoRequest())
        assert info.model.max_output_tokens == 15


@pytest.mark.matrix("R53")
async def test_a_row_failure_is_internal_and_opaque(fake: Engine) -> None:
    fake.runner.fail_row = lambda row: ValueError("/secret/path") if 9 in row.token_ids else None
    good, bad = await asyncio.gather(
        fake.generate(sampling=SEED, stopping=TEN), fake.refused(fake.generate([9], stopping=TEN))
    )
    assert good.tokens() == expected_tokens([11, 12, 13], 10)
    assert (bad.code, bad.info.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    assert "secret" not in bad.message
    await fake.idle()


async def test_one_failed_completion_ends_its_siblings(fake: Engine) -> None:
    fake.runner.fail_row = lambda row: ValueError() if row.sampling.seed == 1 else None
    bad = await fake.refused(fake.generate(sampling=pb.SamplingParams(seed=0, n=3)))
    assert bad.code is grpc.StatusCode.INTERNAL
    await fake.idle()


@pytest.mark.matrix("R54")
async def test_a_lost_step_is_unavailable_and_serving_goes_on(fake: Engine) -> None:
    fake.runner.fail_step = RuntimeError("no such kernel")
    lost = await fake.refused(fake.generate(stopping=TEN))
    assert (lost.code, lost.info.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_LOST")
    assert (await fake.generate(sampling=SEED, stopping=TEN)).tokens()
    call = fake.call()
    await call.read()
    fake.runner.fail_step = RuntimeError("again")
    late = await fake.refused(_rest(call))
    assert late.info.reason == "ENGINE_LOST_MID_STREAM"
    assert int(late.info.metadata["outputTokens"]) >= 1


@pytest.mark.matrix("R60")
async def test_a_stalled_engine_reports_not_serving_and_recovers(start_fake: StartFake) -> None:
    async with start_fake(stall_seconds=0.5) as engine:
        engine.runner.gate.clear()
        call = engine.call(stopping=TEN)
        await engine.until(lambda load: load.admission_state == engine_pb2.ADMISSION_STATE_CLOSED)
        assert await _health(engine) == health_pb2.HealthCheckResponse.NOT_SERVING
        assert await _health(engine, "liveness") == health_pb2.HealthCheckResponse.SERVING
        server = await engine.stub.GetServerInfo(engine_pb2.EngineServiceGetServerInfoRequest())
        assert server.server.state == pb.SERVER_STATE_STALLED
        engine.runner.gate.set()
        await _rest(call)
        await engine.until(lambda load: load.admission_state == engine_pb2.ADMISSION_STATE_OPEN)
        assert await _health(engine) == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.matrix("R56")
async def test_a_lost_device_fails_the_service(fake: Engine) -> None:
    fake.runner.fail_step = RuntimeError("CUDA error: device-side assert")
    lost = await fake.refused(fake.generate())
    assert lost.info.reason == "ENGINE_LOST"
    await asyncio.wait_for(fake.server.status.failed.wait(), 60)
    again = await fake.refused(fake.generate())
    assert again.code is grpc.StatusCode.UNAVAILABLE


async def test_a_client_that_does_not_read_loses_its_stream(start_fake: StartFake) -> None:
    runner = FakeRunner(num_blocks=16_000, max_model_len=4000, window=4)
    settings = {"reader_stall_seconds": 1.0, "max_buffered_tokens": 64}
    settings |= {"max_batch_requests": 17, "max_batch_tokens": 64, "max_waiting_requests": 20}
    async with start_fake(runner, **settings) as engine:
        # 16 completions with 20 alternatives, some 7 kB a step: gRPC widens its window to some MB
        # before the transport is full, which takes 4 s here
        call = engine.call(
            sampling=pb.SamplingParams(n=16),
            stopping=pb.StoppingParams(max_tokens=3900, ignore_eos=True),
            response=pb.ResponseOptions(logprobs=20),
        )
        await call.read()
        other = await engine.generate([77], sampling=SEED, stopping=TEN)
        assert len(other.tokens()) == 10
        await engine.idle()
        refused = await engine.refused(_rest(call))
        assert refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert refused.info.reason == "STREAM_STALLED"


async def test_tokens_share_messages_beyond_the_highest_rate(start_fake: StartFake) -> None:
    async with start_fake(FakeRunner(step_seconds=0.01), max_messages_per_second=1) as engine:
        began = time.monotonic()
        answer = await engine.generate(sampling=SEED, stopping=TEN)
        seconds = time.monotonic() - began
    assert answer.tokens() == expected_tokens([11, 12, 13], 10, SEED.seed)
    assert len(answer.messages) <= 3 + seconds  # the first, one that was due, the last


async def test_server_info_says_what_and_how_long(fake: Engine) -> None:
    reply = await fake.stub.GetServerInfo(engine_pb2.EngineServiceGetServerInfoRequest())
    assert reply.server.service == "nanoinfer-engine"
    assert reply.server.state == pb.SERVER_STATE_SERVING
    assert reply.server.uptime_ns > 0


async def test_priority_comes_from_metadata(start_fake: StartFake) -> None:
    async with start_fake(max_batch_requests=1) as engine:
        engine.runner.gate.clear()
        first = engine.call([50], stopping=TEN)
        await engine.until(lambda load: load.running_requests == 1)
        low = engine.call([60], stopping=TEN, metadata=[("x-nanoinfer-priority", "-3")])
        await engine.until(lambda load: load.waiting_requests == 1)
        high = engine.call([70], stopping=TEN, metadata=[("x-nanoinfer-priority", "3")])
        await engine.until(lambda load: load.waiting_requests == 2)
        engine.runner.gate.set()
        await asyncio.gather(*(_rest(call) for call in (first, low, high)))
        starts = [
            row.token_ids[0]
            for batch in engine.runner.batches
            for row in batch.rows
            if row.start == 0
        ]
        assert starts == [50, 70, 50, 60]  # the urgent one takes the only row


async def test_a_drain_finishes_streams_and_refuses_new_ones(start_fake: StartFake) -> None:
    async with start_fake(FakeRunner(step_seconds=0.005), drain_seconds=60) as engine:
        call = engine.call(sampling=SEED, stopping=pb.StoppingParams(max_tokens=60))
        await call.read()
        drain = asyncio.create_task(engine.service.drain(60))
        await asyncio.sleep(0.02)
        refused = await engine.refused(engine.generate())
        assert (refused.code, refused.info.reason) == (
            grpc.StatusCode.UNAVAILABLE,
            "SHUTTING_DOWN",
        )
        messages = await _rest(call)
        assert messages[-1].summary.usage.completion_tokens == 60
        await drain


async def test_loading_is_unavailable_and_a_broken_model_is_told(tmp_path: Path) -> None:
    def load(config: object, progress: object) -> FakeRunner:
        raise ValueError("no tensor named lm_head.weight")

    settings = EngineSettings(model=tmp_path, port=0, metrics_port=None)
    with pytest.raises(StartError, match="lm_head"):
        async with running(lambda status: EngineService(settings, status, load), settings):
            raise AssertionError("it must not serve")


async def _rest(call: grpc.aio.UnaryStreamCall[object, Message]) -> list[Message]:
    """What the call still brings."""
    messages = []
    while (message := await call.read()) is not grpc.aio.EOF:
        messages.append(message)
    return messages


async def _health(engine: Engine, name: str = "") -> int:
    async with grpc.aio.insecure_channel(engine.server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return (await stub.Check(health_pb2.HealthCheckRequest(service=name))).status


@pytest.mark.matrix("R36")
async def test_two_requests_of_one_id_at_once_are_two_requests(fake: Engine) -> None:
    fake.runner.gate.clear()
    prompts = ([11, 12, 13], [21, 22])
    calls = [
        asyncio.ensure_future(
            fake.generate(prompt, sampling=SEED, stopping=TEN, request_id="twice")
        )
        for prompt in prompts
    ]
    await fake.until(lambda load: load.running_requests + load.waiting_requests == 2)
    fake.runner.gate.set()
    for prompt, answer in zip(prompts, await asyncio.gather(*calls), strict=True):
        assert answer.tokens() == expected_tokens(prompt, 10)
        assert answer.summary.request_id == "twice"
    await fake.idle()
