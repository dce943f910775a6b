# SPDX-License-Identifier: Apache-2.0
"""Reads GGUF model files (versions 2 and 3, little endian).

Here live the file's layout, its limits and its checks.  What the metadata and
the tensors mean does not: no architecture, tokenizer or dequantisation.

Layout, after the GGUF specification (docs/gguf.md in ggml): magic, version,
tensor count, key count; the key-value pairs; one record per tensor; padding to
the alignment; the tensor data, each tensor at an aligned offset.  Every
number in the file is a claim: it is checked against the file's size and
against the limits below before anything is allocated from it.
"""

from __future__ import annotations

import enum
import mmap
import os
import stat
import struct
from collections.abc import Mapping, Sequence
from math import prod
from types import MappingProxyType, TracebackType
from typing import Any, overload

import attrs
import numpy as np
import numpy.typing as npt

from spanker import collecting
from spanker.errors import (
    ModelError,
    ModelFormatError,
    ModelNotFoundError,
    UnsupportedModelError,
)
from spanker.ggml.native import string_ends, strings_bytes
from spanker.values import Value

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

# Far above any real model; a file that claims more is corrupt or hostile.
MAX_KEYS = 1 << 16
MAX_KEY_BYTES = 1 << 16
MAX_STRING_BYTES = 1 << 24
MAX_ARRAY_STRINGS = 1 << 22
MAX_TENSORS = 1 << 17
MAX_TENSOR_NAME_BYTES = 64
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 1 << 20


class GGMLType(enum.IntEnum):
    """Tensor types by their number in a GGUF file (enum ggml_type in ggml.h).

    The gaps are types that ggml once had and removed.
    """

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q8_1 = 9
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    Q8_K = 15
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ1_S = 19
    IQ4_NL = 20
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    I8 = 24
    I16 = 25
    I32 = 26
    I64 = 27
    F64 = 28
    IQ1_M = 29
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    MXFP4 = 39
    NVFP4 = 40
    Q1_0 = 41

    @property
    def block_weights(self) -> int:
        """How many weights one block holds."""
        return BLOCK_SIZES[self][0]

    @property
    def block_bytes(self) -> int:
        """How many bytes one block takes."""
        return BLOCK_SIZES[self][1]


#: (weights, bytes) of one block of each type.
BLOCK_SIZES: Mapping[GGMLType, tuple[int, int]] = MappingProxyType(
    {
        GGMLType.F32: (1, 4),
        GGMLType.F16: (1, 2),
        GGMLType.Q4_0: (32, 18),
        GGMLType.Q4_1: (32, 20),
        GGMLType.Q5_0: (32, 22),
        GGMLType.Q5_1: (32, 24),
        GGMLType.Q8_0: (32, 34),
        GGMLType.Q8_1: (32, 40),
        GGMLType.Q2_K: (256, 84),
        GGMLType.Q3_K: (256, 110),
        GGMLType.Q4_K: (256, 144),
        GGMLType.Q5_K: (256, 176),
        GGMLType.Q6_K: (256, 210),
        GGMLType.Q8_K: (256, 292),
        GGMLType.IQ2_XXS: (256, 66),
        GGMLType.IQ2_XS: (256, 74),
        GGMLType.IQ3_XXS: (256, 98),
        GGMLType.IQ1_S: (256, 50),
        GGMLType.IQ4_NL: (32, 18),
        GGMLType.IQ3_S: (256, 110),
        GGMLType.IQ2_S: (256, 82),
        GGMLType.IQ4_XS: (256, 136),
        GGMLType.I8: (1, 1),
        GGMLType.I16: (1, 2),
        GGMLType.I32: (1, 4),
        GGMLType.I64: (1, 8),
        GGMLType.F64: (1, 8),
        GGMLType.IQ1_M: (256, 56),
        GGMLType.BF16: (1, 2),
        GGMLType.TQ1_0: (256, 54),
        GGMLType.TQ2_0: (256, 66),
        GGMLType.MXFP4: (32, 17),
        GGMLType.NVFP4: (64, 36),
        GGMLType.Q1_0: (128, 18),
    }
)


@attrs.frozen(eq=False, repr=False)
class TensorInfo(Value):
    """Where one tensor lies: `shape` rows first, `offset` from the start of the file."""

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    offset: int
    nbytes: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row: the last dimension, in blocks."""
        return self.shape[-1] // self.type.block_weights * self.type.block_bytes

    def shifted(self, nbytes: int) -> TensorInfo:
        """The same tensor so many bytes later; a model has hundreds, and `attrs.evolve` takes ten
        times as long."""
        return TensorInfo(self.name, self.shape, self.type, self.offset + nbytes, self.nbytes)


class StringArray(Sequence[str]):
    """A string array of the metadata, decoded item by item as it is read.

    It owns a copy of its bytes, so it outlives the file.  Reading an item that
    is not UTF-8 raises `ModelFormatError`.
    """

    __slots__ = ("_count", "_ends", "_where", "blob")

    def __init__(self, blob: bytes, count: int, where: str) -> None:
        self.blob = blob  # as in the file: each item's length in 8 bytes, then the item
        self._count = count
        self._ends: npt.NDArray[np.int64] | None = None
        self._where = where

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...
    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        i = range(len(self))[index]
        try:
            return self._raw(i).decode()
        except UnicodeDecodeError:
            raise self.not_utf8(i) from None

    def tolist(self) -> list[str]:
        """All items."""
        return list(self[:])

    def not_utf8(self, index: int) -> ModelFormatError:
        """The error for an item that is not UTF-8."""
        return ModelFormatError(
            f"{self._where}: item {index} is not UTF-8: {self._raw(index)[:40]!r}; "
            "the file is corrupt"
        )

    def _raw(self, index: int) -> bytes:
        if self._ends is None:  # most arrays are read only as a whole, natively
            self._ends = string_ends(self.blob, self._count)
        start = int(self._ends[index - 1]) if index else 0
        return self.blob[start + 8 : int(self._ends[index])]

    def __eq__(self, other: object) -> bool:
        if isinstance(other, StringArray):
            return self.blob == other.blob and self._count == other._count
        if isinstance(other, (list, tuple)):
            return self.tolist() == list(other)
        return NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<StringArray of {len(self)} strings>"


# Scalar value types of the metadata: number -> struct code and numpy type.
_SCALARS: Mapping[int, tuple[struct.Struct, np.dtype[Any]]] = MappingProxyType(
    {
        number: (struct.Struct("<" + code), np.dtype("<" + dtype))
        for number, code, dtype in (
            (0, "B", "u1"),
            (1, "b", "i1"),
            (2, "H", "u2"),
            (3, "h", "i2"),
            (4, "I", "u4"),
            (5, "i", "i4"),
            (6, "f", "f4"),
            (7, "B", "u1"),
            (10, "Q", "u8"),
            (11, "q", "i8"),
            (12, "d", "f8"),
        )
    }
)
_BOOL, _STRING, _ARRAY = 7, 8, 9
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


class _Cursor:
    """A position in the file's bytes; every read is checked against the end."""

    __slots__ = ("path", "pos", "size", "view")

    def __init__(self, path: str, view: memoryview) -> None:
        self.path = path
        self.view = view
        self.size = len(view)
        self.pos = 0

    def take(self, count: int, what: str) -> int:
        """Step over `count` bytes and return where they start."""
        start = self.pos
        if count > self.size - start:
            raise ModelFormatError(
                f"{self.path}: {what} needs bytes {start}..{start + count} but the file ends at "
                f"{self.size}; the file is truncated or corrupt: download it again"
            )
        self.pos = start + count
        return start

    def unpack(self, code: struct.Struct, what: str) -> Any:
        return code.unpack_from(self.view, self.take(code.size, what))[0]

    def string(self, what: str, limit: int) -> str:
        length = self.unpack(_U64, what)
        if length > limit:
            raise ModelFormatError(
                f"{self.path}: {what} claims {length} bytes, at most {limit} are allowed; "
                "the file is corrupt"
            )
        start = self.take(length, what)
        raw = bytes(self.view[start : start + length])
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise ModelFormatError(
                f"{self.path}: {what} is not UTF-8: {raw[:40]!r}; the file is corrupt"
            ) from None

    def value(self, kind: int, what: str) -> object:
        if kind == _STRING:
            return self.string(what, MAX_STRING_BYTES)
        if kind == _ARRAY:
            return self.array(what)
        if kind not in _SCALARS:
            raise self.unknown_kind(kind, what)
        value = self.unpack(_SCALARS[kind][0], what)
        if kind != _BOOL:
            return value
        if value > 1:
            raise self.bad_bool(value, what)
        return bool(value)

    def array(self, what: str) -> StringArray | npt.NDArray[Any]:
        kind = self.unpack(_U32, what)
        count = self.unpack(_U64, what)
        if kind == _STRING:
            return self.strings(count, what)
        if kind == _ARRAY:
            raise UnsupportedModelError(
                f"{self.path}: {what} is an array of arrays; only arrays of numbers, bools and "
                "strings are understood"
            )
        if kind not in _SCALARS:
            raise self.unknown_kind(kind, what)
        dtype = _SCALARS[kind][1]
        start = self.take(count * dtype.itemsize, f"{what} ({count} items)")
        # A copy, so that the metadata outlives the mapping.
        array = np.frombuffer(bytes(self.view[start : self.pos]), dtype)
        if kind != _BOOL:
            return array
        if count and array.max() > 1:
            raise self.bad_bool(int(array.max()), what)
        return array.view(np.bool_)

    def strings(self, count: int, what: str) -> StringArray:
        if count > MAX_ARRAY_STRINGS:
            raise ModelFormatError(
                f"{self.path}: {what} claims {count} strings, at most {MAX_ARRAY_STRINGS} are "
                "allowed; the file is corrupt"
            )
        start = self.pos
        self.take(8 * count, f"{what} ({count} strings)")
        nbytes = strings_bytes(self.view[start:], count)
        if nbytes is None:
            raise ModelFormatError(
                f"{self.path}: {what} ({count} strings from byte {start}) runs past the end of "
                f"the file at {self.size}; the file is truncated or corrupt: download it again"
            )
        self.pos = start + nbytes
        return StringArray(bytes(self.view[start : self.pos]), count, f"{self.path}: {what}")

    def unknown_kind(self, kind: int, what: str) -> ModelFormatError:
        return ModelFormatError(
            f"{self.path}: {what} has value type {kind}, expected 0..12; the file is corrupt"
        )

    def bad_bool(self, value: int, what: str) -> ModelFormatError:
        return ModelFormatError(
            f"{self.path}: {what} holds the bool {value}, expected 0 or 1; the file is corrupt"
        )


class GGUFFile:
    """An open GGUF file: a context manager over a read-only mapping.

    `metadata` maps keys to int, float, bool, str, numpy arrays and
    `StringArray`; it stays valid after `close`.  `tensors` maps names to
    `TensorInfo`, in file order.  Opening blocks on the disk for the header
    only.  Raises `ModelNotFoundError`, `ModelFormatError` and
    `UnsupportedModelError`.

    The file must not shrink while it is open: the kernel would answer a read
    of the missing pages with SIGBUS, as for any mapping.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._map: mmap.mmap | None = _map_file(self.path)
        try:
            with memoryview(self._map) as view:
                self._read(_Cursor(self.path, view))
        except BaseException:
            self.close()
            raise

    @collecting.paused()
    def _read(self, cursor: _Cursor) -> None:
        key_count, tensor_count, self.version = _read_header(cursor)
        metadata: dict[str, object] = {}
        for index in range(key_count):
            key = cursor.string(f"key {index}", MAX_KEY_BYTES)
            if key in metadata:
                raise ModelFormatError(
                    f"{self.path}: key {key!r} occurs twice; the file is corrupt"
                )
            what = f"value of {key!r}"
            metadata[key] = cursor.value(cursor.unpack(_U32, what), what)
        self.metadata: Mapping[str, object] = MappingProxyType(metadata)
        self.alignment = _alignment(self.path, metadata)

        records = [_read_tensor(cursor, index, self.alignment) for index in range(tensor_count)]
        data_start = -(-cursor.pos // self.alignment) * self.alignment
        tensors: dict[str, TensorInfo] = {}
        for record in records:
            info = record.shifted(data_start)
            if info.name in tensors:
                raise ModelFormatError(
                    f"{self.path}: tensor {info.name!r} occurs twice; the file is corrupt"
                )
            if info.offset + info.nbytes > cursor.size:
                raise ModelFormatError(
                    f"{self.path}: tensor {info.name!r} needs bytes "
                    f"{info.offset}..{info.offset + info.nbytes} but the file ends at "
                    f"{cursor.size}; the file is truncated: download it again"
                )
            tensors[info.name] = info
        _check_overlap(self.path, tensors)
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(tensors)
        if self._map is not None:
            # All of it was copied: megabytes, with a large vocabulary.
            self._map.madvise(mmap.MADV_DONTNEED, 0, cursor.pos)

    def tensor_data(self, name: str) -> npt.NDArray[np.uint8]:
        """The tensor's bytes as a read-only (rows, row_bytes) view of the file.

        A 1-D tensor is one row; of a 3-D or 4-D one the leading dimensions are
        flattened.  The view stays valid after `close`.  Raises
        `ModelFormatError` for a name that is not in the file.
        """
        if self._map is None:
            raise ModelError(f"{self.path}: the file is closed; open it again")
        info = self.tensors.get(name)
        if info is None:
            raise ModelFormatError(
                f"{self.path}: no tensor {name!r} among its {len(self.tensors)} tensors"
            )
        flat = np.frombuffer(self._map, np.uint8, count=info.nbytes, offset=info.offset)
        return flat.reshape(-1, info.row_bytes)

    def forget(self, name: str, first: int, rows: int) -> None:
        """Rows of a tensor will not be read again soon: their pages need not stay in this process
        (the system keeps them as long as it has memory)."""
        info = self.tensors.get(name)
        if self._map is None or info is None:
            return
        begin = info.offset + first * info.row_bytes
        end = -(-(begin + rows * info.row_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE
        begin = begin // mmap.PAGESIZE * mmap.PAGESIZE
        # Whole pages, neighbours' bytes included: who still wants those reads them anew.
        self._map.madvise(mmap.MADV_DONTNEED, begin, min(end, len(self._map)) - begin)

    def close(self) -> None:
        """Let go of the mapping; idempotent.

        Views from `tensor_data` keep it alive: the memory is unmapped when the
        last of them is collected.
        """
        mapping, self._map = self._map, None
        if mapping is not None:
            try:
                mapping.close()
            except BufferError:
                pass  # views exist; dropping our reference leaves the unmapping to them

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<GGUFFile {self.path!r}, {len(self.tensors)} tensors>"


def _map_file(path: str) -> mmap.mmap:
    try:
        # O_NONBLOCK: opening a FIFO by mistake must not hang.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        raise ModelNotFoundError(f"{path}: no such model file; check the path") from None
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(f"{path!r}: cannot open the model file: {error}") from None
    try:
        status = os.fstat(fd)
        if stat.S_ISDIR(status.st_mode):
            raise ModelFormatError(f"{path}: is a directory, expected a GGUF file")
        if not stat.S_ISREG(status.st_mode):
            raise ModelFormatError(f"{path}: is not a regular file, expected a GGUF file")
        if status.st_size == 0:
            raise ModelFormatError(f"{path}: is empty, expected a GGUF file; download it again")
        return mmap.mmap(fd, status.st_size, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot map the model file: {error}") from None
    finally:
        os.close(fd)


def _read_header(cursor: _Cursor) -> tuple[int, int, int]:
    """Return (key count, tensor count, version)."""
    path = cursor.path
    magic = bytes(cursor.view[:4])
    if magic != MAGIC:
        raise ModelFormatError(
            f"{path}: is not a GGUF file: it starts with {magic!r}, expected {MAGIC!r}"
        )
    cursor.pos = 4
    version = cursor.unpack(_U32, "version")
    if version & 0xFFFF == 0 and version >> 16:
        raise UnsupportedModelError(
            f"{path}: is a big-endian GGUF; only little-endian files are read: convert it"
        )
    if version not in VERSIONS:
        raise UnsupportedModelError(
            f"{path}: is GGUF version {version}; versions 2 and 3 are read: convert it again"
        )
    tensor_count = cursor.unpack(_U64, "tensor count")
    key_count = cursor.unpack(_U64, "key count")
    for what, count, limit in (
        ("tensors", tensor_count, MAX_TENSORS),
        ("keys", key_count, MAX_KEYS),
    ):
        if count > limit:
            raise ModelFormatError(
                f"{path}: claims {count} {what}, at most {limit} are allowed; the file is corrupt"
            )
    return key_count, tensor_count, version


def _alignment(path: str, metadata: Mapping[str, object]) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if (
        isinstance(value, bool)
        or not isinstance(value, int)
        or not 1 <= value <= MAX_ALIGNMENT
        or value & (value - 1)
    ):
        raise ModelFormatError(
            f"{path}: general.alignment is {value!r}, expected a power of two up to "
            f"{MAX_ALIGNMENT}; the file is corrupt"
        )
    return value


def _read_tensor(cursor: _Cursor, index: int, alignment: int) -> TensorInfo:
    """Read one tensor record; its offset still counts from the data section."""
    path = cursor.path
    name = cursor.string(f"name of tensor {index}", MAX_TENSOR_NAME_BYTES)
    what = f"tensor {name!r}"
    dimensions = cursor.unpack(_U32, what)
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise ModelFormatError(
            f"{path}: {what} has {dimensions} dimensions, expected 1..{MAX_DIMENSIONS}; "
            "the file is corrupt"
        )
    shape = tuple(cursor.unpack(_U64, what) for _ in range(dimensions))[::-1]
    number = cursor.unpack(_U32, what)
    offset = cursor.unpack(_U64, what)
    try:
        kind = GGMLType(number)
    except ValueError:
        raise UnsupportedModelError(
            f"{path}: {what} has tensor type number {number}, which is not known; "
            "quantise the model to another type"
        ) from None
    if prod(shape) == 0:
        raise ModelFormatError(f"{path}: {what} has shape {shape}, expected no zero dimension")
    weights, size = BLOCK_SIZES[kind]
    if shape[-1] % weights:
        raise ModelFormatError(
            f"{path}: {what} is {kind.name} with rows of {shape[-1]} weights, expected a "
            f"multiple of {weights}; the file is corrupt"
        )
    if offset % alignment:
        raise ModelFormatError(
            f"{path}: {what} is at data offset {offset}, expected a multiple of the alignment "
            f"{alignment}; the file is corrupt"
        )
    return TensorInfo(
        name=name, shape=shape, type=kind, offset=offset, nbytes=prod(shape) // weights * size
    )


def _check_overlap(path: str, tensors: Mapping[str, TensorInfo]) -> None:
    end, last = 0, ""
    for info in sorted(tensors.values(), key=lambda info: info.offset):
        if info.offset < end:
            raise ModelFormatError(
                f"{path}: tensor {info.name!r} starts at byte {info.offset}, inside tensor "
                f"{last!r} which ends at {end}; the file is corrupt"
            )
        end, last = info.offset + info.nbytes, info.name
