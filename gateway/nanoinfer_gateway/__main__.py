"""Runs the gateway: `python -m nanoinfer_gateway --tokenizer HOST:PORT --engine HOST:PORT`."""

import sys
from collections.abc import Sequence
from functools import partial

from nanoinfer_common.config import parse_settings
from nanoinfer_common.server import serve

from nanoinfer_gateway.service import GatewayService
from nanoinfer_gateway.settings import GatewaySettings


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until told to stop; return the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    settings = parse_settings(GatewaySettings, arguments, "nanoinfer-gateway")
    return serve(partial(GatewayService, settings), settings)


if __name__ == "__main__":
    sys.exit(main())
