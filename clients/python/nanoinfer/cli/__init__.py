"""The command line, `nanoinfer VERB`.

Exit codes: 0 success, 1 error, 2 usage, 3 unavailable, 4 invalid request (unknown model, missing
feature and a message beyond the limits included), 5 overloaded, 124 deadline exceeded, 130
interrupted, 143 terminated.
"""

import os
import sys
from importlib import import_module

_EXTRA = ("typer", "rich")


def main() -> None:
    """Runs the command line; without the packages of the `cli` extra it says so."""
    # gRPC's core would write lines of its own into answers. Read when gRPC is loaded, so set here.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        app = import_module("nanoinfer.cli.app").app
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA:
            raise
        sys.exit("nanoinfer: the command line needs an extra: pip install 'nanoinfer[cli]'")
    app(prog_name="nanoinfer")
