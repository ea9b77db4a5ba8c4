"""`python -m nanoinfer_engine --model DIR`: serve one model until SIGTERM."""

from __future__ import annotations

import os
import sys

# Read by the OpenMP runtime when torch loads it. Its threads spin at the end of each region; on a
# machine with a busy neighbour that turns a step of 3 ms into 200 ms, so they shall soon sleep.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from nanoinfer_common.config import parse_settings
from nanoinfer_common.server import ServiceStatus, StartError, serve

from nanoinfer_engine.core.batch import Runner
from nanoinfer_engine.core.config import EngineConfig
from nanoinfer_engine.core.progress import Progress
from nanoinfer_engine.parallel.peers import REFUSALS
from nanoinfer_engine.parallel.ranks import ParallelRunner
from nanoinfer_engine.server.service import EngineService
from nanoinfer_engine.server.settings import EngineSettings
from nanoinfer_engine.step.runner import ModelRunner


def main() -> int:
    """Parse the settings, serve, return the exit code."""
    settings = parse_settings(EngineSettings, sys.argv[1:], "nanoinfer-engine")
    return serve(lambda status: _service(settings, status), settings)


def _service(settings: EngineSettings, status: ServiceStatus) -> EngineService:
    model = settings.engine_config().model_path

    def lost(error: Exception) -> None:
        is_refusal = isinstance(error, REFUSALS)
        status.fail(StartError(f"{model}: {error}") if is_refusal else error)

    def load_runner(config: EngineConfig, progress: Progress) -> Runner:
        if config.tensor_parallel == 1:
            return ModelRunner(config, progress)
        return ParallelRunner(config, progress, lost=lost)

    return EngineService(settings, status, load_runner)


if __name__ == "__main__":
    sys.exit(main())
