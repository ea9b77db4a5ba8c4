"""The slots of shaped rows: at every launch the tables hold what the host would shape with.

The machine runs the scheduler over a runner that keeps the tables as the kernels do, one step
ahead of the results, with preemptions, cancels, lost steps and fewer slots than requests.
"""

from __future__ import annotations

import dataclasses
import math
from array import array
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from nanoinfer_engine.core.batch import Batch, BatchRow
from nanoinfer_engine.core.capacity import Capacity
from nanoinfer_engine.core.errors import SamplingError
from nanoinfer_engine.core.pipeline import Pipeline
from nanoinfer_engine.core.request import Request, SamplingOptions, TokenCounts
from nanoinfer_engine.core.scheduler import Scheduler
from nanoinfer_engine.sampling.device_shaping import ShapingSlots
from nanoinfer_engine.sampling.processors import may_run_ahead
from nanoinfer_engine.sampling.shaping import shape

from tests.engine.control.test_running_ahead import AheadRunner, LateStep
from tests.engine.fakes import GREEDY, VOCAB_SIZE, make_config, make_request

MAX_ROWS = 3
OPTIONS: list[dict[str, object]] = [
    {},
    {"repetition_penalty": 1.3},
    {"presence_penalty": 0.5, "logit_bias": ((4, 2.0), (17, -1.0))},
    {"logit_bias": ((900, 1.0),)},
    {"extensions": (("no_repeat_ngram_size", 1),)},
    {"extensions": (("no_repeat_ngram_size", 2),), "frequency_penalty": 0.4},
    {"allowed_token_ids": array("q", [40, 50, 60, 50]), "logit_bias": ((50, 3.0),)},
]


def shaped_as_kernels_do(logits: torch.Tensor, row: BatchRow, counts: torch.Tensor) -> torch.Tensor:
    """Penalties as `kernels.shaping` has them, in plain PyTorch."""
    options = row.sampling
    repeated = torch.where(
        logits < 0, logits * options.repetition_penalty, logits / options.repetition_penalty
    )
    times = counts >> 1
    repeated -= options.frequency_penalty * times + options.presence_penalty * (times > 0)
    return torch.where(counts > 0, repeated.clamp(-1e30, 1e30), logits)


class Tables:
    """Slots over tables that are kept as the kernels do."""

    def __init__(self, num_slots: int, vocab_size: int = VOCAB_SIZE) -> None:
        self.counts = torch.full((num_slots, vocab_size), 99, dtype=torch.int32)
        self.bias = torch.full((num_slots, vocab_size), 99.0)
        self.slots = ShapingSlots(self.counts, self.bias)
        self.sampled = torch.zeros(num_slots, dtype=torch.int32)
        self.logits = torch.randn(vocab_size, generator=torch.Generator().manual_seed(3))

    def shaped(self, row: BatchRow, slot: int) -> torch.Tensor:
        """The logits as the kernels would shape them."""
        values = shaped_as_kernels_do(self.logits.clone(), row, self.counts[slot])
        return values + self.bias[slot]

    def expected(self, row: BatchRow, token_ids: Sequence[int]) -> torch.Tensor:
        """As the host shapes them, `token_ids` having come after what the row's counts know."""
        counts = row.token_counts
        if counts is not None:
            known, counts = counts, TokenCounts(counts.token_ids)
            for token_id, times in zip(known.token_ids, known.counts, strict=True):
                for _ in range(times):
                    counts.add(token_id)
            for token_id in token_ids:
                counts.add(token_id)
        return shape(self.logits.unsqueeze(0), [row._replace(token_counts=counts)])[0]

    def count(self, slot: int, token_id: int) -> None:
        self.counts[slot, token_id] += 2


class TablesRunner(AheadRunner):
    """Checks the tables at each launch, and counts what is sampled."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks)
        self.tables = Tables(MAX_ROWS)
        self.places: dict[int, int] = {}
        self.num_checked = self.num_written = 0

    def launch(self, batch: Batch) -> LateStep:
        tables, places = self.tables, self.places
        slots, failed = tables.slots.place(batch.rows, places, tables.sampled)
        assert not failed
        for index, row in enumerate(batch.rows):
            wanted = row.samples and (row.masked_token_ids or row.sampling.shapes_logits)
            assert (index in slots) == bool(wanted)
        assert len(set(slots.values())) == len(slots)
        for index, slot in slots.items():
            row = batch.rows[index]
            unread = [] if row.source_row is None else [int(tables.sampled[places[row.source_row]])]
            assert torch.allclose(tables.shaped(row, slot), tables.expected(row, unread))
            self.num_checked += 1
        step = super().launch(batch)
        self.places = {}
        for index, result in enumerate(step.row_results):
            if batch.rows[index].samples:
                place = self.places[index] = len(self.places)
                tables.sampled[place] = result[0].token_id  # type: ignore[index]
                if index in slots:
                    tables.count(slots[index], int(tables.sampled[place]))
        return step


class ShapingMachine(RuleBasedStateMachine):
    @initialize(num_blocks=st.integers(8, 14), prefix_caching=st.booleans())
    def start(self, num_blocks: int, prefix_caching: bool) -> None:
        self.runner = TablesRunner(num_blocks)
        config = make_config(
            max_batch_requests=MAX_ROWS, max_waiting_requests=99, prefix_caching=prefix_caching
        )
        self.scheduler = Scheduler(config, Capacity(256, 4 * num_blocks))
        self.pipeline = Pipeline(self.runner)
        self.requests: list[Request] = []

    @rule(
        kind=st.sampled_from(OPTIONS),
        prompt=st.lists(st.integers(10, 99), min_size=1, max_size=12),
        max_tokens=st.integers(1, 12),
        min_tokens=st.integers(0, 4),
        priority=st.integers(0, 1),
    )
    def add(
        self,
        kind: dict[str, object],
        prompt: list[int],
        max_tokens: int,
        min_tokens: int,
        priority: int,
    ) -> None:
        request = make_request(
            prompt, max_tokens, min_tokens=min(min_tokens, max_tokens), priority=priority
        )
        request.sampling = dataclasses.replace(GREEDY, **kind)  # type: ignore[arg-type]
        request.__post_init__()
        request.may_run_ahead = may_run_ahead(request.sampling)
        self.requests.append(request)
        self.scheduler.add(request)

    @rule(num_steps=st.integers(1, 5))
    def step(self, num_steps: int) -> None:
        for _ in range(num_steps):
            step = self.pipeline.advance(self.scheduler.schedule())
            if step is not None:
                self.scheduler.update(step.batch, step.results)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.scheduler.cancel(data.draw(st.sampled_from(self.requests)))

    @precondition(lambda self: self.scheduler.has_work)
    @rule()
    def lose_a_step(self) -> None:
        """The next one fails after its slots are ready, and the one in flight is lost with it."""
        self.runner.fail_step = MemoryError()
        try:
            self.step(1)
        except MemoryError:
            if not self.scheduler.retry_smaller():
                self.scheduler.fail_running(MemoryError())
        self.runner.fail_step = None

    def teardown(self) -> None:
        if not hasattr(self, "runner"):
            return
        for _ in range(2000):
            if not (self.scheduler.has_work or self.pipeline.is_busy):
                break
            self.step(1)
        assert not self.scheduler.has_work
        for request in self.requests:
            counts = request.token_counts
            if counts is not None:
                seen = Counter(request.completion_token_ids)
                assert list(counts.counts) == [seen[each] for each in counts.token_ids]


TestShapingMachine = ShapingMachine.TestCase
TestShapingMachine.settings = settings(
    max_examples=60,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def make_row(number: int, masked: Sequence[int] = (), **options: object) -> BatchRow:
    sampling = dataclasses.replace(GREEDY, **options)  # type: ignore[arg-type]
    counts = TokenCounts([1, 2]) if sampling.has_penalties else None
    return BatchRow((0,), 3, (0,), True, sampling, frozenset(masked), counts, request_number=number)


def test_a_request_that_goes_on_writes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = Tables(2)
    row = make_row(7, masked=[5], presence_penalty=1.0)
    assert row.token_counts is not None
    (slot,) = tables.slots.place([row], {}, tables.sampled)[0].values()
    monkeypatch.setattr(ShapingSlots, "_write", None)
    for token_id in (11, 12, 13):
        tables.count(slot, token_id)
        row.token_counts.add(token_id)
        assert tables.slots.place([row], {}, tables.sampled)[0] == {0: slot}
    ahead = row._replace(token_ids=(), source_row=0)
    assert tables.slots.place([ahead], {0: 0}, tables.sampled)[0] == {0: slot}


def test_an_id_that_only_the_device_knows_is_counted_there() -> None:
    tables = Tables(1)
    first, other = make_row(1, presence_penalty=1.0), make_row(2, presence_penalty=1.0)
    tables.slots.place([first], {}, tables.sampled)
    tables.slots.place([other], {}, tables.sampled)  # takes the only slot
    tables.sampled[0] = 44
    ahead = first._replace(token_ids=(), source_row=3)
    slots, _ = tables.slots.place([ahead], {3: 0}, tables.sampled)
    assert torch.allclose(tables.shaped(ahead, slots[0]), tables.expected(ahead, [44]))
    assert int(tables.counts[0, 44]) == 2


def test_the_least_recently_used_slot_is_given_up() -> None:
    tables = Tables(2)
    rows = [make_row(number, presence_penalty=1.0) for number in range(3)]
    slot = tables.slots.place([rows[0]], {}, tables.sampled)[0][0]
    tables.slots.place([rows[1]], {}, tables.sampled)
    # the oldest is needed by this very step, though its newcomer stands first
    slots, _ = tables.slots.place([rows[2], rows[0]], {}, tables.sampled)
    assert slots[1] == slot
    assert slots[0] != slot


@pytest.mark.parametrize(
    "hostile",
    [
        make_row(1, logit_bias=((VOCAB_SIZE, 1.0),)),
        make_row(1, logit_bias=((-1, 1.0),)),
        make_row(1, allowed_token_ids=array("q", [VOCAB_SIZE + 3])),
        make_row(1, masked=[VOCAB_SIZE]),
        make_row(1, repetition_penalty=1.1)._replace(token_counts=TokenCounts([10**9])),
    ],
)
def test_a_hostile_row_fails_alone(hostile: BatchRow) -> None:
    tables = Tables(3)
    rows = [make_row(0, masked=[4]), hostile, make_row(2, frequency_penalty=0.5)]
    slots, failed = tables.slots.place(rows, {}, tables.sampled)
    assert list(slots) == [0, 2]
    assert list(failed) == [1]
    assert isinstance(failed[1], SamplingError)
    for index, slot in slots.items():
        assert torch.allclose(tables.shaped(rows[index], slot), tables.expected(rows[index], []))


def test_bias_allowed_ids_and_masks_are_those_of_the_host() -> None:
    tables = Tables(1)
    row = make_row(
        1,
        masked=[3],
        logit_bias=((0, 10.0), (3, 100.0), (9, 100.0)),
        allowed_token_ids=array("q", [0, 1, 2, 3, 3]),
    )
    slots, _ = tables.slots.place([row], {}, tables.sampled)
    shaped = tables.shaped(row, slots[0])
    assert torch.allclose(shaped, tables.expected(row, []))
    assert int(torch.isfinite(shaped).sum()) == 3
    free = row._replace(masked_token_ids=frozenset())
    slots, _ = tables.slots.place([free], {}, tables.sampled)
    assert float(tables.bias[slots[0], 3]) == 100.0
    assert float(tables.bias[slots[0], 9]) == -math.inf


def test_plain_rows_and_rows_that_do_not_sample_take_no_slot() -> None:
    tables = Tables(1)
    silent = make_row(1, presence_penalty=1.0)._replace(samples=False)
    plain = make_row(2)._replace(sampling=SamplingOptions(1.0, 5, 0.9, 0.1, 3))
    assert tables.slots.place([silent, plain], {}, tables.sampled) == ({}, {})
    assert bool((tables.counts == 99).all())
