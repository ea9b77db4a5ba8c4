"""Triton's interpreter in the place of a card: whether it runs, how fast, and what it cannot do.

It computes each program of a launch with numpy, some 50 µs an operation: time goes with the number
of programs, not with the numbers in them. So where it runs there are fewer heads, splits and rows;
every branch of the kernels is taken still. Left out, with the reason beside each skip, is what it
gets wrong (it rounds to e4m3 without a carry out of the mantissa), what it lacks (products of
bfloat16 matrices, dependent launches), and whole runners, which need a card's graphs and memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def choose_here(on_card: Any, interpreted: Any) -> Any:
    """The first value on a card, the second in the interpreter."""
    return interpreted if INTERPRETED else on_card


def patch_language_once(patch: pytest.MonkeyPatch) -> None:
    """Keep `triton.language` patched between calls.

    The interpreter replaces all of its functions again for each call of a device function: up to
    half of the time of a launch.
    """
    from triton import language
    from triton.runtime import interpreter

    patch_language: Callable[[Any], object] = interpreter._patch_lang
    modules = {id(language), id(language.core)}
    patched: set[int] = set()

    def patch_first(function: Any) -> object:
        used = {id(value) for value in function.__globals__.values()} & modules
        if not used <= patched:
            patch_language(function)
            patched.update(used)
        return interpreter._LangPatchScope()

    patch.setattr(interpreter, "_patch_lang", patch_first)
