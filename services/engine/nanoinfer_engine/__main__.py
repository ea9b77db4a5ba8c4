"""`python -m nanoinfer_engine --model DIR`: serve one model until SIGTERM."""

from __future__ import annotations

import os
import sys

# Read by the OpenMP runtime when torch loads it. Its threads spin at the end of each region; on a
# machine with a busy neighbour that turns a step of 3 ms into 200 ms, so they shall soon sleep.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from nanoinfer_common.config import parse_settings
from nanoinfer_common.server import serve

from nanoinfer_engine.runner import ModelRunner
from nanoinfer_engine.service import EngineService
from nanoinfer_engine.settings import EngineSettings


def main() -> int:
    """Parse the settings, serve, return the exit code."""
    settings = parse_settings(EngineSettings, sys.argv[1:], "nanoinfer-engine")
    return serve(lambda status: EngineService(settings, status, ModelRunner), settings)


if __name__ == "__main__":
    sys.exit(main())
