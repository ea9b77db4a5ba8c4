"""Environment variables that the services of `up` inherit, and those that are refused."""

import os
from collections.abc import Iterator
from importlib import import_module

import typer

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
# flags of `up` that it reads itself
_FLAGS = {"HOST", "PORT", "METRICS_PORT", "LOG_LEVEL"}
# what it tells the services by flags of theirs, because it starts and connects them
_OWN = {"PORT_FILE", "ENGINE"}
# what would keep spans from coming
_SAMPLING = {"OTEL_SDK_DISABLED", "OTEL_TRACES_SAMPLER", "OTEL_TRACES_SAMPLER_ARG"}


def check_variables() -> None:
    """Makes a usage error of variables that look like settings and are none."""
    unknown = import_module("nanoinfer_common.variables").unknown_variables
    if found := list(unknown(os.environ)):
        raise typer.BadParameter("; ".join(found))


def exports_elsewhere() -> bool:
    """Tells whether the environment says where spans go, or that there are none."""
    disabled = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    return disabled or any(os.environ.get(name) for name in ENDPOINTS)


def unused_variables(collected: bool, complete: bool) -> Iterator[str]:
    """Variables of this process that do not reach the services, though they would mean something.

    `collected`: spans come to this process; `complete`: and every single one is wanted.
    """
    for name in sorted(os.environ):
        exporter = collected and name.startswith("OTEL_EXPORTER_")
        sampling = collected and complete and name in _SAMPLING
        if exporter or sampling or name.removeprefix("NANOINFER_") in _OWN:
            yield name


def service_environment(collector: str | None, complete: bool) -> dict[str, str]:
    """This process's environment less what is unused, with spans going to `collector` at once."""
    left_out = set(unused_variables(collector is not None, complete))
    left_out |= {f"NANOINFER_{name}" for name in _FLAGS}
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    if collector is None:
        return kept
    defaults = {"OTEL_BSP_SCHEDULE_DELAY": "100", "OTEL_TRACES_SAMPLER": "always_on"}
    endpoint = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{collector}",
        "OTEL_EXPORTER_OTLP_INSECURE": "true",
    }
    return defaults | kept | endpoint
