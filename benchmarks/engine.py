"""Measures the engine's core on one GPU, random weights; the scenarios of docs/performance.md.

    python benchmarks/engine.py --shape 0.6b --scenarios a c8 c32 c64 c128 c256 b d --out FILE

Scheduler, pipeline and runner as the service runs them, without gRPC. a and c are decode rates,
b·(n-1)/(t-t1), with t1 from a run of one output token; b is output tokens over wall time, d prompt
tokens over wall time. e: a prompt of 8,000 tokens arrives beside 64 streams; output tokens over
wall time, how long the streams wait between two steps until its first token, and that one's time.
s64: 64 streams kept up, one request after another (512 tokens, 128 more) as in `serving.py`; r64:
with lengths as in b.
Prints one JSON line per scenario, the median of `--repeats` runs. With `--tensor-parallel N` the
model is shared by N GPUs, and the limits are N times as high.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from nanoinfer_engine.core.batch import EndedStep, Runner, StepTiming
from nanoinfer_engine.core.capacity import Capacity
from nanoinfer_engine.core.config import WEIGHT_FORMATS, EngineConfig
from nanoinfer_engine.core.pipeline import Pipeline
from nanoinfer_engine.core.request import Request, RequestTimes, SamplingOptions, StoppingOptions
from nanoinfer_engine.core.scheduler import Scheduler
from nanoinfer_engine.parallel.ranks import ParallelRunner
from nanoinfer_engine.step.runner import ModelRunner
from random_weights import SHAPES, RandomCheckpoint

# tokens per second that the bytes of weights and cache, or the matrix units, allow on one H200
LIMITS = {
    "0.6b": {
        "a": 3540,
        "c8": 19600,
        "c32": 39500,
        "c64": 47500,
        "c128": 52800,
        "c256": 55000,
        "b": 36700,
        "d": 650000,
    },
    "8b": {
        "a": 290,
        "c8": 2230,
        "c32": 7900,
        "c64": 13700,
        "c128": 21700,
        "c256": 26200,
        "b": 13400,
        "d": 53600,
    },
}
GREEDY = SamplingOptions(0.0, 0, 1.0, 0.0, 0)
FLOWING_TOKENS = 32  # of every stream, before the late prompt of e arrives


@dataclass
class Late:
    """A request that arrives beside streams, and how long those wait until its first token."""

    request: Request
    last_step: int = 0
    gaps: list[float] = field(default_factory=list)

    def see(self, step: EndedStep) -> None:
        """A step that the streams had a token of, after the request's arrival."""
        if self.last_step:
            self.gaps.append((step.ended - self.last_step) * 1e-6)
        self.last_step = step.ended

    @property
    def details(self) -> dict[str, float]:
        """Milliseconds."""
        times, gaps = self.request.times, sorted(self.gaps)
        return {
            "gap_ms_median": statistics.median(gaps),
            "gap_ms_p99": gaps[-(-99 * len(gaps) // 100) - 1],
            "gap_ms_max": gaps[-1],
            "late_first_token_ms": ((times.first_token or 0) - times.arrived) * 1e-6,
        }


@dataclass
class Run:
    """Wall seconds, and what the steps say of themselves."""

    seconds: float
    num_tokens: int
    steps: list[StepTiming]
    host_seconds: float
    requests: Sequence[Request]
    late: Late | None

    @property
    def details(self) -> dict[str, float]:
        """Host time a step, and the device's share of time without a task."""
        busy, idle = (sum(getattr(step, name) for step in self.steps) for name in ("busy", "idle"))
        return {
            "host_ms_per_step": 1e3 * self.host_seconds / len(self.steps),
            "idle_share": idle / (busy + idle),
        }

    @property
    def waits(self) -> dict[str, float]:
        """Steps, the share of them that were graphs, and a request's median wait for its token."""
        times = [request.times for request in self.requests]
        waits = [((each.first_token or 0) - each.arrived) * 1e-6 for each in times]
        return {
            "steps": len(self.steps),
            "graphs": statistics.mean(step.kind == "graph" for step in self.steps),
            "first_token_ms": statistics.median(waits),
        }


class Bench:
    """One runner and the requests that are sent through it."""

    def __init__(
        self, shape: str, config: EngineConfig, dtype: torch.dtype, *, dummy: bool = False
    ) -> None:
        began = time.perf_counter()
        self.config = config
        self.vocab_size = SHAPES[shape].vocab_size
        checkpoint = RandomCheckpoint(SHAPES[shape], config.device, dtype, dummy=dummy)
        self.runner: Runner
        if config.tensor_parallel == 1:
            self.runner = ModelRunner(config, checkpoint=checkpoint)
        else:
            self.runner = ParallelRunner(config, checkpoint=checkpoint, lost=give_up)
        self.load_seconds = time.perf_counter() - began
        self.warm_up_seconds = self.runner.warm_up()
        self.capacity = Capacity(
            self.runner.max_model_len, self.runner.num_blocks * self.runner.block_size
        )

    def run(
        self,
        lengths: Sequence[tuple[int, int]],
        sampling: SamplingOptions,
        seed: int,
        late_lengths: tuple[int, int] | None = None,
        num_streams: int | None = None,
    ) -> Run:
        """All requests at once, to their ends; a late one as soon as all others are flowing.

        With `num_streams` so many at once, and the next as soon as one has ended.
        """
        source = random.Random(seed)
        scheduler = Scheduler(self.config, self.capacity)
        pipeline = Pipeline(self.runner)
        requests = []
        for index, (num_prompt, num_output) in enumerate((*lengths, *filter(None, [late_lengths]))):
            prompt = tuple(source.randrange(self.vocab_size) for _ in range(num_prompt))
            stopping = StoppingOptions(num_output, 0, frozenset(), frozenset(), False)
            times = RequestTimes(time.monotonic_ns())
            requests.append(Request(str(index), 0, prompt, sampling, stopping, times))
        late = None if late_lengths is None else Late(requests.pop())
        following = iter(requests)
        for request in itertools.islice(following, num_streams):
            scheduler.add(request)
        torch.cuda.synchronize()
        began = time.perf_counter()
        pipeline.resume()
        num_tokens, host, steps = 0, 0.0, []
        while scheduler.has_work or pipeline.is_busy:
            step = pipeline.advance(scheduler.schedule())
            if step is None:
                continue
            is_waiting = late is not None and late.request.times.first_token is None
            outputs = scheduler.update(step.batch, step.results)
            num_tokens += sum(len(output.tokens) for output in outputs)
            steps.append(step.timing)
            host += step.host
            num_ended = sum(output.finish_reason is not None for output in outputs)
            for request in itertools.islice(following, num_ended):
                request.times.arrived = time.monotonic_ns()
                scheduler.add(request)
            if late is None or not is_waiting:
                continue
            if late.last_step:
                late.see(step)
            elif min(len(each.completion_token_ids) for each in requests) >= FLOWING_TOKENS:
                late.see(step)
                late.request.times.arrived = time.monotonic_ns()
                scheduler.add(late.request)
        expected = sum(request.stopping.max_tokens for request in requests)
        expected += 0 if late is None else late.request.stopping.max_tokens
        if num_tokens != expected:
            raise RuntimeError(f"{num_tokens} tokens came, {expected} were asked for")
        return Run(time.perf_counter() - began, num_tokens, steps, host, requests, late)

    def scenario(self, name: str) -> tuple[int, float, dict[str, float]]:
        """Batch, tokens per second and what else is worth knowing, of one run."""
        if name == "b":
            source = random.Random(0)
            lengths = [(source.randint(100, 1024), source.randint(100, 1024)) for _ in range(256)]
            sampling = SamplingOptions(0.6, 0, 1.0, 0.0, 0)
            run = self.run(lengths, sampling, 1)
            details = {"steps": len(run.steps), **run.details}
            return 256, run.num_tokens / run.seconds, details
        if name == "d":
            run = self.run([(2048, 1)] * 32, GREEDY, 1)
            return 32, 32 * 2048 / run.seconds, run.details
        if name == "e":
            run = self.run([(512, 512)] * 64, GREEDY, 1, late_lengths=(8000, 64))
            details = {**(run.late.details if run.late else {}), **run.details}
            return 65, run.num_tokens / run.seconds, details
        if name[0] in "sr":
            streams, source = int(name[1:]), random.Random(0)
            lengths = [(512, 128)] * (4 * streams)
            if name[0] == "r":
                lengths = [(source.randint(100, 1024), source.randint(100, 1024)) for _ in lengths]
            run = self.run(lengths, GREEDY, 1, num_streams=streams)
            return streams, run.num_tokens / run.seconds, {**run.waits, **run.details}
        batch, num_prompt, num_output = (1, 128, 512) if name == "a" else (int(name[1:]), 512, 256)
        first = self.run([(num_prompt, 1)] * batch, GREEDY, 1)
        whole = self.run([(num_prompt, num_output)] * batch, GREEDY, 1)
        seconds = whole.seconds - first.seconds
        details = {"ms_per_step": 1e3 * seconds / (num_output - 1), **whole.details}
        return batch, batch * (num_output - 1) / seconds, details


def give_up(error: Exception) -> None:
    """A rank is gone, and the others wait for it forever."""
    print(error, file=sys.stderr, flush=True)
    os._exit(1)


def commit() -> str:
    """The commit that is measured; `+` where the tree differs from it."""
    here = Path(__file__).parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=10", "--dirty=+"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return described.stdout.strip()


def measure(bench: Bench, name: str, arguments: argparse.Namespace) -> dict[str, object]:
    """One line of results; `name` may end in @ and the most tokens of a step beside decodes."""
    name, _, most = name.partition("@")
    mixed = int(most) if most else arguments.max_mixed_tokens
    bench.config = replace(bench.config, max_mixed_tokens=mixed)
    if not arguments.cold:
        bench.scenario(name)  # shapes that only this scenario has are planned here
    runs = [bench.scenario(name) for _ in range(arguments.repeats)]
    batch, tok_s, details = sorted(runs, key=lambda run: run[1])[len(runs) // 2]
    device = torch.cuda.get_device_name()
    limit = LIMITS[arguments.shape].get(name) if "H200" in device else None
    if limit is not None:
        limit *= arguments.tensor_parallel
    return {
        "scenario": name[0],
        "shape": arguments.shape,
        "batch": batch,
        "tensor_parallel": arguments.tensor_parallel,
        "tok_s": round(tok_s, 1),
        "fraction_of_limit": None if limit is None else round(tok_s / limit, 3),
        "spread": round(statistics.pstdev(run[1] for run in runs) / tok_s, 4),
        "repeats": arguments.repeats,
        "dtype": bench.config.number_format,
        "weights": arguments.weights,
        "max_batch_tokens": bench.config.max_batch_tokens,
        "max_mixed_tokens": bench.config.mixed_step_tokens,
        "mixed_graphs": bench.config.mixed_graphs,
        **{key: round(value, 4) for key, value in details.items()},
        "commit": arguments.commit or commit(),
        "torch": torch.__version__,
        "device": device,
        "date": datetime.date.today().isoformat(),
    }


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=LIMITS, required=True)
    parser.add_argument("--scenarios", nargs="+", default=list(LIMITS["8b"]))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--quantization", choices=WEIGHT_FORMATS, default="none")
    parser.add_argument("--kv-cache-dtype", choices=("auto", "fp8"), default="auto")
    parser.add_argument("--weights", choices=("normal", "dummy"), default="normal")
    parser.add_argument("--cold", action="store_true", help="no run before those that count")
    parser.add_argument("--max-batch-tokens", type=int, default=16384)
    parser.add_argument("--max-mixed-tokens", type=int, help="in a step beside decodes")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--mixed-graphs", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", help="where the tree is no git checkout")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Measure and print; the exit code."""
    arguments = parse(argv)
    config = EngineConfig(
        model_path=Path("random"),
        device="cuda",
        dtype=arguments.dtype,
        kv_cache_bytes=None,
        max_model_len=8192,
        max_batch_tokens=arguments.max_batch_tokens,
        max_batch_requests=256,
        max_mixed_tokens=arguments.max_mixed_tokens,
        prefix_caching=False,
        quantization=arguments.quantization,
        kv_cache_dtype=arguments.kv_cache_dtype,
        tensor_parallel=arguments.tensor_parallel,
        mixed_graphs=arguments.mixed_graphs,
    )
    dtype = torch.float16 if arguments.dtype == "float16" else torch.bfloat16
    bench = Bench(arguments.shape, config, dtype, dummy=arguments.weights == "dummy")
    print(
        f"# start-up {bench.load_seconds + bench.warm_up_seconds:.1f} s, of it loading"
        f" {bench.load_seconds:.1f} s; {bench.capacity.kv_tokens} tokens of KV cache",
        flush=True,
    )
    for name in arguments.scenarios:
        line = json.dumps(measure(bench, name, arguments))
        print(line, flush=True)
        if arguments.out:
            with arguments.out.open("a") as file:
                file.write(line + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
