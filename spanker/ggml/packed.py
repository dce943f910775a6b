# SPDX-License-Identifier: Apache-2.0
"""Packed copies of models: weights on disk as cards hold them, mapped where others are packed.

`spanker pack` writes a copy into the cache, and whoever loads that model finds it.  Here live its
layout and what makes a copy the right one.  A card's share of a matrix is a run of whole tiles, so
one copy serves every plan and every number of cards.

Layout, little endian: a header of MAGIC, version (u32), bytes of the index (u32) and the index's
CRC-32 (u32); the index in msgpack; the matrices, each packed as a whole (spk_tiles.h), at a
multiple of ALIGN.  The index names the file that was packed, by path, size, time and the CRC-32 of
its beginning, and says of each matrix its format, rows, k and place.  A copy of another file, or
of another version, is none.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import attrs
import msgpack
import numpy as np
import numpy.typing as npt

from spanker.errors import ModelError
from spanker.ggml import files
from spanker.ggml.catalog import cache_dir
from spanker.ggml.gguf import GGUFFile
from spanker.kernels.formats import Format, pack, packed_bytes
from spanker.sched.plan import TILE_ROWS, WeightShape
from spanker.values import Value, lazy_frozen

MAGIC = b"SPKPACK\0"
# Changes with the layout of the file and with that of tiles.
VERSION = 1
ALIGN = 64
SUFFIX = ".packed"

_HEADER = struct.Struct("<8sIII")
_INDEX_BYTES_MAX = 16 << 20
# Whole huge pages at a time: so the system keeps them, and maps them as what they are.
_WRITE_BYTES = 8 << 20
_HUGE_PAGE = 2 << 20
_SAMPLES = 4
_BEGINNING_BYTES = 64 << 10

Progress = Callable[[int, int], None]


@attrs.frozen(eq=False, repr=False)
class _Matrix(Value):
    format: int
    rows: int
    k: int
    offset: int
    nbytes: int


@attrs.frozen(eq=False, repr=False)
class _Source(Value):
    """What tells a file from another one of the same name."""

    path: str
    size: int
    mtime_ns: int
    beginning: int

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> _Source:
        real = os.path.realpath(path)
        with open(real, "rb") as file:
            status = os.fstat(file.fileno())
            beginning = zlib.crc32(file.read(_BEGINNING_BYTES))
        return cls(real, status.st_size, status.st_mtime_ns, beginning)


@attrs.frozen(eq=False, repr=False)
class _Index(Value):
    source: _Source
    matrices: Mapping[str, _Matrix]


class PackedFile:
    """An open packed copy.  Thread-safe but for `close`."""

    def __init__(self, path: Path, fd: int, matrices: Mapping[str, _Matrix]) -> None:
        self.path = path
        self._fd = fd
        self._matrices = matrices

    @classmethod
    def find(cls, gguf: GGUFFile) -> PackedFile | None:
        """The packed copy of a model file, open, or None where there is none that is right."""
        path = path_of(gguf.path)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        index = None
        try:
            index = _read_index(fd)
            if index is not None and index.source != _Source.of(gguf.path):
                index = None
        finally:
            if index is None:
                os.close(fd)
        return None if index is None else cls(path, fd, index.matrices)

    @property
    def fd(self) -> int:
        """Its descriptor, until it is closed."""
        return self._fd

    def place(self, weight: WeightShape, format: Format, first: int, rows: int) -> int | None:
        """Where in the file the packed rows [first, first + rows) of a matrix begin; None where
        they are not to be had like that."""
        matrix = self._matrices.get(weight.name)
        if matrix is None or (matrix.format, matrix.rows, matrix.k) != (
            format,
            weight.rows,
            weight.k,
        ):
            return None
        last = first + rows
        if first % TILE_ROWS or (last % TILE_ROWS and last != weight.rows):
            return None
        return matrix.offset + first * weight.row_bytes

    def read(self, offset: int, out: npt.NDArray[np.uint8]) -> None:
        """Fill `out` from there.  Blocks on the disk; ModelError where the file has ended."""
        view = out.data
        while view:
            count = os.preadv(self._fd, [view], offset)
            if not count:
                raise ModelError(
                    f"{self.path} ends at byte {offset:,}: it was cut off; remove it, or write it "
                    f"anew with `spanker pack`"
                )
            view, offset = view[count:], offset + count

    def is_huge(self) -> bool:
        """Whether the system maps the file in huge pages, from which weights are read a quarter
        faster than from small ones.  Looks at samples, which may have to come from the disk."""
        with mmap.mmap(self._fd, 0, access=mmap.ACCESS_READ) as mapping:
            pages = len(mapping) // _HUGE_PAGE
            if pages < 2:
                return True  # it makes no difference
            with contextlib.suppress(OSError):  # a kernel without huge pages
                mapping.madvise(mmap.MADV_HUGEPAGE)
            samples = min(_SAMPLES, pages)
            for sample in range(samples):
                _ = mapping[sample * (pages - 1) // max(samples - 1, 1) * _HUGE_PAGE]
            return _huge_bytes(self.path) >= samples * _HUGE_PAGE

    def close(self) -> None:
        """Mappings of it stay; idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> PackedFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _huge_bytes(path: Path) -> int:
    """Bytes of a file that this process has mapped in huge pages."""
    found, name = 0, os.fsencode(os.path.realpath(path))
    ours = False
    with contextlib.suppress(OSError), open("/proc/self/smaps", "rb") as smaps:
        for line in smaps:
            if not line[:1].isupper():  # "55d0...-55d1... r--p 00000000 08:01 123   /a/path"
                ours = line.rstrip(b"\n").endswith(name)
            elif ours and line.startswith(b"FilePmdMapped:"):
                found += int(line.split()[1]) << 10
    return found


# --- finding ---------------------------------------------------------------------------


def path_of(model: str | os.PathLike[str]) -> Path:
    """Where the packed copy of a model file is, if there is one."""
    real = os.path.realpath(model)
    key = hashlib.sha256(os.fsencode(real)).hexdigest()[:16]
    return cache_dir() / "packed" / f"{Path(real).stem}-{key}{SUFFIX}"


def _read_index(fd: int) -> _Index | None:
    """None for whatever is not a whole copy of this version: the model is packed anew then."""
    size = os.fstat(fd).st_size
    header = os.pread(fd, _HEADER.size, 0)
    if len(header) < _HEADER.size:
        return None
    magic, version, nbytes, crc = _HEADER.unpack(header)
    if magic != MAGIC or version != VERSION or not 0 < nbytes <= min(_INDEX_BYTES_MAX, size):
        return None
    body = os.pread(fd, nbytes, _HEADER.size)
    if len(body) != nbytes or zlib.crc32(body) != crc:
        return None
    try:
        source, entries = msgpack.unpackb(body)
        matrices = {name: _Matrix(*fields) for name, fields in entries.items()}
        index = _Index(_Source(*source), matrices)
        whole = all(m.offset + m.nbytes <= size for m in matrices.values())
    except (ValueError, TypeError, AttributeError, msgpack.UnpackException):
        return None
    return index if whole else None


# --- writing ----------------------------------------------------------------------------


def write(
    gguf: GGUFFile,
    weights: Sequence[tuple[WeightShape, Format]],
    progress: Progress | None = None,
) -> Path:
    """Pack these matrices of a file into the cache; return the path of the copy.

    Blocks for seconds a gigabyte.  The copy appears at once and whole, in the place of an earlier
    one; whatever ends this, nothing else is left.  `progress` gets bytes done and in all.  Raises
    ModelError where it cannot be stored.
    """
    path = path_of(gguf.path)
    index, total = _index(gguf, weights)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if free < total:
            raise ModelError(
                f"the packed copy of {gguf.path} takes {total / 1e6:,.0f} MB and {path.parent} has "
                f"{free / 1e6:,.0f} MB; free some space or set SPANKER_CACHE to another directory"
            )
        with files.locked(path.with_name(f".{path.name}.lock")):
            # Left by one that was killed: the lock says that nobody is writing it.
            new = path.with_name(f".{path.name}.new")
            try:
                with open(new, "wb") as file:
                    done = 0
                    for piece in _joined(_content(gguf, weights, index, total)):
                        file.write(piece)
                        done += len(piece)
                        if progress is not None:
                            progress(done, total)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(new, path)
                files.sync_directory(path.parent)
            finally:
                new.unlink(missing_ok=True)
    except OSError as error:
        raise ModelError(
            f"cannot store the packed copy of {gguf.path} as {path}: {error.strerror or error}; "
            f"check the directory, or set SPANKER_CACHE to another"
        ) from None
    return path


def _index(gguf: GGUFFile, weights: Sequence[tuple[WeightShape, Format]]) -> tuple[bytes, int]:
    """Header and index of a copy, up to the first matrix, and the bytes of all of it."""
    source = attrs.astuple(_Source.of(gguf.path))

    def made(start: int) -> tuple[bytes, int]:
        entries: dict[str, list[int]] = {}
        at = start
        for shape, format in weights:
            nbytes = packed_bytes(format, shape.rows, shape.k)
            entries[shape.name] = [int(format), shape.rows, shape.k, at, nbytes]
            at += -(-nbytes // ALIGN) * ALIGN
        body = msgpack.packb([source, entries])
        return _HEADER.pack(MAGIC, VERSION, len(body), zlib.crc32(body)) + body, at

    # Offsets take more bytes the larger they are: an index whose offsets are all too large has room
    # for the right one.
    room = -(-len(made(1 << 62)[0]) // ALIGN) * ALIGN
    index, total = made(room)
    return index.ljust(room, b"\0"), total


def _content(
    gguf: GGUFFile,
    weights: Sequence[tuple[WeightShape, Format]],
    index: bytes,
    total: int,
) -> Iterator[bytes | npt.NDArray[np.uint8]]:
    """The file's bytes, in order."""
    at = len(index)
    yield index
    packed = np.empty(0, np.uint8)
    for shape, format in weights:
        begin = -(-at // ALIGN) * ALIGN
        data = gguf.tensor_data(shape.name)
        step = max(_WRITE_BYTES // shape.row_bytes // TILE_ROWS, 1) * TILE_ROWS
        for first in range(0, shape.rows, step):
            rows = min(step, shape.rows - first)
            nbytes = packed_bytes(format, rows, shape.k)
            packed = packed if packed.size == nbytes else np.empty(nbytes, np.uint8)
            pack(format, data[first : first + rows], shape.k, packed)
            gguf.forget(shape.name, first, rows)
            if begin > at:
                yield bytes(begin - at)
                at = begin
            yield packed
            at += nbytes
    yield bytes(total - at)


def _joined(pieces: Iterator[bytes | npt.NDArray[np.uint8]]) -> Iterator[memoryview]:
    """The same bytes in writes of _WRITE_BYTES."""
    block, used = memoryview(bytearray(_WRITE_BYTES)), 0
    for piece in pieces:
        rest = piece.data if isinstance(piece, np.ndarray) else memoryview(piece)
        while rest:
            count = min(len(rest), _WRITE_BYTES - used)
            block[used : used + count] = rest[:count]
            used, rest = used + count, rest[count:]
            if used == _WRITE_BYTES:
                yield block
                used = 0
    if used:
        yield block[:used]


# --- those there are ---------------------------------------------------------------------


@lazy_frozen
class Copy(Value):
    """A packed copy in the cache: of what, and whether it is what loading that would find."""

    path: Path
    source: Path
    nbytes: int
    current: bool


def copies() -> list[Copy]:
    """All packed copies of this version, by the model's path."""
    found: list[Copy] = []
    for path in (cache_dir() / "packed").glob(f"*{SUFFIX}"):
        with contextlib.suppress(OSError), open(path, "rb") as file:
            index = _read_index(file.fileno())
            if index is not None:
                try:
                    current = _Source.of(index.source.path) == index.source
                except OSError:
                    current = False
                nbytes = os.fstat(file.fileno()).st_size
                found.append(Copy(path, Path(index.source.path), nbytes, current))
    return sorted(found, key=lambda copy: copy.source)


def remove(model: str | os.PathLike[str]) -> bool:
    """Remove the packed copy of a model file; whether there was one.  Who maps it keeps it."""
    try:
        path_of(model).unlink()
    except FileNotFoundError:
        return False
    return True
