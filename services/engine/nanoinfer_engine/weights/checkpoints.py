"""Checkpoints on disk: what tensors there are, their shapes, and one tensor at a time.

Two kinds: a Hugging Face directory (config.json and safetensors, sharded or not) and a
nanoGPT-style `.pt` file. Nothing in either is executed: safetensors holds no code, and `.pt` goes
through `torch.load(weights_only=True)`; what that refuses is refused.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from nanoinfer_common.json_files import is_lfs_pointer, lfs_message
from nanoinfer_common.model_paths import unservable
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanoinfer_engine.core.config import CheckpointError, ModelConfig
from nanoinfer_engine.models.model_config import nanogpt_config, read_huggingface_config, read_json

_SAFETENSORS_DTYPES = ("F64", "F32", "F16", "BF16")
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Part(NamedTuple):
    """The stretch [start, stop) of a tensor along dimension `dim`, 0 or 1."""

    dim: int
    start: int
    stop: int

    @property
    def region(self) -> tuple[slice, ...]:
        """What a tensor is indexed with."""
        return (slice(None),) * self.dim + (slice(self.start, self.stop),)


class Checkpoint(Protocol):
    """A set of named tensors and the architecture they belong to."""

    @property
    def config(self) -> ModelConfig:
        """The architecture, checked for sense but not against the tensors."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every tensor, without reading any."""

    @property
    def num_shards(self) -> int:
        """Files that the tensors are in."""

    def shard(self, name: str) -> int:
        """Which of them a tensor is in, from 0; cheapest read one shard after another."""

    def read(self, name: str, part: Part | None = None) -> Tensor:
        """One tensor, or a part of it, in its stored dtype; CheckpointError if it is no float one.

        On the CPU. Of a part no more than that is read.
        """


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`: a directory, or a .pt file. Raises CheckpointError."""
    if reason := unservable(path):
        raise CheckpointError(f"{path}: {reason}")
    if path.is_dir():
        return SafetensorsCheckpoint(path)
    if path.suffix in (".pt", ".pth") and path.is_file():
        return TorchCheckpoint(path)
    raise CheckpointError(f"{path}: neither a model directory nor a .pt file")


class SafetensorsCheckpoint:
    """A Hugging Face model directory."""

    def __init__(self, directory: Path) -> None:
        """Read config.json and every file's header."""
        self.config = read_huggingface_config(directory)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._shards: dict[str, int] = {}
        self._paths = [directory / file_name for file_name in _weight_files(directory)]
        self._current = -1
        for shard in range(self.num_shards):
            self._add(shard)
        self._check_index(directory)

    @property
    def num_shards(self) -> int:
        """Safetensors files."""
        return len(self._paths)

    def shard(self, name: str) -> int:
        """The file's number."""
        return self._shards[name]

    def read(self, name: str, part: Part | None = None) -> Tensor:
        """One tensor or a part of it, read from its file; the file read before is let go."""
        file = self._open(self._shards[name])
        stored = file.get_slice(name)
        dtype = stored.get_dtype()
        if dtype not in _SAFETENSORS_DTYPES:
            raise CheckpointError(
                f"{name}: dtype {dtype}, supported: {', '.join(_SAFETENSORS_DTYPES)}"
            )
        tensor: Tensor = file.get_tensor(name) if part is None else stored[part.region]
        return tensor

    def _open(self, shard: int) -> Any:
        """The file itself, mapped into memory as long as this or a tensor of it needs it."""
        if shard != self._current:
            path = self._paths[shard]
            try:
                self._file: Any = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                if is_lfs_pointer(path):
                    raise CheckpointError(lfs_message(path)) from error
                raise CheckpointError(f"{path.name}: {error}") from error
            self._current = shard
        return self._file

    def _add(self, shard: int) -> None:
        """Read the header of a file."""
        file, file_name = self._open(shard), self._paths[shard].name
        for name in file.keys():  # noqa: SIM118
            if name in self.shapes:
                raise CheckpointError(f"{file_name}: {name} is already in another file")
            self._shards[name] = shard
            self.shapes[name] = tuple(file.get_slice(name).get_shape())

    def _check_index(self, directory: Path) -> None:
        if (directory / _INDEX).exists():
            for name in _weight_map(directory):
                if name not in self.shapes:
                    raise CheckpointError(f"{_INDEX}: {name} is in none of the files")


class TorchCheckpoint:
    """A nanoGPT-style file: {"model_args" or "config": arguments, "model": state dict}."""

    def __init__(self, path: Path) -> None:
        """Unpickle the file's structure; zip files (torch ≥ 1.6) map their tensors lazily."""
        try:
            loaded = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
        except Exception as error:  # a hostile pickle can raise anything
            reason = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
            raise CheckpointError(
                f"{path.name}: refused by torch.load(weights_only=True): {reason}"
            ) from error
        if not isinstance(loaded, dict):
            raise CheckpointError(f"{path.name}: holds no dictionary")
        arguments = loaded.get("model_args", loaded.get("config"))
        if not isinstance(arguments, Mapping):
            raise CheckpointError(f"{path.name}: no model_args (nor config) dictionary")
        tensors = loaded.get("model")
        if not isinstance(tensors, Mapping):
            raise CheckpointError(f"{path.name}: no model state dictionary")
        for name, tensor in tensors.items():
            if not isinstance(name, str) or not isinstance(tensor, Tensor):
                raise CheckpointError(f"{path.name}: model entry {str(name)[:80]!r} is no tensor")
        self.config = nanogpt_config(arguments)
        self._tensors: dict[str, Tensor] = dict(tensors)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    @property
    def num_shards(self) -> int:
        """The one file."""
        return 1

    def shard(self, name: str) -> int:
        """The one file."""
        return 0

    def read(self, name: str, part: Part | None = None) -> Tensor:
        """One tensor or a part of it."""
        tensor = self._tensors[name]
        if tensor.dtype not in _DTYPES or tensor.layout is not torch.strided:
            raise CheckpointError(f"{name}: {tensor.layout} {tensor.dtype} is not a float tensor")
        return tensor if part is None else tensor[part.region]


_INDEX = "model.safetensors.index.json"


def _weight_map(directory: Path) -> Mapping[str, str]:
    """The shard index: tensor name → file name within the directory."""
    weight_map = read_json(directory / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{_INDEX}: no weight_map")
    for tensor, file_name in weight_map.items():
        plain = isinstance(file_name, str) and file_name == Path(file_name).name
        if not plain or "\\" in file_name or not file_name.endswith(".safetensors"):
            raise CheckpointError(
                f"{_INDEX}: {tensor} is in {str(file_name)[:80]!r},"
                " which is not a .safetensors file name"
            )
    return weight_map


def _weight_files(directory: Path) -> list[str]:
    """Names of the safetensors files that make up the model."""
    if (directory / _INDEX).exists():
        return sorted(set(_weight_map(directory).values()))
    found = sorted(path.name for path in directory.glob("*.safetensors"))
    if "model.safetensors" in found:
        return ["model.safetensors"]
    if len(found) != 1:
        problem = "no .safetensors file" if not found else "several .safetensors files, no index"
        raise CheckpointError(f"{directory.name}: {problem}")
    return found
