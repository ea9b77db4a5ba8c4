"""Device sampling against the host sampler: the same filters, the same uniform numbers."""

from __future__ import annotations

import pytest
import torch
from nanoinfer_engine.batch import BatchRow
from nanoinfer_engine.request import SamplingOptions
from nanoinfer_engine.sampler import sample

sampling = pytest.importorskip("nanoinfer_engine.kernels.sampling")
device_inputs = pytest.importorskip("nanoinfer_engine.device_inputs")

pytestmark = pytest.mark.gpu

OPTIONS = [
    SamplingOptions(0.0, 0, 1.0, 0.0, 1),
    SamplingOptions(1.0, 0, 1.0, 0.0, 2),
    SamplingOptions(0.6, 0, 1.0, 0.0, 3),
    SamplingOptions(1.3, 20, 1.0, 0.0, 4),
    SamplingOptions(0.8, 0, 0.9, 0.0, 5),
    SamplingOptions(1.0, 50, 0.8, 0.0, 6),
    SamplingOptions(1.0, 0, 1.0, 0.05, 7),
    SamplingOptions(0.7, 40, 0.95, 0.02, 8),
    SamplingOptions(1.0, 1, 1.0, 0.0, 9),
    SamplingOptions(2.0, 5000, 0.5, 0.0, 10),
]


def device_sampling(
    rows: list[BatchRow], device: torch.device, slots: dict[int, int] | None = None
) -> sampling.DeviceSampling:
    fields = device_inputs.sampling_arrays(rows, slots or {})
    return device_inputs.device_sampling(torch.from_numpy(fields).to(device))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [8192, 5003])
def test_same_ids_as_on_the_host(vocab_size: int, dtype: torch.dtype, device: torch.device) -> None:
    repeats = 40 if device.type == "cuda" else 2
    rows = [
        BatchRow((0,), position, (0,), True, options)
        for position in range(repeats)
        for options in OPTIONS
    ]
    generator = torch.Generator().manual_seed(vocab_size)
    logits = (torch.randn(len(rows), vocab_size, generator=generator) * 2.5).to(dtype)
    expected = [result.token_id for result in sample(logits, rows)]
    workspace = sampling.SamplingWorkspace(len(rows), vocab_size, device)
    sampled = torch.full((len(rows),), -7, dtype=torch.int32, device=device)
    sampling.choose(logits.to(device), device_sampling(rows, device), workspace, sampled)
    ids = sampled.tolist()
    greedy = [i for i, row in enumerate(rows) if row.sampling.temperature == 0]
    assert [ids[i] for i in greedy] == [expected[i] for i in greedy]
    # float32 sums on the device: a uniform number may fall on the other side of a border
    different = sum(a != b for a, b in zip(ids, expected, strict=True))
    assert different <= max(len(rows) // 100, 1), different
    assert len(set(ids)) > len(rows) // 4


# the interpreter warns of infinity - infinity, which the kernel leaves out afterwards
@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_row_that_is_not_finite_is_marked_alone(device: torch.device) -> None:
    logits = torch.randn(4, 5003, dtype=torch.float32).half()
    logits[1, 4000] = float("nan")
    logits[2] = float("-inf")
    rows = [BatchRow((0,), 3, (0,), True, OPTIONS[2]) for _ in range(4)]
    workspace = sampling.SamplingWorkspace(4, 5003, device)
    sampled = torch.zeros(4, dtype=torch.int32, device=device)
    sampling.choose(logits.to(device), device_sampling(rows, device), workspace, sampled)
    ids = sampled.tolist()
    assert ids[1] == ids[2] == -1
    assert ids[0] >= 0
    assert ids[3] >= 0
