"""`TensorData`: the array type of the API, an int64 or float32 tensor, dense or 2-D sparse CSR."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from mint_engine.errors import UserError

if TYPE_CHECKING:
    import torch

TensorDtype: TypeAlias = Literal["int64", "float32"]

_NUMPY_DTYPES: dict[str, type[np.generic]] = {"int64": np.int64, "float32": np.float32}
_INT64_MIN, _INT64_MAX = float(-(2**63)), float(2**63)


def is_torch_tensor(value: object) -> bool:
    """True for a torch tensor. Does not import torch: a tensor cannot exist before somebody has."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def torch_to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Host numpy array of a tensor of any dtype, device or layout; 16-bit floats widen to float32."""
    dense = tensor.detach().to_dense() if tensor.layout is not _torch().strided else tensor.detach()
    if dense.is_floating_point() and dense.dtype not in (_torch().float32, _torch().float64):
        dense = dense.float()
    return dense.cpu().numpy()


def cast_array(values: Any, dtype: TensorDtype, where: str) -> np.ndarray:
    """A new C-contiguous array of `dtype` with the values of a (nested) sequence or array.

    Fractions and out-of-range values are refused for int64; float32 rounds.
    Raises UserError when the values are ragged, not numbers, or do not fit.
    """
    if dtype not in _NUMPY_DTYPES:
        raise UserError(f"{where}: expected dtype 'int64' or 'float32', got {dtype!r}")
    if is_torch_tensor(values):
        values = torch_to_numpy(values)
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise UserError(f"{where}: expected a rectangular array of numbers, got ragged nested sequences") from error
    if array.size == 0 and array.dtype.kind == "f":
        return np.empty(array.shape, _NUMPY_DTYPES[dtype])
    if array.dtype.kind not in "fiub":
        raise UserError(f"{where}: expected numbers, got {_describe(values, array)}")
    if dtype == "int64" and array.dtype.kind == "f":
        if not (np.isfinite(array).all() and (array == np.trunc(array)).all()):
            raise UserError(f"{where}: expected integers, got fractions, NaN or infinity")
        if array.min() < _INT64_MIN or array.max() >= _INT64_MAX:
            raise UserError(f"{where}: expected 64-bit integers, got values out of range")
    if dtype == "int64" and array.dtype == np.uint64 and array.max() > np.iinfo(np.int64).max:
        raise UserError(f"{where}: expected 64-bit integers, got values out of range")
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes inf, which the engine names with its datum
        return np.array(array, dtype=_NUMPY_DTYPES[dtype], order="C")


def _describe(values: Any, array: np.ndarray) -> str:
    flat = array.reshape(-1) if array.dtype == object else None
    odd = next((v for v in flat if not isinstance(v, (int, float))), None) if flat is not None else None
    return f"{type(values).__name__} of {type(odd).__name__ if flat is not None else array.dtype}"


def _torch() -> Any:
    import torch

    return torch


class TensorData:
    """An immutable int64 or float32 tensor.

    Args:
        data: the values: a flat or nested list, a numpy array or a torch tensor. They are copied.
            For a sparse tensor, the listed values.
        dtype: "int64" or "float32".
        shape: shape of the (dense) tensor; inferred from `data` when absent.
        sparse_crow_indices, sparse_col_indices: if given, the tensor is CSR of the 2-D `shape`: row r holds
            `data[crow[r]:crow[r+1]]` in columns `col[crow[r]:crow[r+1]]`, and the missing cells are zero
            (or the `pad_value` of a conversion).

    Raises:
        UserError (a ValueError): values that are not numbers or do not fit the shape, malformed CSR.

    One-dimensional tensors behave like lists: `len`, indexing, iteration.
    """

    __slots__ = ("_array", "_col", "_crow", "dtype", "shape")

    dtype: TensorDtype
    shape: list[int]
    _array: np.ndarray
    _crow: np.ndarray | None
    _col: np.ndarray | None

    def __init__(
        self,
        data: Any = None,
        dtype: TensorDtype | None = None,
        shape: Sequence[int] | None = None,
        sparse_crow_indices: Sequence[int] | None = None,
        sparse_col_indices: Sequence[int] | None = None,
    ) -> None:
        if dtype is None:
            raise UserError("TensorData: dtype is required: 'int64' or 'float32'")
        array = cast_array([] if data is None else data, dtype, "TensorData.data")
        self.dtype = dtype
        self._crow = self._col = None
        if sparse_crow_indices is None and sparse_col_indices is None:
            self._array = array if shape is None else _reshape(array, shape)
            self.shape = list(self._array.shape)
            return
        if sparse_crow_indices is None or sparse_col_indices is None or shape is None or len(shape) != 2:
            raise UserError("TensorData: a sparse tensor needs sparse_crow_indices, sparse_col_indices and a 2-D shape")
        self._array = array.reshape(-1)
        self.shape = [int(n) for n in shape]
        self._crow = cast_array(sparse_crow_indices, "int64", "sparse_crow_indices").reshape(-1)
        self._col = cast_array(sparse_col_indices, "int64", "sparse_col_indices").reshape(-1)
        _check_csr(self._crow, self._col, self._array.size, self.shape)

    @classmethod
    def wrap(cls, array: np.ndarray) -> TensorData:
        """`array` itself, not a copy: C-contiguous int64 or float32, which nobody will change."""
        self = cls.__new__(cls)
        self.dtype = "int64" if array.dtype.kind == "i" else "float32"
        self.shape = list(array.shape)
        self._array = array
        self._crow = self._col = None
        return self

    @classmethod
    def wrap_sparse(cls, values: np.ndarray, crow: np.ndarray, col: np.ndarray, shape: Sequence[int]) -> TensorData:
        """A CSR tensor of these arrays, not copies (int64 indices; `values` as for `wrap`). Checks them, as
        `TensorData(...)` does."""
        self = cls.wrap(values)
        self.shape = list(shape)
        self._crow, self._col = crow, col
        _check_csr(crow, col, values.size, self.shape)
        return self

    @classmethod
    def from_numpy(cls, array: np.ndarray) -> TensorData:
        """Integers and booleans become int64, floats float32."""
        kind = np.asarray(array).dtype.kind
        return cls(array, "float32" if kind == "f" else "int64")

    @classmethod
    def from_torch(cls, tensor: torch.Tensor) -> TensorData:
        """Integers become int64, floats (of any width) float32. Detaches, densifies and copies to the host."""
        return cls.from_numpy(torch_to_numpy(tensor))

    @classmethod
    def from_torch_sparse(cls, tensor: torch.Tensor, pad_value: int = 0) -> TensorData:
        """CSR of a 2-D tensor without the cells equal to `pad_value`, or dense where CSR would not be smaller."""
        dense = cls.from_torch(tensor)
        array = dense.to_numpy()
        if array.ndim != 2:
            return dense
        keep = array != pad_value
        count = int(keep.sum())
        if array.shape[0] + 1 + 2 * count >= array.size:
            return dense
        crow = np.concatenate([[0], np.cumsum(keep.sum(axis=1))])
        return cls(array[keep], dense.dtype, array.shape, crow.tolist(), np.nonzero(keep)[1].tolist())

    @property
    def data(self) -> list[Any]:
        """The values, flat, in row-major order (of a sparse tensor: the listed values)."""
        return self._array.reshape(-1).tolist()

    @property
    def sparse_crow_indices(self) -> list[int] | None:
        """Where each row starts among the listed values; None for a dense tensor."""
        return None if self._crow is None else self._crow.tolist()

    @property
    def sparse_col_indices(self) -> list[int] | None:
        """The column of each listed value; None for a dense tensor."""
        return None if self._col is None else self._col.tolist()

    @property
    def csr(self) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """The listed values and their int64 crow and col indices, as stored; None for a dense tensor."""
        return None if self._crow is None or self._col is None else (self._array, self._crow, self._col)

    def to_numpy(self, pad_value: int = 0) -> np.ndarray:
        """Dense array of `shape`. The stored array itself if the tensor is dense: copy it before you change it."""
        if self._crow is None or self._col is None:
            return self._array
        dense = np.full(self.shape, pad_value, dtype=self._array.dtype)
        rows = np.repeat(np.arange(self.shape[0]), np.diff(self._crow))
        dense[rows, self._col] = self._array
        return dense

    def to_torch(self, pad_value: int = 0) -> torch.Tensor:
        """Dense CPU tensor of `shape`, with its own memory."""
        tensor: torch.Tensor = _torch().from_numpy(self.to_numpy(pad_value).copy())
        return tensor

    def tolist(self, pad_value: int = 0) -> list[Any]:
        """Dense values as nested lists."""
        values: list[Any] = self.to_numpy(pad_value).tolist()
        return values

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; `TensorData(**td.to_dict())` equals `td`."""
        record: dict[str, Any] = {"data": self.data, "dtype": self.dtype, "shape": self.shape}
        if self._crow is not None:
            record["sparse_crow_indices"] = self.sparse_crow_indices
            record["sparse_col_indices"] = self.sparse_col_indices
        return record

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of a 0-dimensional TensorData")
        return self.shape[0]

    def __getitem__(self, index: Any) -> Any:
        item = self.to_numpy()[index]
        return item.tolist()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.tolist())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self.to_numpy()
        wanted = array.dtype if dtype is None else np.dtype(dtype)
        return array.astype(wanted, copy=True) if copy or wanted != array.dtype else array

    def __repr__(self) -> str:
        sparse = ", sparse" if self._crow is not None else ""
        values = np.array2string(self._array, threshold=8)
        return f"TensorData({values}, dtype={self.dtype!r}, shape={self.shape}{sparse})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TensorData):
            return NotImplemented
        return self.dtype == other.dtype and bool(np.array_equal(self.to_numpy(), other.to_numpy(), equal_nan=True))

    __hash__ = None  # type: ignore[assignment]  # holds an array


def _reshape(array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    sizes = [int(n) for n in shape]
    if any(n < 0 for n in sizes) or math.prod(sizes) != array.size:
        raise UserError(f"TensorData: expected {sizes} to hold the {array.size} values of data")
    return array.reshape(sizes)


def _check_csr(crow: np.ndarray, col: np.ndarray, count: int, shape: list[int]) -> None:
    rows, columns = shape
    if rows < 0 or columns < 0:
        raise UserError(f"TensorData.shape: expected sizes of at least 0, got {shape}")
    if len(crow) != rows + 1 or crow[0] != 0 or crow[-1] != count or (crow[1:] < crow[:-1]).any():
        raise UserError(
            f"sparse_crow_indices: expected {rows + 1} values rising from 0 to {count}, got {_shorten(crow)}"
        )
    if len(col) != count:
        raise UserError(f"sparse_col_indices: expected {count} values to match data, got {len(col)}")
    bad = (col < 0) | (col >= columns)
    bad[1:] |= col[1:] <= col[:-1]
    first = crow[:-1][crow[:-1] < count]  # the first column of a row need not exceed the last of the row before
    bad[first] = (col[first] < 0) | (col[first] >= columns)
    if bad.any():
        row = int(np.searchsorted(crow, np.flatnonzero(bad)[0], side="right")) - 1
        got = _shorten(col[crow[row] : crow[row + 1]])
        raise UserError(f"sparse_col_indices: expected columns rising in 0..{columns - 1} in a row, got {got}")


def _shorten(values: np.ndarray) -> str:
    return np.array2string(values, threshold=16, edgeitems=4, separator=", ")
