"""One-line faults in the sources, each of which the tests named beside it must catch.

    python tests/mutations.py                       every fault
    python tests/mutations.py --sample 8 --turn 3   eight of them, others at another turn
    python tests/mutations.py 4 17                  these numbers; `--list` tells them

Faults are made in a temporary copy of the packages, which stands first on PYTHONPATH; the working
tree is only read. The chosen tests run without a fault first: they must pass there.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 900  # for the tests of one fault: a fault that lets them hang is caught, too

# The only places that name paths: what moves is changed here.
PACKAGES = (
    "clients/python/nanoinfer",
    "services/common/nanoinfer_common",
    "services/tokenizer/nanoinfer_tokenizer",
    "services/engine/nanoinfer_engine",
    "gateway/nanoinfer_gateway",
)
SOURCES = {
    "admission": "nanoinfer_gateway/core/admission.py",
    "blocks": "nanoinfer_engine/core/blocks.py",
    "cpus": "nanoinfer_engine/step/cpus.py",
    "decoder": "nanoinfer_common/detokenize.py",
    "engine service": "nanoinfer_engine/server/service.py",
    "field checks": "nanoinfer_common/field_checks.py",
    "in flight": "nanoinfer_engine/core/in_flight.py",
    "interceptors": "nanoinfer_common/interceptors.py",
    "messages": "nanoinfer_engine/server/messages.py",
    "penalties": "nanoinfer_engine/sampling/processors/penalties.py",
    "queue": "nanoinfer_engine/core/queue.py",
    "randomness": "nanoinfer_engine/sampling/randomness.py",
    "sampler": "nanoinfer_engine/sampling/sampler.py",
    "scheduler": "nanoinfer_engine/core/scheduler.py",
    "text": "nanoinfer_gateway/core/text.py",
    "validation": "nanoinfer_common/validation.py",
}
TESTS = {
    "admission": "tests/gateway/test_admission.py",
    "blocks": "tests/engine/control/test_blocks.py",
    "cpus": "tests/engine/compute/test_cpus.py",
    "interceptors": "tests/common/test_interceptors.py",
    "metrics": "tests/engine/control/test_metrics.py",
    "mixed steps": "tests/engine/control/test_mixed_steps.py",
    "prefix cache": "tests/engine/control/test_prefix_cache.py",
    "queue": "tests/engine/control/test_waiting.py",
    "randomness": "tests/engine/compute/test_randomness.py",
    "running ahead": "tests/engine/control/test_running_ahead.py",
    "sampler": "tests/engine/compute/test_sampler.py",
    "scheduler": "tests/engine/control/test_scheduler.py",
    "service": "tests/engine/control/test_service.py",
    "several": "tests/engine/control/test_several_tokens.py",
    "shaping": "tests/engine/compute/test_shaping.py",
    "text": "tests/gateway/test_text.py",
    "validation": "tests/common/test_validation.py",
}


class Fault(NamedTuple):
    """Replace `old`, which stands once in the source, by `new`; `tests` must then fail.

    `tests` is a file of the table, or one test of it: `file::name`.
    """

    source: str
    old: str
    new: str
    tests: str


FAULTS = (
    # whose turn it is
    Fault(
        "queue",
        "has_not_run = request.times.scheduled is None",
        "has_not_run = False",
        "queue::test_a_request_that_ran_before_starts_before_fairness_is_asked",
    ),
    Fault(
        "queue",
        "= max(level, served)",
        "= served",
        "queue::test_the_level_of_newcomers_does_not_fall_when_one_with_less_is_served",
    ),
    Fault("queue", "= max(self._served.get(key, 0), level)", "= self._served.get(key, 0)", "queue"),
    Fault("queue", "return (-request.priority,", "return (request.priority,", "queue"),
    Fault("queue", "self._served.get(request.line, 0) + num_tokens", "num_tokens", "queue"),
    # who runs
    Fault(
        "in flight",
        "request.num_in_flight_tokens = request.num_unread_tokens = 0",
        "request.num_in_flight_tokens = 0",
        "running ahead::test_a_step_may_be_lost_at_any_moment_under_preemption",
    ),
    Fault(
        "scheduler",
        "victim = max(self._running, key=ORDER)",
        "victim = min(self._running, key=ORDER)",
        "scheduler",
    ),
    Fault(
        "scheduler",
        "self._waiting.charge(request, len(request.completion_token_ids) - num_before)",
        "pass",
        "queue",
    ),
    Fault(
        "in flight",
        "step[request] = 0",
        "pass",
        "running ahead::test_random_loads_under_memory_pressure",
    ),
    Fault(
        "in flight",
        "request.num_computed_tokens = request.num_in_flight_tokens = 0",
        "request.num_computed_tokens = 0",
        "running ahead::test_random_loads_under_memory_pressure",
    ),
    Fault(
        "scheduler",
        "and times.arrived < oldest and request.index == 0:",
        "and times.arrived < oldest:",
        "scheduler",
    ),
    Fault("scheduler", "sum(self.grants.values()), 0)", "0, 0)", "mixed steps"),
    Fault(
        "scheduler",
        "elif request.num_pending_tokens and request.wants_more:",
        "elif request.num_pending_tokens:",
        "running ahead::test_decoding_goes_on_from_ids_that_nobody_has_read",
    ),
    Fault(
        "scheduler",
        "samples = stop == num_known + num_unread",
        "samples = stop == num_known",
        "running ahead::test_random_loads_under_memory_pressure",
    ),
    Fault(
        "scheduler",
        "if not request.may_be_planned:",
        "if False:",
        "running ahead::test_a_request_that_declines_waits_and_the_others_run_ahead",
    ),
    Fault(
        "scheduler", "if not request.is_decoding:", "if request.num_pending_tokens > 1:", "several"
    ),
    Fault("scheduler", "if len(result) > 1 and request.num_unread_tokens:", "if False:", "several"),
    Fault(
        "messages",
        "seed=(seed + index) % 2**64)",
        "seed=seed)",
        "service::test_several_completions_use_consecutive_seeds_in_one_stream",
    ),
    # who has which block
    Fault("blocks", "in reversed(block_ids):", "in block_ids:", "blocks"),
    Fault("blocks", "popitem(last=False)", "popitem(last=True)", "blocks"),
    Fault(
        "blocks",
        "not in self._names and name not in",
        "not in self._names or name not in",
        "blocks",
    ),
    Fault("blocks", "self._num_users[block_id] += 1", "self._num_users[block_id] = 1", "blocks"),
    Fault(
        "blocks",
        "num_blocks = (request.num_tokens - 1) // self._block_size",
        "num_blocks = request.num_tokens // self._block_size",
        "prefix cache::test_the_last_token_is_always_computed",
    ),
    Fault(
        "blocks",
        'b"tenant\\0" + request.tenant.encode()',
        'b"tenant\\0"',
        "prefix cache::test_salts_and_tenants_keep_apart",
    ),
    # which id is drawn
    Fault(
        "randomness",
        "_splitmix64(seeds) ^ prompts)",
        "_splitmix64(seeds))",
        "randomness::test_one_seed_draws_as_widely_over_prompts_as_over_seeds",
    ),
    Fault(
        "randomness",
        "^ positions)",
        "^ np.uint64(1))",
        "randomness::test_ids_are_drawn_evenly_along_each_axis_and_neighbours_are_independent",
    ),
    Fault(
        "randomness",
        "uniform += np.float32(0.5)",
        "uniform += np.float32(0)",
        "randomness::test_numbers_are_finite_and_exact_at_the_ends_of_the_hash",
    ),
    Fault(
        "randomness",
        "_BELOW_ONE = np.float32(1 - 2**-24)",
        "_BELOW_ONE = 1",
        "randomness::test_numbers_are_finite_and_exact_at_the_ends_of_the_hash",
    ),
    Fault(
        "sampler", "scaled < threshold, 0)", "scaled <= threshold, 0)", "sampler::test_distribution"
    ),
    Fault(
        "sampler",
        "(cumulative < shares * totals)",
        "(cumulative < totals)",
        "sampler::test_distribution",
    ),
    Fault("sampler", "math.log(each.min_p) if", "each.min_p if", "sampler::test_distribution"),
    Fault(
        "penalties",
        "values * repetition, values / repetition)",
        "values / repetition, values * repetition)",
        "shaping",
    ),
    Fault("penalties", "presence * (times > 0)", "presence", "shaping"),
    # stop strings and UTF-8
    Fault("text", "free = len(joined) - node.depth", "free = len(joined)", "text"),
    Fault("text", "child.match or child.fallback.match", "child.match", "text"),
    Fault(
        "text", "joined[: end - len(node.match)], node.match", "joined[:end], node.match", "text"
    ),
    Fault(
        "text", "self.num_tokens >= self._min_tokens", "self.num_tokens > self._min_tokens", "text"
    ),
    Fault("decoder", '("utf-8")("replace")', '("utf-8")("ignore")', "text"),
    Fault("decoder", 'decode(b"", final=True)', 'decode(b"")', "text"),
    Fault("decoder", "for i in token_ids if i < size", "for i in token_ids if i <= size", "text"),
    # who gets in
    Fault("admission", "self._tenants[wanted.tenant] >= quota", "quota < 0", "admission"),
    Fault("admission", "self._count(held, -1)", "self._count(held, 0)", "admission"),
    Fault("admission", "held.num_tokens = num_tokens", "pass", "admission"),
    Fault("admission", "self.num_requests >= bounds", "self.num_requests > bounds", "admission"),
    # how calls end, and what is valid
    Fault(
        "interceptors",
        "if limit != given and not is_watch(self.method):",
        "if limit != given:",
        "interceptors::test_watches_health_and_reflection_make_no_spans_and_get_no_deadline",
    ),
    Fault(
        "interceptors",
        "remaining <= DEADLINE_SLACK_SECONDS",
        "False",
        "interceptors::test_client_deadline",
    ),
    Fault(
        "engine service",
        "if proto.cancels_at_stop_strings and all_began:",
        "if proto.cancels_at_stop_strings:",
        "metrics::test_no_stop_string_ends_a_call_before_its_first_token",
    ),
    Fault(
        "engine service",
        "if deadline is not None and time",
        "if False and time",
        "metrics::test_a_clients_deadline_is_no_cancel",
    ),
    Fault("field checks", ") and value <= self.high", ") and value < self.high", "validation"),
    Fault("field checks", "max(ids) >= size:", "max(ids) > size:", "validation"),
    Fault("validation", "if len(given) > 1:", "if len(given) > 2:", "validation"),
    Fault("validation", "len(ids) >= longest:", "len(ids) > longest:", "validation"),
    Fault("cpus", "quota = min([quota, *_version_2(mounts, path)])", "pass", "cpus"),
)


def test_id(fault: Fault) -> str:
    """The tests of a fault as pytest takes them."""
    name, colons, test = fault.tests.partition("::")
    return TESTS[name] + colons + test


class FaultError(Exception):
    """A fault that cannot be made, or tests that say nothing about it."""


def changed(content: str, fault: Fault) -> str:
    """The content with the fault; raises FaultError unless `old` stands in it exactly once."""
    count = content.count(fault.old)
    if count != 1:
        raise FaultError(f"{SOURCES[fault.source]} has {count} times: {fault.old}")
    return content.replace(fault.old, fault.new)


def chosen(sample: int | None, turn: int, numbers: Sequence[int]) -> list[int]:
    """Numbers of the faults to make; a sample is spread over the list, and turns go through it."""
    if numbers:
        return list(numbers)
    if sample is None:
        return list(range(len(FAULTS)))
    stride = max(len(FAULTS) // sample, 1)
    return list(range(turn % stride, len(FAULTS), stride))[:sample]


def is_caught(folder: Path, tests: Sequence[str]) -> bool:
    """Whether tests fail with the packages in `folder`; raises FaultError if they cannot run."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    command += ["-m", "not slow and not gpu", *tests]
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HYPOTHESIS_STORAGE_DIRECTORY": str(folder / "hypothesis"),
    }
    try:
        ended = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        return True
    if ended.returncode not in (0, 1):
        raise FaultError(f"the tests do not run:\n{ended.stdout[-3000:]}{ended.stderr[-3000:]}")
    return ended.returncode == 1


def copy_packages(folder: Path) -> None:
    """Copy every package into `folder`, and check that it is found there before the tree's own."""
    for package in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, folder / Path(package).name, ignore=ignored)
    for package in PACKAGES:
        name = Path(package).name
        found = subprocess.run(
            [sys.executable, "-c", f"import {name}; print({name}.__file__)"],
            env={**os.environ, "PYTHONPATH": str(folder)},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        if folder not in Path(found).parents:
            raise FaultError(f"{name} is imported from {found}, not from the copy")


def run(numbers: Sequence[int]) -> list[int]:
    """Make each fault and run its tests; returns the faults that survive."""
    survivors = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        copy_packages(folder)
        tests = sorted({test_id(FAULTS[number]) for number in numbers})
        if is_caught(folder, tests):
            raise FaultError(f"without any fault these do not pass: {' '.join(tests)}")
        for number in numbers:
            fault, began = FAULTS[number], time.monotonic()
            source = folder / SOURCES[fault.source]
            right = source.read_text()
            source.write_text(changed(right, fault))
            try:
                caught = is_caught(folder, [test_id(fault)])
            finally:
                source.write_text(right)
            survivors += [] if caught else [number]
            verdict = "caught  " if caught else "SURVIVES"
            print(
                f"{number:3} {verdict} {time.monotonic() - began:5.1f} s  {told(fault)}", flush=True
            )
    return survivors


def told(fault: Fault) -> str:
    """The fault in a line."""
    return f"{SOURCES[fault.source]}: {fault.old}  →  {fault.new}"


def main() -> int:
    """Parse the arguments and run; 0 if every fault is caught."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("numbers", type=int, nargs="*", help="faults to make, by number")
    parser.add_argument("--sample", type=int, help="how many to make, spread over the list")
    parser.add_argument("--turn", type=int, default=0, help="which sample: a number that changes")
    parser.add_argument("--list", action="store_true", help="tell the faults, make none")
    options = parser.parse_args()
    if options.list:
        for number, fault in enumerate(FAULTS):
            print(f"{number:3} {told(fault)}")
        return 0
    numbers = chosen(options.sample, options.turn, options.numbers)
    survivors = run(numbers)
    print(f"{len(numbers) - len(survivors)} of {len(numbers)} faults are caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
