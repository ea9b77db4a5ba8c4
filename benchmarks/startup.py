"""Measures how long an engine takes to start: with no compiled kernel at hand, and with all.

    python benchmarks/startup.py --shape 8b --device cuda --out FILE

Writes a checkpoint of random weights as Hugging Face would (safetensors of 5 GB at most, FP16) and
starts a fresh process on it twice, which imports the runner, loads and warms up; the second finds
what the first has compiled and chosen. Both find the files in the page cache, because they have
just been written. Prints a JSON line for each.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

# torch and the engine are imported where they are needed: a fresh process measures just that
if TYPE_CHECKING:
    from nanoinfer_engine.core.config import ModelConfig


def config_json(config: ModelConfig) -> dict[str, Any]:
    """A config.json that is read as `config`."""
    renamed = {"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads"}
    renamed |= {"num_kv_heads": "num_key_value_heads", "norm_eps": "rms_norm_eps"}
    renamed |= {"activation": "hidden_act"}
    same = "model_type vocab_size hidden_size intermediate_size head_dim max_position_embeddings"
    renamed |= {name: name for name in (*same.split(), "tie_word_embeddings")}
    values = {theirs: getattr(config, ours) for ours, theirs in renamed.items()}
    return {**values, "rope_theta": config.rope.theta, "torch_dtype": "float16"}


def shards(sizes: Mapping[str, int], shard_bytes: int) -> list[list[str]]:
    """Names of tensors that share a file, in order; `sizes` in bytes."""
    files: list[list[str]] = []
    held = shard_bytes
    for name, size in sizes.items():
        if held + size > shard_bytes:
            files.append([])
            held = 0
        files[-1].append(name)
        held += size
    return files


def write_checkpoint(
    shape: str, directory: Path, device: str, shard_bytes: int = 5 * 10**9
) -> None:
    """A directory that the engine, and transformers, can load; one shard in memory at a time."""
    import torch
    from random_weights import SHAPES, RandomCheckpoint
    from safetensors.torch import save_file

    config = SHAPES[shape]
    checkpoint = RandomCheckpoint(config, device, torch.float16)
    sizes = {name: 2 * math.prod(shape) for name, shape in checkpoint.shapes.items()}
    files = shards(sizes, shard_bytes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files, 1):
        file_name = f"model-{number:05}-of-{len(files):05}.safetensors"
        stored = {n: n if n.startswith("lm_head") else f"model.{n}" for n in names}
        save_file({stored[n]: checkpoint.read(n) for n in names}, directory / file_name)
        weight_map |= dict.fromkeys(stored.values(), file_name)
    index = {"model.safetensors.index.json": {"metadata": {}, "weight_map": weight_map}}
    for file_name, value in {**index, "config.json": config_json(config)}.items():
        (directory / file_name).write_text(json.dumps(value))


def load(directory: Path, device: str) -> dict[str, float]:
    """Seconds of each part of a start in this fresh process; loading opens the device, too."""
    began = time.perf_counter()
    from nanoinfer_engine.core.config import EngineConfig
    from nanoinfer_engine.core.progress import LoadProgress
    from nanoinfer_engine.step.runner import ModelRunner

    imported = time.perf_counter()
    seen: list[tuple[float, LoadProgress]] = []
    is_cuda = device.startswith("cuda")
    tokens, requests = (8192, 256) if is_cuda else (512, 64)  # the service's defaults
    config = EngineConfig(
        model_path=directory,
        device=device,
        dtype="float16" if is_cuda else "float32",
        kv_cache_bytes=None if is_cuda else 64 << 20,
        max_batch_tokens=tokens,
        max_batch_requests=requests,
    )
    runner = ModelRunner(config, lambda progress: seen.append((time.perf_counter(), progress)))
    (first, _), (last, progress) = seen[0], seen[-1]
    made = time.perf_counter()
    runner.warm_up()
    return {
        "import_s": imported - began,
        "load_s": last - imported,
        "size_cache_s": made - last,
        "tune_and_capture_s": time.perf_counter() - made,
        "gb_per_s": progress.total_bytes / (last - first) / 1e9,
    }


def start(directory: Path, device: str, kernels: Path) -> dict[str, float]:
    """The same in a fresh process; `total_s` is from outside, with the interpreter's own start."""
    command = [sys.executable, __file__, "--load", str(directory), "--device", device]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(kernels)}
    began = time.perf_counter()
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline() if process.stdout else ""
        total = time.perf_counter() - began
    if process.returncode:
        raise RuntimeError(f"the engine did not start: exit code {process.returncode}")
    return {**json.loads(line), "total_s": total}


def machine(device: str) -> dict[str, str]:
    """The measured device and the version of torch."""
    import torch

    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    return {"device": name, "torch": torch.__version__}


def main(argv: Sequence[str]) -> int:
    """Measure and print; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=("0.6b", "8b", "tiny"), default="0.6b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--directory", type=Path, help="where there is room for the checkpoint")
    parser.add_argument("--kernels", type=Path, help="compiled before: only the warm start")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", help="to be noted in the results")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.load:
        print(json.dumps(load(arguments.load, arguments.device)), flush=True)
        return 0
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        write_checkpoint(arguments.shape, Path(name), arguments.device)
        compiled = arguments.kernels or Path(name) / "kernels"
        for kernels in ("cold", "warm") if arguments.kernels is None else ("warm",):
            seconds = start(Path(name), arguments.device, compiled)
            facts = {"shape": arguments.shape, "kernels": kernels, **machine(arguments.device)}
            facts |= {"commit": arguments.commit} if arguments.commit else {}
            facts |= {key: round(value, 2) for key, value in seconds.items()}
            line = json.dumps({**facts, "date": datetime.date.today().isoformat()})
            print(line, flush=True)
            if arguments.out:
                with arguments.out.open("a") as file:
                    file.write(line + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
