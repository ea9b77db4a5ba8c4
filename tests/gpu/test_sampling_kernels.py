"""Device sampling against the host sampler: the same filters, the same random numbers."""

from __future__ import annotations

import pytest
import torch
from nanoinfer_engine.core.batch import BatchRow
from nanoinfer_engine.core.request import SamplingOptions
from nanoinfer_engine.sampling.sampler import sample

sampling = pytest.importorskip("nanoinfer_engine.ops.cuda.kernels.sampling")
device_inputs = pytest.importorskip("nanoinfer_engine.step.device_inputs")

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
        BatchRow((0,), position, (0,), True, options, prompt_key=position << 40)
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
    # float32 sums on the device: top-p may end one id earlier or later, which is seldom the drawn
    different = [i for i, pair in enumerate(zip(ids, expected, strict=True)) if pair[0] != pair[1]]
    assert all(rows[i].sampling.top_p < 1 for i in different)
    assert len(different) <= len(rows) // 200
    assert len(set(ids)) > len(rows) // 4


def test_the_noise_is_the_hosts_bit_by_bit_but_for_logarithms(device: torch.device) -> None:
    """Where all logits are equal the largest of 5,003 numbers wins, whatever it is close to."""
    rows = [
        BatchRow((0,), position, (0,), True, SamplingOptions(1.0, top_k, 1.0, 0.0, 2**64 - 1 - key))
        for position in (0, 1, 77, 2**20)
        for key in (0, 1, 2**63)
        for top_k in (0, 5002)  # in the first kernel, and behind a filter that drops nothing
    ]
    logits = torch.zeros(len(rows), 5003, dtype=torch.float16)
    workspace = sampling.SamplingWorkspace(len(rows), 5003, device)
    sampled = torch.zeros(len(rows), dtype=torch.int32, device=device)
    sampling.choose(logits.to(device), device_sampling(rows, device), workspace, sampled)
    assert sampled.tolist() == [result.token_id for result in sample(logits, rows)]


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
