"""Measures kernel shapes on one card and writes the tuning table that the engine ships.

    python benchmarks/tune.py --shapes 0.6b 8b

Products are timed over the matrices of many layers in turn, inside a CUDA graph, so that a matrix
is read from memory and not from the cache, and the host takes no part. In a decode step kernels
begin before their neighbours have ended, so shapes that are close to the best are compared again
within whole steps. Sizes that the table has already are measured again only with `--again`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch
from nanoinfer_common.json_files import read_object
from nanoinfer_engine.core.batch import BatchRow
from nanoinfer_engine.core.config import EngineConfig, ModelConfig
from nanoinfer_engine.core.request import SamplingOptions
from nanoinfer_engine.ops.cuda import products
from nanoinfer_engine.ops.cuda.attention import PagedAttention, PagedPlan
from nanoinfer_engine.ops.cuda.kernels.decode import AttentionShape, DecodeWorkspace
from nanoinfer_engine.ops.cuda.kernels.heads import HeadTransform
from nanoinfer_engine.ops.cuda.kernels.linear import GemvShape, TileShape, few_rows, gemv
from nanoinfer_engine.ops.cuda.kernels.norms import gate_mul
from nanoinfer_engine.ops.cuda.kernels.quantize import quantize_rows
from nanoinfer_engine.ops.cuda.products import FEW_ROWS, GEMV_SHAPES, ProductKind, TuningTable
from nanoinfer_engine.ops.kv_cache import KVCache
from nanoinfer_engine.ops.linear.fp8 import quantize_rows as quantize_weight
from nanoinfer_engine.ops.linear.fp8 import scaled_product
from nanoinfer_engine.step.runner import ModelRunner
from random_weights import SHAPES, RandomCheckpoint
from torch import Tensor

TABLES = Path(products.__file__).parent / "tables"
FORMATS = ("full", "fp8")
TUNED_BYTES = 256 << 20
CLOSE, BETTER = 1.25, 0.998
"""Ratios to the fastest: of shapes that are tried within a step, and of a step that is faster."""

CONTEXT = 768
"""Tokens at which attention is timed: the longest context that short and long chats share."""

TILE_SHAPES = (
    TileShape(16, 256, 1, 2, 4),
    TileShape(32, 128, 1, 4, 5),
    TileShape(32, 128, 2, 4, 5),
    TileShape(32, 128, 4, 4, 4),
    TileShape(64, 128, 1, 4, 4),
    TileShape(64, 128, 2, 4, 4),
    TileShape(64, 128, 4, 4, 3),
    TileShape(64, 64, 2, 4, 6),
    TileShape(128, 64, 1, 4, 4),
)
# of 8-bit weights a tile of as many bytes has twice the columns
WIDE_TILE_SHAPES = tuple(replace(shape, block_k=2 * shape.block_k) for shape in TILE_SHAPES)
ATTENTION_OF_FEW = tuple(
    AttentionShape(64, 4, 3, prefetch, programs)
    for prefetch in (True, False)
    for programs in (512, 1024, 2048)
)
ATTENTION_OF_MANY = tuple(
    AttentionShape(*shape, False, programs)
    for shape in ((64, 4, 4), (64, 4, 5), (32, 4, 5), (128, 8, 4))
    for programs in (512, 1024, 2048, 4096)
)
ATTENTION_ROWS = (1, 8, 32, 64, 128, 256)


def time_graph(run: Callable[[], object], repeats: int = 5) -> float:
    """Median microseconds of `run`, captured in a CUDA graph."""
    stream = _side_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    graph.replay()
    times: list[float] = []
    for _ in range(repeats):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        began.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended) * 1000)
    return float(statistics.median(times))


@cache
def _side_stream() -> torch.cuda.Stream:
    """One for all: what is freed is kept for the stream that it was taken on."""
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


def kinds(config: ModelConfig, formats: Sequence[str] = FORMATS) -> Iterator[ProductKind]:
    """The products of a model, in full precision and with 8-bit weights."""
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    hidden, inner = config.hidden_size, config.intermediate_size
    for scaled in (name == "fp8" for name in formats):
        yield ProductKind(heads, hidden, False, False, scaled)
        yield ProductKind(hidden, config.num_heads * config.head_dim, False, True, scaled)
        yield ProductKind(inner, hidden, True, False, scaled)
        yield ProductKind(hidden, inner, False, True, scaled)
        if not scaled:
            yield ProductKind(config.vocab_size, hidden, False, False, False)


Shape = GemvShape | TileShape | None
"""None is cuBLAS."""


def product_shapes(kind: ProductKind) -> dict[int, list[Shape]]:
    """Shapes for each number of rows: the fastest, then those that take little longer."""
    outputs = kind.outputs * (2 if kind.gated else 1)
    size = outputs * kind.inputs * (1 if kind.scaled else 2)
    weights, scale = [], None
    for _ in range(max(1, min(12, TUNED_BYTES // size + 1))):
        weight = torch.randn(outputs, kind.inputs, device="cuda", dtype=torch.float16) * 0.02
        if kind.scaled:
            weight, scales = quantize_weight(weight)
            scale = scales[:, 0].contiguous()
        weights.append(weight)
    ranked: dict[int, list[Shape]] = {}
    for rows in (1, *FEW_ROWS):
        x = torch.randn(rows, kind.inputs, device="cuda", dtype=torch.float16)
        candidates: list[Shape] = []
        if rows == 1:
            candidates += (shape for shape in GEMV_SHAPES if kind.fits(shape))
        else:
            tiles = TILE_SHAPES + (WIDE_TILE_SHAPES if kind.scaled else ())
            candidates += [None, *(shape for shape in tiles if kind.fits(shape))]
        times: dict[Shape, float] = {}
        for shape in candidates:
            try:
                times[shape] = _time_product(kind, weights, scale, x, shape)
            except Exception as error:  # a shape that this card cannot hold is no candidate
                print(f"# {kind} × {rows}: {shape}: {type(error).__name__}", file=sys.stderr)
        order = sorted(times, key=lambda shape: times[shape])
        ranked[rows] = [shape for shape in order if times[shape] < CLOSE * times[order[0]]]
        shown = " ".join(f"{times[shape]:.1f}" for shape in order[:3])
        print(f"# {kind} × {rows}: {order[0]} of {len(times)}: {shown} µs", flush=True)
    return ranked


def _time_product(
    kind: ProductKind,
    weights: Sequence[Tensor],
    scale: Tensor | None,
    x: Tensor,
    shape: Shape,
) -> float:
    """Median microseconds of one product, as `CudaOps` would launch it."""
    rows, residual = len(x), torch.zeros(len(x), kind.outputs, device="cuda", dtype=x.dtype)
    gain = torch.ones(kind.inputs, device="cuda", dtype=x.dtype)
    takes_norm = not kind.joins and kind.inputs <= 2048

    def run() -> None:
        for weight in weights:
            if isinstance(shape, GemvShape):
                gemv(
                    x, weight, residual, shape, scale=scale, gain=gain if takes_norm else None,
                    gated=kind.gated, residual=kind.joins, pdl=True,
                )  # fmt: skip
            elif shape is not None:
                dtype = torch.float32 if shape.splits > 1 else x.dtype
                parts = (shape.splits, rows, kind.outputs)
                output = torch.empty(parts, dtype=dtype, device=x.device)
                few_rows(x, weight, output, shape, scale=scale, gated=kind.gated, pdl=True)
            elif kind.joins and scale is None:
                torch.addmm(residual, x, weight.t(), out=residual)
            else:
                wide = (
                    torch.nn.functional.linear(x, weight)
                    if scale is None
                    else scaled_product(*quantize_rows(x, pdl=True), weight, scale)
                )
                if kind.gated:
                    gate_mul(wide, "silu", residual, pdl=True)

    return time_graph(run) / len(weights)


def attention_shapes(config: ModelConfig) -> dict[int, AttentionShape]:
    """The fastest shape of decode attention for each number of rows."""
    most, blocks = ATTENTION_ROWS[-1], -(-CONTEXT // 16)
    device = torch.device("cuda")
    few_layers = replace(config, num_layers=8, sliding_windows=(None,) * 8)
    cache_ = KVCache(few_layers, most * blocks, 16, torch.float16, device)
    workspace = DecodeWorkspace(
        most, config.num_heads, config.num_kv_heads, config.head_dim, device
    )
    tables = torch.arange(most * blocks, device=device, dtype=torch.int32).view(most, blocks)
    contexts = torch.full((most,), CONTEXT, device=device, dtype=torch.int32)
    rotary = torch.ones(CONTEXT + 1, 2, 1, config.head_dim, dtype=torch.float16, device=device)
    transform = HeadTransform(rotary, None, None, 1e-6)
    num_heads = config.num_heads + 2 * config.num_kv_heads
    qkv = torch.randn(most, num_heads, config.head_dim, dtype=torch.float16, device=device)
    first, second = config.num_heads, config.num_heads + config.num_kv_heads
    chosen: dict[int, AttentionShape] = {}
    for rows in ATTENTION_ROWS:
        plan, part = PagedPlan(rows, tables[:rows], contexts[:rows], None), qkv[:rows]
        heads = part[:, :first], part[:, first:second], part[:, second:]
        output = torch.empty((rows, *heads[0].shape[1:]), dtype=torch.float16, device=device)

        def time_shape(shape: AttentionShape, run: Callable[[PagedAttention], None]) -> float:
            windows = few_layers.sliding_windows
            attention = PagedAttention(cache_, windows, workspace, lambda _: shape)
            return time_graph(partial(run, attention)) / 8

        run = partial(_attend_all, heads, transform, plan, output)
        shapes = ATTENTION_OF_FEW if rows <= 16 else ATTENTION_OF_MANY
        times = {shape: time_shape(shape, run) for shape in shapes}
        chosen[rows] = min(times, key=lambda shape: times[shape])
        print(f"# attention × {rows}: {chosen[rows]}: {min(times.values()):.1f} µs", flush=True)
    return chosen


def refine(
    shape: str, table: TuningTable, ranked: Mapping[ProductKind, Mapping[int, Sequence[Shape]]]
) -> None:
    """Choose among close shapes by whole decode steps of a model; changes `table`."""
    config = EngineConfig(
        Path("random"), device="cuda", dtype="float16", kv_cache_bytes=8 << 30,
        max_model_len=2048, max_batch_requests=FEW_ROWS[-1], mixed_graphs=False,
    )  # fmt: skip
    runner = ModelRunner(config, checkpoint=RandomCheckpoint(SHAPES[shape], "cuda", torch.float16))
    steps = runner._steps
    if steps is None:
        raise RuntimeError("the kernels do not compute this model")
    steps._ops._table = table
    width = -(-CONTEXT // 16)
    greedy = SamplingOptions(0.0, 0, 1.0, 0.0, 0)

    def measure(rows: int) -> float:
        steps._ops._products.clear()
        made_up = [
            BatchRow((0,), CONTEXT - 1, tuple(range(row * width, (row + 1) * width)), True, greedy)
            for row in range(rows)
        ]
        for _ in range(4):  # every entry of the ring
            steps._buffers.fill(made_up, {}, {}, rows)
        return time_graph(partial(steps.run_decode, rows), 9)

    with torch.inference_mode():
        for rows in (1, *FEW_ROWS):
            least = first = measure(rows)
            for kind in kinds(SHAPES[shape]):
                chosen = table.products[kind]
                for candidate in ranked.get(kind, {}).get(rows, ())[1:]:
                    before, chosen[rows] = chosen[rows], candidate
                    if (taken := measure(rows)) < BETTER * least:
                        least = taken
                    else:
                        chosen[rows] = before
            print(f"# {shape} × {rows}: a step took {first:.0f}, takes {least:.0f} µs", flush=True)


def _attend_all(
    heads: tuple[Tensor, Tensor, Tensor],
    transform: HeadTransform,
    plan: PagedPlan,
    output: Tensor,
    attention: PagedAttention,
) -> None:
    for layer in range(8):
        attention.attend(layer, heads, transform, plan, output, pdl=len(output) <= 64)


def _one_line_each(content: Mapping[str, object]) -> str:
    """JSON with a line for each entry of a list, so that versions can be compared."""
    fields = []
    for name, value in content.items():
        if isinstance(value, list):
            lines = ",\n".join(f"  {json.dumps(entry)}" for entry in value)
            fields.append(f' "{name}": [\n{lines}\n ]')
        else:
            fields.append(f' "{name}": {json.dumps(value)}')
    return "{\n" + ",\n".join(fields) + "\n}\n"


def main(argv: Sequence[str]) -> int:
    """Measure what the table lacks, write it; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), default=["0.6b", "8b"])
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--again", action="store_true", help="measure known sizes again, too")
    parser.add_argument("--out", type=Path, default=TABLES)
    arguments = parser.parse_args(argv)
    card = torch.cuda.get_device_name()
    path = arguments.out / f"{card.lower().replace(' ', '-')}.json"
    table = TuningTable({}, {})
    if path.exists():
        table = products.table_from_json(read_object(path))
    for name in arguments.shapes:
        config = SHAPES[name]
        wanted = kinds(config, arguments.formats)
        lacking = [kind for kind in wanted if arguments.again or kind not in table.products]
        ranked = {kind: product_shapes(kind) for kind in lacking}
        for kind, shapes in ranked.items():
            table.products[kind] = {rows: order[0] for rows, order in shapes.items()}
        key = config.num_kv_heads, config.head_dim
        if key not in table.attention:
            table.attention[key] = attention_shapes(config)
        if ranked:
            refine(name, table, ranked)
        content = products.table_to_json(table)
        about = {"card": card, "torch": torch.__version__, "dtype": "float16"}
        path.write_text(_one_line_each({**about, **content}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
