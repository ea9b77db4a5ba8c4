"""Declaration of settings: fields of frozen dataclasses, with help and bounds as metadata.

The entry point makes a flag and an environment variable of each field; the core uses the values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, dataclass, field
from typing import Any, TypeVar

Value = TypeVar("Value")

_KEY = "setting"


@dataclass(frozen=True)
class Setting:
    """Description of one setting for operators.

    `flag` is its public name where the field has another, `choices` its values where they are few.
    A value `in_bytes` may be given with a unit, such as `64MiB`. `on_cuda` is the default on a CUDA
    device where that differs from the field's own.
    """

    help: str
    flag: str | None = None
    choices: tuple[str, ...] = ()
    in_bytes: bool = False
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    on_cuda: Any = ...

    @property
    def follows_device(self) -> bool:
        """Whether the default depends on the device."""
        return self.on_cuda is not ...


def described(help: str, **description: Any) -> Mapping[str, Setting]:
    """Metadata of a field without a default; the arguments are those of `Setting`."""
    return {_KEY: Setting(help, **description)}


def setting(default: Value, help: str, **description: Any) -> Value:
    """Field of a dataclass that is a setting; the arguments are those of `Setting`."""
    declared: Value = field(default=default, metadata=described(help, **description))
    return declared


def setting_of(declared: Field[Any]) -> Setting:
    """Description in a field's metadata."""
    found: Setting = declared.metadata[_KEY]
    return found


def flag_of(declared: Field[Any]) -> str:
    """Public name of a field."""
    return setting_of(declared).flag or declared.name
