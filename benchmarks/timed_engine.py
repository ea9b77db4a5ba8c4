"""The engine service on a device that only takes time: what its host can do, without a GPU.

    python benchmarks/serving.py --shape 0.6b --device timed --streams 1 64 256

A step takes the time of one of Qwen3-0.6B on an H200, and its launch the host's time there, with
the interpreter held (`benchmarks/results/engine-2026-11.md`). All else is the service as it is.
Tokens are made up: every one has the same id.
"""

from __future__ import annotations

import gc
import sys
import time

from nanoinfer_common.config import parse_settings
from nanoinfer_common.server import serve
from nanoinfer_engine.core.batch import Batch, RowResult, StepTiming
from nanoinfer_engine.core.config import EngineConfig
from nanoinfer_engine.core.request import SampledToken
from nanoinfer_engine.server.service import EngineService
from nanoinfer_engine.server.settings import EngineSettings
from random_weights import SHAPES

# seconds of a step, of each decode row and of each prompt token in it: from scenarios a and c, and
# from what steps of 80 and of 2,064 tokens take
STEP, ROW, PROMPT_TOKEN = 0.8e-3, 21e-6, 1.6e-6
# seconds of its launch, and of each row in that: about what a sampling profiler saw there
LAUNCH, LAUNCH_ROW = 0.3e-3, 6e-6
TOKEN = SampledToken(1000)


class TimedStep:
    """A step of `busy` seconds that ends at `end`, by the clock of `time.perf_counter`."""

    def __init__(self, results: list[RowResult], busy: float, idle: float, end: float) -> None:
        self._results, self._busy, self._idle, self._end = results, busy, idle, end
        self._waited = 0.0

    def results(self) -> list[RowResult]:
        """Wait until the device would be done."""
        self._waited = max(self._end - time.perf_counter(), 0.0)
        time.sleep(self._waited)
        return self._results

    def timing(self) -> StepTiming:
        """Times that a device would have measured."""
        return StepTiming("graph", self._busy, self._idle, self._waited)


class TimedRunner:
    """A `nanoinfer_engine.core.batch.Runner` that computes nothing."""

    model_config = SHAPES["0.6b"]
    vocab_size = model_config.vocab_size
    num_parameters = 0
    num_blocks = 1 << 16
    weights_fingerprint = "00" * 32
    number_format = "float16"
    runs_ahead = True

    def __init__(self, config: EngineConfig) -> None:
        self.block_size = config.block_size
        self.max_model_len = config.max_model_len or 8192
        self._free_at = 0.0  # when the device will have run what was launched

    def warm_up(self) -> float:
        """As on a GPU: a full collection would stop the steps for a tenth of a second or two."""
        gc.collect()
        gc.freeze()
        return 0.0

    def launch(self, batch: Batch) -> TimedStep:
        """Hold the interpreter as long as a launch does; the step follows those before."""
        rows = batch.rows
        launched = time.perf_counter() + LAUNCH + LAUNCH_ROW * len(rows)
        num_decodes = sum(row.num_tokens == 1 for row in rows)
        busy = STEP + ROW * num_decodes + PROMPT_TOKEN * (batch.num_tokens - num_decodes)
        results: list[RowResult] = [(TOKEN,) if row.samples else () for row in rows]
        while time.perf_counter() < launched:
            pass
        began = max(launched, self._free_at)
        idle, self._free_at = began - self._free_at, began + busy
        return TimedStep(results, busy, idle, self._free_at)


def main() -> int:
    """Serve until SIGTERM."""
    settings = parse_settings(EngineSettings, sys.argv[1:], "nanoinfer-engine")
    return serve(
        lambda status: EngineService(settings, status, lambda config, _: TimedRunner(config)),
        settings,
    )


if __name__ == "__main__":
    sys.exit(main())
