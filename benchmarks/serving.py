"""Measures a running stack as its clients see it, and what the gateway costs.

    python benchmarks/serving.py --model models/guide [--streams 1 8 32] [--requests 3]
    python benchmarks/serving.py --shape 0.6b --device cuda --streams 1 64 256
    python benchmarks/serving.py --shape 0.6b --device timed --streams 1 64 256

Starts the three services on loopback and sends the same work once through the gateway as text and
once to the engine as ids; prints JSON lines and a table. So many streams are kept up: each client
sends `--requests` requests one after another, all begin at once, and one that does not count went
before. Requests are greedy, ignore EOS and produce `--max-tokens` tokens. With `--shape` weights
are random, prompts are texts of `--prompt-tokens` random tokens, and no prefix is cached. The
streams are shared by `--clients` processes, and by `--gateways` gateways. With the device `timed`
nothing is computed (`timed_engine`): what is measured is the host's part.

- tok/s: completion tokens of all streams over the wall time from the first call to the last message
- TTFT: from the call to the first message that holds a token
- TPOT: from there to the last message over the tokens but the first; a stream's mean
- ITL: between two messages of a stream, which may hold several tokens
- cores: processor time of each service's processes, and of the clients', over the wall time
- gateway overhead: the same figures through the gateway against those at the engine, in one run
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import random
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc
from launch import Stack, stack
from load import Target, measure
from nanoinfer.v1 import tokenizer_pb2, tokenizer_pb2_grpc
from nanoinfer_common.channels import DIRECT
from nanoinfer_engine.core.config import EngineConfig
from random_text import random_text, write_ranks
from random_weights import SHAPES
from startup import write_checkpoint

TIMED = "timed"
PROMPT = "The engine keeps the keys and values of every token in blocks of the KV cache. " * 4


def machine() -> dict[str, str]:
    """The processor and the versions that the figures belong to."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    packages = ("nanoinfer", "torch", "grpcio", "tiktoken", "uvloop")
    return {
        "cpu": f"{os.cpu_count()} cores of {names[0] if names else platform.processor()}",
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


async def encode(address: str, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text."""
    async with grpc.aio.insecure_channel(address, DIRECT) as channel:
        stub = tokenizer_pb2_grpc.TokenizerServiceStub(channel)
        requests = [tokenizer_pb2.TokenizerServiceEncodeRequest(text=text) for text in texts]
        return [list((await stub.Encode(each, timeout=60)).tokens.ids) for each in requests]


def run(running: Stack, options: argparse.Namespace) -> list[dict[str, object]]:
    """Every stream count through both paths, alternating, so that both see the same machine."""
    texts, source = [PROMPT], random.Random(0)
    if options.shape is not None:
        count = 2 * max(options.streams)
        texts = [random_text(options.prompt_tokens, source) for _ in range(count)]
    prompts = asyncio.run(encode(running.tokenizer.address, texts))
    facts = {
        "model": options.shape or options.model.name,
        "prompt_tokens": round(statistics.mean(map(len, prompts))),
        "max_tokens": options.max_tokens,
        "device": device_name(options.device),
        "mixed_graphs": options.mixed_graphs,
        "max_messages_per_second": options.max_messages_per_second,
        "gateways": options.gateways,
        "clients": options.clients,
        "date": datetime.date.today().isoformat(),
    }
    facts |= {"commit": options.commit} if options.commit else {}
    services = {
        "gateway": running.gateways,
        "engine": (running.engine,),
        "tokenizer": (running.tokenizer,),
    }
    targets = [
        Target("gateway", texts, options.max_tokens, services),
        Target("engine", prompts, options.max_tokens, services),
    ]
    rows = []
    for streams in options.streams:
        for target in targets:
            rows.append({**measure(target, streams, options.requests, options.clients), **facts})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def device_name(device: str) -> str:
    """The GPU's name, or the device's."""
    import torch

    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


@contextlib.contextmanager
def served_model(options: argparse.Namespace) -> Iterator[tuple[Path, list[str]]]:
    """A model's directory, and flags of its engine; one of random numbers is deleted afterwards."""
    max_requests = options.max_batch_requests or max(64, *options.streams)
    flags = ["--device", "cuda" if options.device == TIMED else options.device]
    flags += ["--max-batch-requests", str(max_requests)]
    flags += ["--max-messages-per-second", str(options.max_messages_per_second)]
    flags += [] if options.mixed_graphs else ["--no-mixed-graphs"]
    flags += [] if options.threads is None else ["--threads", str(options.threads)]
    if options.shape is None:
        yield options.model, flags
        return
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        if options.device != TIMED:
            write_checkpoint(options.shape, directory, options.device)
        write_ranks(directory / "random.tiktoken", SHAPES[options.shape].vocab_size)
        if options.device != "cpu":
            flags += ["--dtype", "float16"]
        yield directory, [*flags, "--no-prefix-caching"]


def table(rows: Sequence[dict[str, object]]) -> str:
    """A Markdown table: one line per stream count, gateway against engine."""
    lines = [
        "| streams | tok/s | TTFT p50 ms | TPOT p50 ms | ITL p99 ms | engine alone: tok/s"
        " | TTFT p50 ms | gateway adds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for through, alone in zip(rows[::2], rows[1::2], strict=True):
        first, inner = float(str(through["ttft_p50_ms"])), float(str(alone["ttft_p50_ms"]))
        share = 1 - float(str(through["tok_s"])) / float(str(alone["tok_s"]))
        lines.append(
            f"| {through['streams']} | {through['tok_s']} | {first} | {through['tpot_p50_ms']} |"
            f" {through['itl_p99_ms']} | {alone['tok_s']} | {inner} |"
            f" {first - inner:+.1f} ms TTFT, {-share:+.1%} tok/s |"
        )
    return "\n".join(lines)


def main() -> None:
    """Parses the command line, starts the stack, measures, prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("models/guide"))
    parser.add_argument("--shape", choices=tuple(SHAPES), help="random weights instead of a model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=3, help="of each stream")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--max-batch-requests", type=int, help="64, or as many as streams")
    parser.add_argument("--gateways", type=int, default=1)
    parser.add_argument("--clients", type=int, default=1, help="processes that share the streams")
    rate = EngineConfig.max_messages_per_second
    parser.add_argument("--max-messages-per-second", type=int, default=rate, help="the engine's")
    parser.add_argument("--mixed-graphs", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--threads", type=int, default=None, help="threads of the engine")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", help="to be noted in the results")
    options = parser.parse_args()
    if options.device == TIMED and options.shape != "0.6b":
        parser.error("the device `timed` takes the time of --shape 0.6b")
    print(json.dumps(machine()), flush=True)
    engine = str(Path(__file__).with_name("timed_engine.py"))
    engine = engine if options.device == TIMED else "nanoinfer_engine"
    with (
        served_model(options) as (model, flags),
        stack(model, flags, 600, options.gateways, engine) as running,
    ):
        rows = run(running, options)
    print(table(rows))
    if options.out:
        with options.out.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
