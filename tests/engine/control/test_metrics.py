"""What a scrape shows: names, types, balance, and text 0.0.4 with its colons."""

from __future__ import annotations

import asyncio
import urllib.request

import grpc
import pytest
from nanoinfer.v1 import engine_pb2
from nanoinfer.v1 import generation_pb2 as pb
from nanoinfer_engine.core.statistics import Histogram
from prometheus_client.parser import text_string_to_metric_families

from tests.engine.control.conftest import Engine, StartFake
from tests.engine.fakes import FakeRunner, expected_tokens

TEN = pb.StoppingParams(max_tokens=10)
EXPECTED = {
    "vllm:num_requests_running": "gauge",
    "vllm:num_requests_waiting": "gauge",
    "vllm:kv_cache_usage_perc": "gauge",
    "vllm:cache_config_info": "gauge",
    "vllm:prompt_tokens": "counter",
    "vllm:generation_tokens": "counter",
    "vllm:num_preemptions": "counter",
    "vllm:prompt_tokens_cached": "counter",
    "vllm:prefix_cache_queries": "counter",
    "vllm:prefix_cache_hits": "counter",
    "vllm:request_success": "counter",
    "vllm:admission_rejections": "counter",
    "vllm:time_to_first_token_seconds": "histogram",
    "vllm:inter_token_latency_seconds": "histogram",
    "vllm:request_time_per_output_token_seconds": "histogram",
    "vllm:e2e_request_latency_seconds": "histogram",
    "vllm:request_queue_time_seconds": "histogram",
    "vllm:request_prefill_time_seconds": "histogram",
    "vllm:request_decode_time_seconds": "histogram",
    "vllm:request_inference_time_seconds": "histogram",
    "vllm:request_prompt_tokens": "histogram",
    "vllm:request_generation_tokens": "histogram",
    "vllm:request_max_num_generation_tokens": "histogram",
    "vllm:request_params_n": "histogram",
    "vllm:request_params_max_tokens": "histogram",
    "vllm:iteration_tokens_total": "histogram",
    "nanoinfer_engine_accepted": "counter",
    "nanoinfer_engine_requests": "counter",
    "nanoinfer_engine_failed_steps": "counter",
    "nanoinfer_engine_step_seconds": "histogram",
    "nanoinfer_engine_step_batch_size": "histogram",
    "nanoinfer_engine_step_host_seconds": "histogram",
    "nanoinfer_engine_graph_replays": "counter",
    "nanoinfer_engine_device_busy_seconds": "counter",
    "nanoinfer_engine_device_idle_seconds": "counter",
    "nanoinfer_engine_device_idle_share": "gauge",
    "nanoinfer_engine_last_step_age_seconds": "gauge",
}


async def scrape(engine: Engine) -> tuple[dict[str, str], dict[str, float]]:
    """Types by family name, and values by sample name with its own label, if it has one."""
    url = f"http://127.0.0.1:{engine.server.metrics_port}/metrics"
    reply = await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=60))
    assert reply.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    types, values = {}, {}
    for family in text_string_to_metric_families(reply.read().decode()):
        types[family.name] = family.type
        for sample in family.samples:
            if family.name.startswith(("vllm:", "nanoinfer_engine_")):
                assert sample.labels["model_name"] == "fake"
                assert sample.labels["engine"] == "0"
            own = [v for k, v in sample.labels.items() if k not in ("model_name", "engine")]
            values[":".join([sample.name, *own])] = sample.value
    return types, values


async def test_every_expected_name_is_there_with_its_type(start_fake: StartFake) -> None:
    async with start_fake(metrics_port=0) as engine:
        answer = await engine.generate(stopping=TEN)
        assert answer.tokens()
        await engine.idle()
        types, values = await scrape(engine)
        assert EXPECTED.items() <= types.items()
        assert values["vllm:generation_tokens_total"] == 10
        assert values["vllm:prompt_tokens_total"] == 3
        assert values["vllm:request_success_total:length"] == 1
        assert values["vllm:cache_config_info:4:64"] == 1
        assert values["vllm:inter_token_latency_seconds_count"] == 9
        assert values["vllm:iteration_tokens_total_sum"] == 12
        assert values["vllm:request_params_max_tokens_sum"] == 10
        assert values["vllm:e2e_request_latency_seconds_bucket:+Inf"] == 1
        assert values["nanoinfer_engine_step_seconds_count:eager"] == 10
        assert values["nanoinfer_engine_step_seconds_count:graph"] == 0
        assert values["nanoinfer_engine_step_host_seconds_count"] == 10
        assert values["nanoinfer_engine_device_busy_seconds_total"] > 0
        assert 0 < values["nanoinfer_engine_device_idle_share"] < 1


async def test_both_kinds_of_steps_are_there_before_any_step(start_fake: StartFake) -> None:
    async with start_fake(metrics_port=0) as engine:
        _, values = await scrape(engine)
        assert values["nanoinfer_engine_step_seconds_count:eager"] == 0
        assert values["nanoinfer_engine_step_seconds_count:graph"] == 0


async def test_cached_tokens_are_counted(start_fake: StartFake) -> None:
    async with start_fake(metrics_port=0) as engine:
        for _ in range(3):
            await engine.generate(list(range(10, 30)), stopping=TEN)
        await engine.idle()
        _, values = await scrape(engine)
        assert values["vllm:prefix_cache_queries_total"] == 60
        assert values["vllm:prefix_cache_hits_total"] == 32
        assert values["vllm:prompt_tokens_cached_total"] == 32
        assert values["vllm:prompt_tokens_total"] == 60
        assert values["vllm:kv_cache_usage_perc"] == 0  # what is merely kept is not in use


async def test_the_prefix_is_a_setting(start_fake: StartFake) -> None:
    async with start_fake(metrics_port=0, metrics_prefix="mine_") as engine:
        types, _ = await scrape(engine)
        assert types["mine_num_requests_running"] == "gauge"
        assert not any(name.startswith("vllm:") for name in types)


async def test_accepted_is_success_and_error_and_cancelled(start_fake: StartFake) -> None:
    runner = FakeRunner(step_seconds=0.005)
    runner.fail_row = lambda row: ValueError() if 9 in row.token_ids else None
    async with start_fake(runner, metrics_port=0, max_waiting_requests=4) as engine:
        await engine.generate(stopping=TEN, sampling=pb.SamplingParams(n=2))
        await engine.refused(engine.generate([9]))
        call = engine.call()
        await call.read()
        call.cancel()
        await engine.idle()
        await engine.refused(engine.generate(sampling=pb.SamplingParams(n=16)))
        # the thread publishes its snapshot a moment after the load
        ended = engine.service._engine
        while sum(ended.statistics.finished.values()) < 4:
            await asyncio.sleep(0.005)
        _, values = await scrape(engine)
        outcomes = {
            name: values[f"nanoinfer_engine_requests_total:{name}"]
            for name in ("success", "error", "cancelled")
        }
        assert outcomes == {"success": 2, "error": 1, "cancelled": 1}
        assert values["nanoinfer_engine_accepted_total"] == sum(outcomes.values())
        assert values["vllm:admission_rejections_total:max_num_queued_reqs"] == 1
        assert values["vllm:request_params_n_count"] == 3


def counts(values: dict[str, float]) -> dict[str, int]:
    """Observations of the histograms, the outcomes of requests and the reasons of successes."""
    names = ("time_to_first_token", "request_queue_time", "request_prefill_time")
    whole = ("request_decode_time", "request_inference_time", "e2e_request_latency")
    found = {name: int(values[f"vllm:{name}_seconds_count"]) for name in (*names, *whole)}
    for outcome in ("success", "error", "cancelled"):
        found[outcome] = int(values[f"nanoinfer_engine_requests_total:{outcome}"])
    for reason in ("stop", "length"):
        found[reason] = int(values[f"vllm:request_success_total:{reason}"])
    return {name: count for name, count in found.items() if count}


BEGUN = dict.fromkeys(("time_to_first_token", "request_queue_time", "request_prefill_time"), 1)
WHOLE = dict.fromkeys(("request_decode_time", "request_inference_time", "e2e_request_latency"), 1)


async def settled(engine: Engine) -> dict[str, int]:
    """The counts once every accepted completion has ended in the published snapshot."""
    while True:
        _, values = await scrape(engine)
        found = counts(values)
        ended = sum(found.get(name, 0) for name in ("success", "error", "cancelled"))
        if ended == values["nanoinfer_engine_accepted_total"] > 0:
            return found
        await asyncio.sleep(0.01)


async def test_a_cancel_after_a_stop_string_is_a_success_with_all_its_times(
    start_fake: StartFake,
) -> None:
    async with start_fake(FakeRunner(step_seconds=0.005), metrics_port=0) as engine:
        call = engine.call(cancels_at_stop_strings=True)
        await call.read()
        call.cancel()
        assert await settled(engine) == BEGUN | WHOLE | {"success": 1, "stop": 1}


@pytest.mark.matrix("R42")
async def test_a_clients_cancel_has_the_times_that_it_reached(start_fake: StartFake) -> None:
    async with start_fake(FakeRunner(step_seconds=0.005), metrics_port=0) as engine:
        call = engine.call()
        await call.read()
        call.cancel()
        assert await settled(engine) == BEGUN | {"cancelled": 1}


async def test_no_stop_string_ends_a_call_before_its_first_token(start_fake: StartFake) -> None:
    runner = FakeRunner()
    runner.gate.clear()
    async with start_fake(runner, metrics_port=0) as engine:
        call = engine.call(cancels_at_stop_strings=True)
        await engine.until(lambda load: load.running_requests == 1)
        call.cancel()
        await call.code()
        # the cancel is in the engine's inbox before the step ends
        await engine.stub.GetServerInfo(engine_pb2.EngineServiceGetServerInfoRequest())
        runner.gate.set()
        assert await settled(engine) == {"request_queue_time": 1, "cancelled": 1}


async def test_the_queue_time_of_a_request_that_fails_in_its_prefill_is_there(
    start_fake: StartFake,
) -> None:
    runner = FakeRunner()
    runner.fail_row = lambda row: ValueError() if row.start else None
    async with start_fake(runner, metrics_port=0, max_batch_tokens=8, max_batch_requests=8) as one:
        await one.refused(one.generate(list(range(10, 40)), stopping=TEN))
        assert await settled(one) == {"request_queue_time": 1, "error": 1}


async def test_a_clients_deadline_is_no_cancel(start_fake: StartFake) -> None:
    runner = FakeRunner(step_seconds=0.01)
    async with start_fake(runner, metrics_port=0, max_waiting_requests=12) as engine:
        request = engine_pb2.EngineServiceGenerateRequest(prompt=pb.TokenIds(ids=[11, 12]))
        calls = [engine.stub.Generate(request, timeout=0.2 + i * 3e-3) for i in range(12)]
        for call in calls:
            assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        found = await settled(engine)
        assert (found.get("error"), found.get("cancelled")) == (12, None)


async def test_the_first_message_tells_the_times_up_to_the_first_token(
    start_fake: StartFake,
) -> None:
    async with start_fake(FakeRunner(step_seconds=0.005)) as engine:
        answer = await engine.generate(stopping=TEN)
        first, summary = answer.messages[0].first_token_timings, answer.summary.timings
        assert (first.queue_ns, first.prefill_ns) == (summary.queue_ns, summary.prefill_ns)
        assert first.time_to_first_token_ns == first.queue_ns + first.prefill_ns
        assert first.prefill_ns > 5_000_000
        assert not any(m.HasField("first_token_timings") for m in answer.messages[1:])


@pytest.mark.matrix("R73")
async def test_a_scrape_waits_for_no_step(start_fake: StartFake) -> None:
    async with start_fake(metrics_port=0) as engine:
        await engine.generate(stopping=TEN)
        engine.runner.gate.clear()
        call = engine.call(stopping=TEN)
        await engine.until(lambda load: load.running_requests == 1)
        await asyncio.sleep(0.1)
        _, values = await asyncio.wait_for(scrape(engine), 60)
        assert values["vllm:num_requests_running"] == 1
        assert values["vllm:kv_cache_usage_perc"] == 1 / 64
        assert values["nanoinfer_engine_last_step_age_seconds"] > 0.05
        engine.runner.gate.set()
        assert await call.read() is not grpc.aio.EOF


@pytest.mark.matrix("R54", "R55")
async def test_failed_steps_are_counted_by_what_became_of_them(start_fake: StartFake) -> None:
    async with start_fake(metrics_port=0) as engine:
        engine.runner.fail_step = MemoryError("no memory for this step")
        answer = await engine.generate([11] * 12, sampling=pb.SamplingParams(seed=0), stopping=TEN)
        assert answer.tokens() == expected_tokens([11] * 12, 10)
        engine.runner.fail_step = RuntimeError("no such kernel")
        lost = await engine.refused(engine.generate(stopping=TEN))
        assert lost.info.reason == "ENGINE_LOST"
        await engine.idle()
        _, values = await scrape(engine)
        assert values["nanoinfer_engine_failed_steps_total:retried"] == 1
        assert values["nanoinfer_engine_failed_steps_total:lost"] == 1


@pytest.mark.parametrize(("value", "bucket"), [(0.5, 0), (1.0, 0), (1.5, 1), (2.0, 1), (9.0, 2)])
def test_a_bucket_takes_its_own_bound(value: float, bucket: int) -> None:
    histogram = Histogram((1.0, 2.0))
    histogram.observe(value)
    snapshot = histogram.snapshot()
    assert [i for i, count in enumerate(snapshot.counts) if count] == [bucket]
    assert snapshot.total == value
