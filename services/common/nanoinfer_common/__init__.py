"""How to be a service here: lifecycle, telemetry, configuration, errors, validation."""

import os

# gRPC's core writes lines of its own to stderr, past the log: they are no JSON, and wait for a pipe
# that nobody reads. Read when gRPC is loaded, so set here, before it is.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
