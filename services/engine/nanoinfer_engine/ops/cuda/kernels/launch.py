"""What every launch shares: options of programmatic dependent launch, and rounding up."""

from __future__ import annotations

from typing import Any


def pdl_options(pdl: bool) -> dict[str, Any]:
    """Launch keywords of a kernel that may start before its predecessor has ended."""
    return {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}


def power_of_two(value: int) -> int:
    """The least power of two that is at least `value`."""
    return 1 << max(value - 1, 0).bit_length()


def ceil_div(value: int, divisor: int) -> int:
    """`value / divisor`, rounded up."""
    return -(-value // divisor)
