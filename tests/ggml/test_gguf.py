# SPDX-License-Identifier: Apache-2.0
"""The GGUF reader against the `gguf` package, and against broken files."""

from __future__ import annotations

import gc
import mmap
import os
import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spanker.errors import (
    ModelError,
    ModelFormatError,
    ModelNotFoundError,
    UnsupportedModelError,
)
from spanker.ggml.gguf import BLOCK_SIZES, GGMLType, GGUFFile, StringArray

U32, STRING, ARRAY, BOOL = 4, 8, 9, 7
F32, Q4_0, Q4_1 = GGMLType.F32, GGMLType.Q4_0, GGMLType.Q4_1


# --- small files, byte by byte ------------------------------------------------


def text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str, kind: int, payload: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + payload


def array(kind: int, count: int, payload: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + payload


def tensor(
    name: str = "w", dims: tuple[int, ...] = (32,), kind: int = Q4_0, offset: int = 0
) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def build(
    pairs: list[bytes] = [],  # noqa: B006
    tensors: list[bytes] = [],  # noqa: B006
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    tensor_count: int | None = None,
    key_count: int | None = None,
    alignment: int = 32,
) -> bytes:
    head = magic + struct.pack(
        "<IQQ",
        version,
        len(tensors) if tensor_count is None else tensor_count,
        len(pairs) if key_count is None else key_count,
    )
    head += b"".join(pairs) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data


def open_bytes(tmp_path: Path, data: bytes) -> GGUFFile:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    return GGUFFile(path)


def write_reference(path: Path) -> dict[str, np.ndarray]:
    """A file with every kind of value, by the gguf package; returns its tensors' bytes."""
    rng = np.random.default_rng(11)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("t.u8", 200)
    writer.add_int8("t.i8", -3)
    writer.add_uint16("t.u16", 65535)
    writer.add_int16("t.i16", -300)
    writer.add_uint32("t.u32", 4_000_000_000)
    writer.add_int32("t.i32", -5)
    writer.add_uint64("t.u64", 2**63 + 1)
    writer.add_int64("t.i64", -(2**40))
    writer.add_float32("t.f32", 0.1)
    writer.add_float64("t.f64", 0.1)
    writer.add_bool("t.true", True)
    writer.add_bool("t.false", False)
    writer.add_string("t.text", "weiß\n")
    writer.add_array("t.texts", ["a", "", "ß" * 300, "Ġx", "\U0001f600"])
    writer.add_array("t.ints", [3, -1, 7])
    writer.add_array("t.floats", [0.5, -2.0])
    writer.add_array("t.bools", [True, False, True])
    plain = {
        "norm": rng.standard_normal(33).astype(np.float32),
        "matrix": rng.standard_normal((3, 64)).astype(np.float32),
        "cube": rng.standard_normal((2, 3, 5)).astype(np.float16),
    }
    quantised = {
        name: gguf.quants.quantize(
            rng.standard_normal((7, 64)).astype(np.float32), gguf.GGMLQuantizationType[name]
        )
        for name in ("Q4_0", "Q4_1", "Q8_0")
    }
    for name, values in plain.items():
        writer.add_tensor(name, values)
    for name, blocks in quantised.items():
        writer.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {**plain, **quantised}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    path = tmp_path_factory.mktemp("gguf") / "reference.gguf"
    return path, write_reference(path)


# --- what a good file says ----------------------------------------------------


@pytest.mark.parametrize("kind", GGMLType)
def test_block_sizes_and_numbers_equal_the_gguf_package(kind: GGMLType) -> None:
    theirs = gguf.GGMLQuantizationType(int(kind))
    assert theirs.name == kind.name
    assert gguf.GGML_QUANT_SIZES[theirs] == BLOCK_SIZES[kind]
    assert (kind.block_weights, kind.block_bytes) == BLOCK_SIZES[kind]


def test_metadata_equals_what_the_gguf_package_wrote(
    reference: tuple[Path, dict[str, np.ndarray]],
) -> None:
    with GGUFFile(reference[0]) as file:
        assert file.version == 3
        metadata = dict(file.metadata)
    expected = {
        "general.architecture": "llama",
        "t.u8": 200,
        "t.i8": -3,
        "t.u16": 65535,
        "t.i16": -300,
        "t.u32": 4_000_000_000,
        "t.i32": -5,
        "t.u64": 2**63 + 1,
        "t.i64": -(2**40),
        "t.f32": float(np.float32(0.1)),
        "t.f64": 0.1,
        "t.true": True,
        "t.false": False,
        "t.text": "weiß\n",
    }
    assert {key: metadata[key] for key in expected} == expected
    assert [type(metadata[key]) for key in expected] == [type(v) for v in expected.values()]
    assert isinstance(metadata["t.texts"], StringArray)
    assert metadata["t.texts"] == ["a", "", "ß" * 300, "Ġx", "\U0001f600"]
    for key, values in {
        "t.ints": [3, -1, 7],
        "t.floats": [0.5, -2.0],
        "t.bools": [True, False, True],
    }.items():
        found = metadata[key]
        assert isinstance(found, np.ndarray) and found.tolist() == values
    assert metadata["t.bools"].dtype == np.bool_


def test_tensors_equal_what_the_gguf_package_wrote(
    reference: tuple[Path, dict[str, np.ndarray]],
) -> None:
    path, tensors = reference
    whole = path.read_bytes()
    with GGUFFile(path) as file:
        assert list(file.tensors) == list(tensors)
        for name, values in tensors.items():
            info = file.tensors[name]
            data = file.tensor_data(name)
            assert data.tobytes() == values.tobytes()
            assert data.tobytes() == whole[info.offset : info.offset + info.nbytes]
            assert not data.flags.writeable
            del data
        assert file.tensors["norm"].shape == (33,)
        assert file.tensor_data("norm").shape == (1, 33 * 4)
        assert file.tensors["cube"].shape == (2, 3, 5)
        assert file.tensor_data("cube").shape == (6, 5 * 2)
        assert file.tensors["Q4_1"].shape == (7, 64)
        assert file.tensors["Q4_1"].type is Q4_1
        assert file.tensor_data("Q4_1").shape == (7, 40)


def test_real_model_equals_the_gguf_package(smollm2_path: Path) -> None:
    theirs = gguf.GGUFReader(smollm2_path)
    with GGUFFile(smollm2_path) as ours:
        assert [
            (t.name, tuple(t.shape.tolist()[::-1]), t.tensor_type.name, t.data_offset, t.n_bytes)
            for t in theirs.tensors
        ] == [(t.name, t.shape, t.type.name, t.offset, t.nbytes) for t in ours.tensors.values()]
        for key, value in ours.metadata.items():
            if isinstance(value, StringArray):
                contents = theirs.fields[key].contents()
                for index in (0, len(value) // 2, -1):
                    assert value[index] == contents[index]
                assert len(value) == len(contents)
            elif not isinstance(value, np.ndarray):
                assert value == theirs.fields[key].contents()


def test_version_2_is_read(tmp_path: Path) -> None:
    with open_bytes(tmp_path, build([pair("k", U32, b"\1\0\0\0")], version=2)) as file:
        assert (file.version, dict(file.metadata), dict(file.tensors)) == (2, {"k": 1}, {})


@pytest.mark.parametrize("alignment", [1, 8, 64, 4096])
def test_alignment_key_moves_the_data(tmp_path: Path, alignment: int) -> None:
    content = build(
        [pair("general.alignment", U32, struct.pack("<I", alignment))],
        [tensor(dims=(1,), kind=F32)],
        b"\x01\x02\x03\x04",
        alignment=alignment,
    )
    with open_bytes(tmp_path, content) as file:
        assert file.tensors["w"].offset % alignment == 0
        assert file.tensor_data("w").tolist() == [[1, 2, 3, 4]]


def test_string_array_behaves_like_a_sequence(tmp_path: Path) -> None:
    items = ["a", "bc", "", "däf"]
    content = build([pair("s", ARRAY, array(STRING, 4, b"".join(map(text, items))))])
    with open_bytes(tmp_path, content) as file:
        strings = file.metadata["s"]
    assert isinstance(strings, StringArray)
    assert list(strings) == strings.tolist() == items
    assert strings[-1] == "däf" and strings[1:3] == ("bc", "") and "bc" in strings
    with pytest.raises(IndexError):
        strings[4]


def test_empty_string_array(tmp_path: Path) -> None:
    with open_bytes(tmp_path, build([pair("s", ARRAY, array(STRING, 0, b""))])) as file:
        assert file.metadata["s"] == []


def test_bad_utf8_in_a_string_array_is_reported_when_read(tmp_path: Path) -> None:
    content = build([pair("s", ARRAY, array(STRING, 2, text("ok") + text(b"\xff\xfe")))])
    with open_bytes(tmp_path, content) as file:
        strings = file.metadata["s"]
    assert isinstance(strings, StringArray)
    assert strings[0] == "ok"
    with pytest.raises(ModelFormatError, match=r"value of 's': item 1 is not UTF-8"):
        strings[1]
    with pytest.raises(ModelFormatError, match="item 1 is not UTF-8"):
        strings.tolist()


STRINGS = st.lists(
    st.one_of(
        st.text(max_size=3),
        st.sampled_from(["", "\0", "a\0", "\0" * 7, "\0" * 8, "a" * 255, "a" * 256, "é" * 128]),
        st.sampled_from([7, 8, 15, 254, 257, 511, 512, 65536]).map("x".__mul__),
    ),
    max_size=12,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(STRINGS, st.binary(max_size=9) | st.just(bytes(40)))
def test_any_strings_are_read_as_they_are(tmp_path: Path, items: list[str], after: bytes) -> None:
    content = build(
        [
            pair("s", ARRAY, array(STRING, len(items), b"".join(map(text, items)))),
            pair("after", STRING, text(after.decode("latin-1"))),
        ]
    )
    with open_bytes(tmp_path, content) as file:
        strings = file.metadata["s"]
    assert isinstance(strings, StringArray)
    assert strings.tolist() == list(strings) == items
    assert strings == items and strings != [*items, ""]
    assert file.metadata["after"] == after.decode("latin-1")


@pytest.mark.parametrize("bad", [b"\xff", b"a\xffb", b"\xc3", b"\xe2\x82", b"\xed\xa0\x80"])
def test_bytes_that_are_no_text_are_found_among_short_strings(bad: bytes, tmp_path: Path) -> None:
    items = [b"ok", bad, b"\xa9", b"ok"]
    content = build([pair("s", ARRAY, array(STRING, 4, b"".join(map(text, items))))])
    with open_bytes(tmp_path, content) as file:
        strings = file.metadata["s"]
    assert isinstance(strings, StringArray)
    with pytest.raises(ModelFormatError, match="item 1 is not UTF-8"):
        strings.tolist()


# --- forgetting ----------------------------------------------------------------


def resident_bytes(path: Path) -> int:
    """Bytes of a mapped file that this process holds."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            ours = line.endswith(str(path))
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def random_tensors(rows: dict[str, int], row_floats: int) -> tuple[bytes, dict[str, np.ndarray]]:
    """A file of f32 tensors, one right behind the other, and their bytes."""
    rng = np.random.default_rng(3)
    records, data, expected = [], b"", {}
    for name, count in rows.items():
        values = rng.standard_normal((count, row_floats)).astype(np.float32)
        records.append(tensor(name, (row_floats, count), F32, len(data)))
        expected[name] = values.view(np.uint8)
        data += values.tobytes()
    return build(tensors=records, data=data), expected


def test_what_was_forgotten_reads_as_before(tmp_path: Path) -> None:
    """Rows of 96 bytes: pages hold rows of several tensors, and end within rows."""
    rows = {"a": 3, "b": 50, "c": 1, "d": 200, "e": 40}
    content, expected = random_tensors(rows, 24)
    with open_bytes(tmp_path, content) as file:
        views = {name: file.tensor_data(name) for name in rows}
        rng = np.random.default_rng(4)
        for turn in range(300):
            name = list(rows)[turn % len(rows)]
            first = int(rng.integers(rows[name]))
            file.forget(name, first, int(rng.integers(rows[name] - first + 1)))
            for other, view in views.items():
                assert np.array_equal(view, expected[other]), (turn, name, first, other)


def test_forgotten_rows_leave_this_process(tmp_path: Path) -> None:
    content, expected = random_tensors({"a": 256, "b": 256}, 1024)
    with open_bytes(tmp_path, content) as file:
        path = tmp_path / "model.gguf"
        a, b = file.tensor_data("a"), file.tensor_data("b")
        for _ in range(2):
            assert np.array_equal(a, expected["a"]) and np.array_equal(b, expected["b"])
            both = resident_bytes(path)
            assert both >= 2 << 20
            file.forget("a", 0, 256)
            # The system may let go of more: what it holds as one huge page goes as one.
            assert resident_bytes(path) <= both - (1 << 20) + mmap.PAGESIZE
            file.forget("b", 128, 128)
            file.forget("b", 0, 128)
            # The rest is the head of the file, and what the system reads ahead of it.
            assert resident_bytes(path) <= 128 << 10


def test_forgetting_what_is_not_there_does_nothing(tmp_path: Path) -> None:
    content, expected = random_tensors({"a": 5}, 24)
    file = open_bytes(tmp_path, content)
    view = file.tensor_data("a")
    file.forget("nope", 0, 5)
    file.forget("a", 2, 0)
    file.forget("a", 4, 1)  # to the last byte of the file
    file.close()
    file.forget("a", 0, 5)
    assert np.array_equal(view, expected["a"])


# --- closing ------------------------------------------------------------------


def test_views_and_metadata_outlive_close(
    reference: tuple[Path, dict[str, np.ndarray]],
) -> None:
    path, tensors = reference
    file = GGUFFile(path)
    view, texts = file.tensor_data("matrix"), file.metadata["t.texts"]
    file.close()
    file.close()
    assert view.tobytes() == tensors["matrix"].tobytes()
    assert texts[0] == "a"
    with pytest.raises(ModelError, match="closed"):
        file.tensor_data("matrix")


def test_nothing_stays_open(tmp_path: Path, reference: tuple[Path, dict[str, np.ndarray]]) -> None:
    gc.collect()  # what earlier tests dropped must not close now
    before = sorted(os.listdir("/proc/self/fd"))
    with GGUFFile(reference[0]) as file:
        view = file.tensor_data("matrix")
    del view
    with pytest.raises(ModelFormatError):
        open_bytes(tmp_path, build(tensors=[tensor()]))
    gc.collect()
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_unknown_tensor_name_is_named(reference: tuple[Path, dict[str, np.ndarray]]) -> None:
    with GGUFFile(reference[0]) as file, pytest.raises(ModelFormatError, match="'nope'"):
        file.tensor_data("nope")


# --- what is no GGUF file -----------------------------------------------------


def test_missing_file_directory_empty_file_and_fifo(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no such model file"):
        GGUFFile(tmp_path / "missing.gguf")
    with pytest.raises(ModelNotFoundError):
        GGUFFile(f"{tmp_path}/a\0b")
    with pytest.raises(ModelFormatError, match="is a directory"):
        GGUFFile(tmp_path)
    with pytest.raises(ModelFormatError, match="is empty"):
        open_bytes(tmp_path, b"")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ModelFormatError, match="not a regular file"):
        GGUFFile(tmp_path / "fifo")


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (b"GG", ModelFormatError, "not a GGUF file: it starts with b'GG'"),
        (build(magic=b"ggml"), ModelFormatError, "starts with b'ggml'"),
        (build(version=1), UnsupportedModelError, "version 1; versions 2 and 3"),
        (build(version=4), UnsupportedModelError, "version 4; versions 2 and 3"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), UnsupportedModelError, "big-endian"),
        (build(key_count=2**64 - 1), ModelFormatError, "claims 18446744073709551615 keys"),
        (build(tensor_count=2**40), ModelFormatError, "claims 1099511627776 tensors"),
        (build(key_count=1), ModelFormatError, "'' needs bytes"),
        (build([pair("k", 13, b"")]), ModelFormatError, "value of 'k' has value type 13"),
        (build([pair("k", BOOL, b"\2")]), ModelFormatError, "holds the bool 2"),
        (
            build([pair("k", ARRAY, array(BOOL, 2, b"\1\3"))]),
            ModelFormatError,
            "holds the bool 3",
        ),
        (build([pair("k", STRING, text(b"\xff"))]), ModelFormatError, "'k' is not UTF-8"),
        (
            build([pair("k", STRING, struct.pack("<Q", 2**63))]),
            ModelFormatError,
            "claims 9223372036854775808 bytes",
        ),
        (
            build([pair("k", ARRAY, array(U32, 2**62, b""))]),
            ModelFormatError,
            r"'k' \(4611686018427387904 items\) needs bytes",
        ),
        (
            build([pair("k", ARRAY, array(STRING, 2**62, b""))]),
            ModelFormatError,
            "claims 4611686018427387904 strings",
        ),
        (
            build([pair("k", ARRAY, array(STRING, 2, text("a") + struct.pack("<Q", 2**64 - 1)))]),
            ModelFormatError,
            "runs past the end",
        ),
        (
            build([pair("k", ARRAY, array(STRING, 1, struct.pack("<Q", 2**63 - 1)))]),
            ModelFormatError,
            "runs past the end",
        ),
        (
            build([pair("k", ARRAY, array(ARRAY, 0, b""))]),
            UnsupportedModelError,
            "'k' is an array of arrays",
        ),
        (build([pair("k", BOOL, b"\0")] * 2), ModelFormatError, "key 'k' occurs twice"),
        (
            build([pair("general.alignment", U32, struct.pack("<I", 48))]),
            ModelFormatError,
            "general.alignment is 48, expected a power of two",
        ),
        (
            build([pair("general.alignment", U32, bytes(4))]),
            ModelFormatError,
            "general.alignment is 0",
        ),
        (
            build([pair("general.alignment", STRING, text("32"))]),
            ModelFormatError,
            "general.alignment is '32'",
        ),
        (build(tensors=[tensor("n" * 65)], data=bytes(18)), ModelFormatError, "at most 64"),
        (build(tensors=[tensor(dims=())], data=bytes(18)), ModelFormatError, "0 dimensions"),
        (build(tensors=[tensor(dims=(1,) * 5)]), ModelFormatError, "5 dimensions, expected 1..4"),
        (build(tensors=[tensor(dims=(32, 0))]), ModelFormatError, r"shape \(0, 32\)"),
        (build(tensors=[tensor(dims=(33,))]), ModelFormatError, "Q4_0 with rows of 33 weights"),
        (build(tensors=[tensor(kind=4)]), UnsupportedModelError, "'w' has tensor type number 4"),
        (build(tensors=[tensor(kind=999)]), UnsupportedModelError, "tensor type number 999"),
        (
            build(tensors=[tensor(offset=8)], data=bytes(64)),
            ModelFormatError,
            "data offset 8, expected a multiple of the alignment 32",
        ),
        (
            build(tensors=[tensor()] * 2, data=bytes(64)),
            ModelFormatError,
            "tensor 'w' occurs twice",
        ),
        (
            build(tensors=[tensor("a"), tensor("b")], data=bytes(64)),
            ModelFormatError,
            "'b' starts at byte 96, inside tensor 'a' which ends at 114",
        ),
        (
            build(tensors=[tensor("blk.3.ffn_up.weight")], data=bytes(17)),
            ModelFormatError,
            r"tensor 'blk.3.ffn_up.weight' needs bytes 96..114 but the file ends at 113; the file "
            "is truncated: download it again",
        ),
        (
            build(tensors=[tensor(offset=2**64 - 32)], data=bytes(64)),
            ModelFormatError,
            "the file ends at",
        ),
        (
            build(tensors=[tensor(dims=(2**63, 2**63, 2**63, 2**63), kind=F32)], data=bytes(64)),
            ModelFormatError,
            "the file ends at",
        ),
    ],
)
def test_a_bad_file_is_refused_by_name(
    tmp_path: Path, content: bytes, error: type[ModelError], message: str
) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(error, match=message) as caught:
            open_bytes(tmp_path, content)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert str(tmp_path / "model.gguf") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_prefix_is_refused(
    tmp_path: Path, reference: tuple[Path, dict[str, np.ndarray]]
) -> None:
    whole = reference[0].read_bytes()
    with GGUFFile(reference[0]) as file:
        end = max(t.offset + t.nbytes for t in file.tensors.values())
    path = tmp_path / "cut.gguf"
    for length in range(end):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelFormatError):
            GGUFFile(path)
    path.write_bytes(whole[:end])
    GGUFFile(path).close()


@settings(
    deadline=None,
    max_examples=300,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_a_mutated_file_is_read_or_refused(
    tmp_path: Path, reference: tuple[Path, dict[str, np.ndarray]], data: st.DataObject
) -> None:
    content = bytearray(reference[0].read_bytes())
    with GGUFFile(reference[0]) as file:
        header = min(t.offset for t in file.tensors.values())
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.integers(0, header - 1))
        content[where] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(content))))
    path = tmp_path / "mutated.gguf"
    path.write_bytes(content[:cut])
    tracemalloc.start()
    try:
        with GGUFFile(path) as file:
            for value in file.metadata.values():
                if isinstance(value, StringArray):
                    value.tolist()
            for name, info in file.tensors.items():
                assert file.tensor_data(name).nbytes == info.nbytes
    except ModelError as error:
        assert "\n" not in str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 16 << 20
