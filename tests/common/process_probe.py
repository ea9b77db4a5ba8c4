"""A service process for the lifecycle tests: `python -m tests.common.process_probe FLAGS`."""

import asyncio
import sys
import time
from typing import Literal

from nanoinfer_common.config import ServiceSettings, parse_settings
from nanoinfer_common.errors import StartError
from nanoinfer_common.server import ServiceStatus, serve
from pydantic import Field

from tests.common.probe import ProbeService

Start = Literal["at once", "slow thread", "refused", "broken", "fails later"]


class Settings(ServiceSettings):
    start_mode: Start = Field("at once", description="How starting goes.")
    ignores_drain: bool = Field(False, description="Never finish the drain.")


class ProcessProbe(ProbeService):
    def __init__(self, status: ServiceStatus, settings: Settings) -> None:
        super().__init__(status)
        self.settings = settings

    async def start(self) -> None:
        match self.settings.start_mode:
            case "slow thread":
                await asyncio.to_thread(time.sleep, 300)
            case "refused":
                raise StartError("model.pt: holds no weights")
            case "broken":
                raise RuntimeError("a bug")
            case "fails later":
                loop = asyncio.get_running_loop()
                loop.call_later(0.3, lambda: self.status.fail(RuntimeError("device lost")))

    async def drain(self, seconds: float) -> None:
        if self.settings.ignores_drain:
            await asyncio.sleep(3600)


if __name__ == "__main__":
    chosen = parse_settings(Settings, sys.argv[1:], "nanoinfer-probe")
    sys.exit(serve(lambda status: ProcessProbe(status, chosen), chosen))
