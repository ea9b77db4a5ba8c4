"""Waiting without a bound that a loaded machine could miss."""

from __future__ import annotations

# Deadlines that are to pass on the way are tried from the shortest: on a loaded machine the first
# ones may pass before anything has begun.
DEADLINES = (0.3, 3.0, 30.0)


def assert_left(left: float | None, allowed: float, spent: float) -> None:
    """Checks what is left of `allowed` seconds with what the call took in all."""
    assert left is not None
    assert allowed - spent <= left <= 1.01 * allowed  # gRPC rounds a deadline up on the wire
