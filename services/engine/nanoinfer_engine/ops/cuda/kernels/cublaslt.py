"""Matrix products by a chosen algorithm of cuBLASLt, through the library that torch has loaded.

cuBLAS picks one of several algorithms by a rule of thumb; on the weights themselves another was up
to a fifth faster. The library proposes, `algorithms` measures what lies around its proposals. An
algorithm found for one number of rows may be used for others; where it does not fit, the product is
cuBLAS's own.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from ctypes import (
    byref,
    c_float,
    c_int,
    c_int64,
    c_size_t,
    c_uint16,
    c_uint32,
    c_uint64,
    c_void_p,
)
from dataclasses import dataclass, field
from functools import cache
from itertools import product

import torch
from torch import Tensor

_NAMES = ("libcublasLt.so.13", "libcublasLt.so.12")
_WORKSPACE_BYTES = 32 << 20
_NUM_PROPOSALS = 8
_ALGORITHM_BYTES = 64
_MAX_LAYOUTS = 256
# values of the library's enumerations (cublasLt.h, library_types.h)
_COMPUTE_32F, _CUDA_R_32F, _TRANSPOSE = 68, 0, 1
_DESC_TRANSA, _PREFERENCE_MAX_WORKSPACE = 3, 1
# of an algorithm: its tile, cluster and custom option
_CONFIG = (1, c_uint32), (8, c_uint16), (5, c_uint32)
_TYPES = {torch.float16: 2, torch.bfloat16: 14}


@dataclass(frozen=True)
class Algorithm:
    """One way to multiply: `data` as the library describes it to itself, and what it says of it.

    `tile` and `cluster` are the library's numbers for shapes, `custom` one whose meaning it keeps.
    """

    tile: int
    cluster: int
    custom: int
    data: bytes = field(repr=False)

    def __post_init__(self) -> None:
        """Raises ValueError where the library would read past the end."""
        if len(self.data) != _ALGORITHM_BYTES:
            raise ValueError(f"an algorithm of {len(self.data)} bytes")


class _Proposal(ctypes.Structure):
    _fields_ = (
        ("algorithm", c_uint64 * 8),
        ("workspace_bytes", c_size_t),
        ("status", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


class _Library:
    """One handle, workspace and set of descriptors; for one thread and stream."""

    def __init__(self, device: torch.device) -> None:
        """Raises OSError where the library is missing."""
        self._library = _load()
        self._handle = c_void_p()
        self._call("cublasLtCreate", byref(self._handle))
        self._workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._operation = c_void_p()
        self._call("cublasLtMatmulDescCreate", byref(self._operation), _COMPUTE_32F, _CUDA_R_32F)
        transpose = c_int(_TRANSPOSE)
        self._call(
            "cublasLtMatmulDescSetAttribute", self._operation, _DESC_TRANSA, byref(transpose), 4
        )
        self._layouts: dict[tuple[int, int, torch.dtype], c_void_p] = {}

    def proposals(
        self, rows: int, outputs: int, columns: int, dtype: torch.dtype
    ) -> list[Algorithm]:
        """Algorithms for x [rows, columns] @ weight [outputs, columns] transposed, best first."""
        preference, count = c_void_p(), c_int()
        self._call("cublasLtMatmulPreferenceCreate", byref(preference))
        most = c_uint64(_WORKSPACE_BYTES)
        self._call(
            "cublasLtMatmulPreferenceSetAttribute",
            preference,
            _PREFERENCE_MAX_WORKSPACE,
            byref(most),
            8,
        )
        weight, x, product = self._three(rows, outputs, columns, dtype)
        found = (_Proposal * _NUM_PROPOSALS)()
        self._call(
            "cublasLtMatmulAlgoGetHeuristic",
            self._handle,
            self._operation,
            weight,
            x,
            product,
            product,
            preference,
            _NUM_PROPOSALS,
            found,
            byref(count),
        )
        self._call("cublasLtMatmulPreferenceDestroy", preference)
        return [self._read(each.algorithm) for each in found[: count.value] if each.status == 0]

    def variant(self, algorithm: Algorithm, *values: int) -> Algorithm | None:
        """The same with another tile, cluster and custom option; None where there is none such."""
        data = (c_uint64 * 8).from_buffer_copy(algorithm.data)
        try:
            for (name, kind), value in zip(_CONFIG, values, strict=True):
                size = c_size_t(ctypes.sizeof(kind))
                setter = "cublasLtMatmulAlgoConfigSetAttribute"
                self._call(setter, data, name, byref(kind(value)), size)
            return self._read(data)
        except RuntimeError:
            return None

    def fits(
        self, algorithm: Algorithm, rows: int, outputs: int, columns: int, dtype: torch.dtype
    ) -> bool:
        """Whether it multiplies these, within the workspace."""
        weight, x, product = self._three(rows, outputs, columns, dtype)
        data, found = (c_uint64 * 8).from_buffer_copy(algorithm.data), _Proposal()
        operands = (self._handle, self._operation, weight, x, product, product)
        try:
            self._call("cublasLtMatmulAlgoCheck", *operands, data, byref(found))
        except RuntimeError:
            return False
        return bool(found.status == 0 and found.workspace_bytes <= _WORKSPACE_BYTES)

    def _read(self, data: ctypes.Array[c_uint64]) -> Algorithm:
        values = []
        for name, kind in _CONFIG:
            value, size, written = kind(), c_size_t(ctypes.sizeof(kind)), c_size_t()
            getter = "cublasLtMatmulAlgoConfigGetAttribute"
            self._call(getter, data, name, byref(value), size, byref(written))
            values.append(value.value)
        tile, cluster, custom = values
        return Algorithm(tile, cluster, custom, bytes(data))

    def multiply(self, x: Tensor, weight: Tensor, output: Tensor, data: bytes, add: bool) -> None:
        """Launch the product; see `multiply`. Raises RuntimeError where it does not fit."""
        layouts = self._three(len(x), len(weight), weight.shape[1], x.dtype)
        self._call(
            "cublasLtMatmul",
            self._handle,
            self._operation,
            byref(c_float(1)),
            c_void_p(weight.data_ptr()),
            layouts[0],
            c_void_p(x.data_ptr()),
            layouts[1],
            byref(c_float(add)),
            c_void_p(output.data_ptr()),
            layouts[2],
            c_void_p(output.data_ptr()),
            layouts[2],
            data,
            c_void_p(self._workspace.data_ptr()),
            c_size_t(_WORKSPACE_BYTES),
            c_void_p(torch.cuda.current_stream().cuda_stream),
        )

    def _three(
        self, rows: int, outputs: int, columns: int, dtype: torch.dtype
    ) -> tuple[c_void_p, c_void_p, c_void_p]:
        """Layouts of weight, x and product; the library counts in columns, so all stand turned."""
        if len(self._layouts) > _MAX_LAYOUTS - 3:
            for layout in self._layouts.values():
                self._call("cublasLtMatrixLayoutDestroy", layout)
            self._layouts.clear()
        return (
            self._layout(columns, outputs, dtype),
            self._layout(columns, rows, dtype),
            self._layout(outputs, rows, dtype),
        )

    def _layout(self, height: int, width: int, dtype: torch.dtype) -> c_void_p:
        key = (height, width, dtype)
        if key not in self._layouts:
            layout = c_void_p()
            self._call(
                "cublasLtMatrixLayoutCreate",
                byref(layout),
                _TYPES[dtype],
                c_uint64(height),
                c_uint64(width),
                c_int64(height),
            )
            self._layouts[key] = layout
        return self._layouts[key]

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            raise RuntimeError(f"{name}: status {status}")


def _load() -> ctypes.CDLL:
    # first the one that is loaded: another version may be installed beside it
    for mode in (os.RTLD_NOLOAD | os.RTLD_LAZY, ctypes.DEFAULT_MODE):
        for name in _NAMES:
            try:
                return ctypes.CDLL(name, mode=mode)
            except OSError:
                continue
    raise OSError(f"none of {', '.join(_NAMES)} is here")


def version() -> int:
    """The library's; 0 where it is missing."""
    try:
        get = _load().cublasLtGetVersion
    except OSError:
        return 0
    get.restype = c_size_t
    return int(get())


@cache
def _library(device: torch.device) -> _Library:
    return _Library(device)


def proposals(rows: int, weight: Tensor) -> list[Algorithm]:
    """Algorithms for `rows` rows times `weight`, those first that the library thinks best.

    None without the library, or for its dtype.
    """
    if weight.dtype not in _TYPES:
        return []
    try:
        outputs, columns = weight.shape
        return _library(weight.device).proposals(rows, outputs, columns, weight.dtype)
    except (OSError, RuntimeError):
        return []


def variants(
    algorithm: Algorithm,
    tiles: Iterable[int],
    clusters: Iterable[int],
    customs: Iterable[int],
    rows: int,
    weight: Tensor,
) -> list[Algorithm]:
    """The same with each of these tiles, clusters and options that can multiply `rows` rows."""
    library = _library(weight.device)
    found = (library.variant(algorithm, *values) for values in product(tiles, clusters, customs))
    outputs, columns = weight.shape
    size = rows, outputs, columns, weight.dtype
    return [each for each in found if each is not None and library.fits(each, *size)]


def multiply(
    x: Tensor, weight: Tensor, output: Tensor, algorithm: Algorithm, *, add: bool = False
) -> Tensor:
    """`output` [M, N] = x [M, K] @ weight [N, K] transposed, plus what it held with `add`.

    All contiguous and of one dtype, float16 or bfloat16.
    """
    try:
        _library(x.device).multiply(x, weight, output, algorithm.data, add)
    except RuntimeError:  # the algorithm does not fit this number of rows
        if add:
            return torch.addmm(output, x, weight.t(), out=output)
        return torch.mm(x, weight.t(), out=output)
    return output
