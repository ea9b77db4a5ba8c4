"""Sampling of the command line's chats: the flags, else what the checkpoint states, else gentle.

The contract's default is temperature 1 without filters, which small models answer with nonsense.
A chat is for reading, so it asks for less where the checkpoint has no wish of its own.
"""

from collections.abc import Mapping
from typing import Any

from nanoinfer.cli import console
from nanoinfer.client import Client
from nanoinfer.v1.generation_pb2 import ModelInfo

TEMPERATURE = 0.7
TOP_P = 0.9
_FILTERS = ("top_p", "top_k", "min_p")
# with the values that do nothing
_SHOWN = {"top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1}
# of a chat's options, those that the question about the model takes too
_OF_CALLS = ("timeout", "metadata", "priority", "tenant")


def chat_options(
    client: Client, options: Mapping[str, Any], *, always_shown: bool = False
) -> dict[str, Any]:
    """The options with this chat's sampling; says on standard error what was added to them."""
    settings: Any = {name: options[name] for name in _OF_CALLS if name in options}
    with console.usage_errors():
        model = client.model_info(options.get("model"), **settings)
    added = _gentle(model, options)
    if added or always_shown:
        console.note(_described(model, options, added))
    return {**options, **added}


def _gentle(model: ModelInfo, options: Mapping[str, Any]) -> dict[str, Any]:
    """Temperature and filter for a checkpoint that states none; empty where that is not known."""
    stated = model.stated_sampling
    if not model.HasField("stated_sampling") or stated.HasField("temperature"):
        return {}
    added = {} if "temperature" in options else {"temperature": TEMPERATURE}
    filtered = any(name in options or stated.HasField(name) for name in _FILTERS)
    if not filtered and options.get("temperature") != 0:
        added["top_p"] = TOP_P
    return added


def _described(model: ModelInfo, options: Mapping[str, Any], added: Mapping[str, Any]) -> str:
    chosen = {**options, **added}
    values = {
        name: chosen.get(name, getattr(model.default_sampling, name))
        for name in ("temperature", *_SHOWN)
    }
    shown = [f"{name}={values[name]:g}" for name in values if values[name] != _SHOWN.get(name)]
    if not added:
        return f"sampling: {' '.join(shown)}"
    flags = " and ".join(f"--{name.replace('_', '-')}" for name in added)
    return f"sampling: {' '.join(shown)} (the model states none; change it with {flags})"
