# SPDX-License-Identifier: Apache-2.0
"""The `llama` architecture: reading its GGUF, and its program for each card of a plan.

Whatever in a file could change the result and is not understood here is refused by name.

One layer on one card of a stage; h is the hidden row, and every card of the stage holds it whole:

    xn = rmsnorm(x)                             all of h, redundantly on every card
    q, k, v = W xn                              this card's heads
    rope(q), rope(k); KV append; attention      this card's heads
    gather                                      Q8 blocks (or floats) of the heads
    [k, v to who keeps a copy; KV append there] where copies of KV are wanted
    y = Wo att          gather y; x += y        this card's rows of h
    xn = rmsnorm(x); gate, up = W xn; swiglu    this card's rows of the FFN
    gather                                      Q8 blocks (or floats) of the FFN
    y = Wdown act       gather y; x += y        this card's rows of h
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import attrs
import numpy as np
import numpy.typing as npt

from spanker import collecting
from spanker.errors import ModelFormatError, UnsupportedModelError
from spanker.ggml import rope
from spanker.ggml.gguf import GGUFFile, TensorInfo
from spanker.kernels import program as op
from spanker.kernels.formats import Format, pack, row_bytes
from spanker.kernels.program import Command, Program, Ref, Transfer
from spanker.kernels.reference import dequantize_row
from spanker.sched.copies import keeper, ward, ward_heads
from spanker.sched.detours import ALL_UP, Down, choice_phases, gather_phases, handover_phases
from spanker.sched.layout import chunks, embeds_from_output, layer_rows, q8_bytes
from spanker.sched.moves import Move
from spanker.sched.plan import (
    Q8_BLOCK,
    CardShare,
    LayerShape,
    Limits,
    ModelShape,
    Plan,
    Stage,
    WeightShape,
)
from spanker.sched.resharding import Content, contents
from spanker.sched.shares import Share
from spanker.values import Value, lazy_frozen

if TYPE_CHECKING:
    from spanker.ggml.packed import PackedFile

# A card's columns of the embedding, and all of it.
COLUMNS = "token_embd.weight.columns"
TABLE = "token_embd.weight"

DIMENSION_MAX = 1 << 20
LAYERS_MAX = 4096

# Keys of the architecture that are read or concern a kind of norm that llama has not, and those
# whose neutral value changes nothing.
_READ = frozenset(
    {
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.layer_norm_epsilon",
        "attention.layer_norm_rms_epsilon",
        "rope.freq_base",
        "rope.dimension_count",
        "vocab_size",
    }
)
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "attention.causal": (True,),
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (0, 1),
    "rope.scale_linear": (0, 1),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "logit_scale": (0, 1),
    "embedding_scale": (0, 1),
    "residual_scale": (0, 1),
    "attention.sliding_window": (0,),
    "attention.clamp_kqv": (0,),
    "use_parallel_residual": (True, False),
    "tensor_data_layout": ("Meta AI original pth",),
}
# Families of keys outside of the architecture that cannot change the forward pass.
_INERT = ("general.", "tokenizer.", "quantize.", "split.", "mradermacher.", "prefix.")


# --- the model -----------------------------------------------------------------------


@attrs.frozen(eq=False, repr=False)
class Weight(Value):
    """A weight matrix, under the name of its shape."""

    format: Format
    shape: WeightShape


@attrs.frozen(eq=False, repr=False)
class LlamaModel(Value):
    """A llama model: its shape for planning, and what else its programs depend on.

    Its tensors are in the GGUF that it was read from, or nowhere: see `outline`.
    """

    shape: ModelShape
    rms_eps: float
    rope_base: float
    weights: Mapping[str, Weight]
    tied: bool

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that one decode step reads (the embedding apart)."""
        layers = sum(layer.weight_bytes for layer in self.shape.layers)
        return layers + self.shape.output.rows * self.shape.output.row_bytes

    @property
    def multiplied(self) -> tuple[tuple[WeightShape, Format], ...]:
        """The matrices that cards hold packed: all but an embedding that is only looked up."""
        shapes = [m for layer in self.shape.layers for m in layer.matrices]
        return tuple((m, self.weights[m.name].format) for m in (*shapes, self.shape.output))


def _bad(gguf: GGUFFile, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{gguf.path}: {what}")


def _format(info: TensorInfo) -> Format | None:
    """The tensor's format, or None where no kernel multiplies it."""
    return next((f for f in Format if f == int(info.type)), None)


class _Keys:
    """Typed access to the metadata of one file, with errors that name key and file."""

    def __init__(self, gguf: GGUFFile) -> None:
        self.gguf = gguf

    def integer(self, name: str, default: int | None = None, limit: int = DIMENSION_MAX) -> int:
        value = self.gguf.metadata.get(f"llama.{name}", default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise _bad(
                self.gguf,
                f"key llama.{name} must be one integer, got {_brief(value)}; "
                f"models with different values per layer are not supported",
            )
        if not 1 <= value <= limit:
            raise ModelFormatError(
                f"{self.gguf.path}: key llama.{name} must be 1 to {limit}, got {value}"
            )
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.gguf.metadata.get(f"llama.{name}", default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _bad(self.gguf, f"key llama.{name} must be a number, got {_brief(value)}")
        if not math.isfinite(value) or value <= 0:
            raise ModelFormatError(
                f"{self.gguf.path}: key llama.{name} must be positive, got {value}"
            )
        return float(value)


def _brief(value: object) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _check_keys(gguf: GGUFFile) -> None:
    architecture = gguf.metadata.get("general.architecture")
    if not _is(architecture, "llama"):
        raise _bad(
            gguf, f"architecture {_brief(architecture)} is not supported; supported: 'llama'"
        )
    kind = gguf.metadata.get("general.type", "model")
    if not _is(kind, "model"):
        raise _bad(gguf, f"this file holds a {_brief(kind)}, not a model")
    if not _is(gguf.metadata.get("split.count", 0), 0, 1):
        raise _bad(gguf, "the model is split over several files; merge them into one GGUF first")
    for key, value in gguf.metadata.items():
        if key.startswith("llama."):
            name = key[len("llama.") :]
            if name in _READ or (name in _NEUTRAL and _is(value, *_NEUTRAL[name])):
                continue
            raise _bad(
                gguf,
                f"key {key} = {_brief(value)} would change the result and is not supported",
            )
        if not key.startswith(_INERT):
            raise _bad(gguf, f"key {key} = {_brief(value)} is not understood")


def _is(value: object, *wanted: object) -> bool:
    """Whether a value is one of those wanted; arrays, which compare by element, never are."""
    return isinstance(value, bool | int | float | str) and value in wanted


@collecting.paused()
def read_model(gguf: GGUFFile) -> LlamaModel:
    """Check a GGUF's keys and tensors and describe its model.

    Raises UnsupportedModelError for what is not understood, ModelFormatError for contradictions.
    """
    _check_keys(gguf)
    keys = _Keys(gguf)
    layer_count = keys.integer("block_count", limit=LAYERS_MAX)
    hidden = keys.integer("embedding_length")
    ffn = keys.integer("feed_forward_length")
    heads = keys.integer("attention.head_count", limit=65536)
    kv_heads = keys.integer("attention.head_count_kv", heads, limit=65536)
    if hidden % heads and "llama.attention.key_length" not in gguf.metadata:
        raise ModelFormatError(f"{gguf.path}: {heads} heads do not divide the hidden size {hidden}")
    head_dim = keys.integer("attention.key_length", hidden // heads, limit=65536)
    if keys.integer("attention.value_length", head_dim) != head_dim:
        raise _bad(gguf, "keys and values of different head sizes are not supported")
    rope_dim = keys.integer("rope.dimension_count", head_dim, limit=65536)
    if heads % kv_heads or rope_dim > head_dim or rope_dim % 2:
        raise ModelFormatError(
            f"{gguf.path}: {heads} heads, {kv_heads} KV heads, head size {head_dim} and rotated "
            f"size {rope_dim} do not go together"
        )

    weights: dict[str, Weight] = {}
    seen: set[str] = set()

    def tensor(name: str, *shape: int) -> TensorInfo:
        info = gguf.tensors.get(name)
        if info is None:
            raise ModelFormatError(f"{gguf.path}: tensor {name!r} is missing")
        if info.shape != shape:
            raise ModelFormatError(
                f"{gguf.path}: tensor {name!r} must have shape {shape}, got {info.shape}"
            )
        seen.add(name)
        return info

    def norm(name: str) -> None:
        info = tensor(name, hidden)
        fmt = _format(info)
        if fmt is None or not fmt.is_float:
            raise _bad(gguf, f"tensor {name!r} must be F32, F16 or BF16, got {info.type.name}")

    def weight(name: str, rows: int, k: int) -> WeightShape:
        info = tensor(name, rows, k)
        fmt = _format(info)
        if fmt is None:
            supported = ", ".join(f.name for f in Format)
            raise _bad(
                gguf,
                f"tensor {name!r} has format {info.type.name}; supported formats: {supported}",
            )
        shape = WeightShape(
            name=name,
            rows=rows,
            k=k,
            row_bytes=row_bytes(fmt, k),
            quantized=not fmt.is_float,
            columns_unit=fmt.block,
            unit_bytes=row_bytes(fmt, fmt.block),
        )
        weights[name] = Weight(fmt, shape)
        return shape

    if "token_embd.weight" not in gguf.tensors:
        raise ModelFormatError(f"{gguf.path}: tensor 'token_embd.weight' is missing")
    vocabulary = gguf.tensors["token_embd.weight"].shape[0]
    if not 1 <= vocabulary <= 1 << 24:
        raise ModelFormatError(f"{gguf.path}: a vocabulary of {vocabulary} is out of range")
    if not _is(gguf.metadata.get("llama.vocab_size", vocabulary), vocabulary):
        raise ModelFormatError(
            f"{gguf.path}: key llama.vocab_size is {_brief(gguf.metadata['llama.vocab_size'])}, "
            f"but the embedding has {vocabulary} rows"
        )
    embedding = weight("token_embd.weight", vocabulary, hidden)
    tied = "output.weight" not in gguf.tensors
    output = embedding if tied else weight("output.weight", vocabulary, hidden)
    norm("output_norm.weight")
    layers: list[LayerShape] = []
    for i in range(layer_count):
        norm(f"blk.{i}.attn_norm.weight")
        norm(f"blk.{i}.ffn_norm.weight")
        layers.append(
            LayerShape(
                attn_q=weight(f"blk.{i}.attn_q.weight", heads * head_dim, hidden),
                attn_k=weight(f"blk.{i}.attn_k.weight", kv_heads * head_dim, hidden),
                attn_v=weight(f"blk.{i}.attn_v.weight", kv_heads * head_dim, hidden),
                attn_output=weight(f"blk.{i}.attn_output.weight", hidden, heads * head_dim),
                ffn_gate=weight(f"blk.{i}.ffn_gate.weight", ffn, hidden),
                ffn_up=weight(f"blk.{i}.ffn_up.weight", ffn, hidden),
                ffn_down=weight(f"blk.{i}.ffn_down.weight", hidden, ffn),
            )
        )
    extra = sorted(set(gguf.tensors) - seen)
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise _bad(
            gguf,
            f"tensor {extra[0]!r}{more} is not part of a llama model as understood here, "
            f"and leaving it out would change the result",
        )
    return LlamaModel(
        shape=ModelShape(
            hidden=hidden,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            rope_dim=rope_dim,
            ffn=ffn,
            vocabulary=vocabulary,
            context=keys.integer("context_length", limit=1 << 24),
            layers=tuple(layers),
            embedding=embedding,
            output=output,
        ),
        rms_eps=keys.number("attention.layer_norm_rms_epsilon"),
        rope_base=keys.number("rope.freq_base", 10000.0),
        weights=weights,
        tied=tied,
    )


# Of a format without blocks the first: no shape tells bfloat16 from float16.
_BY_BLOCK = {(f.block, row_bytes(f, f.block)): f for f in reversed(Format)}


def outline(shape: ModelShape, *, rms_eps: float = 1e-5, rope_base: float = 10000.0) -> LlamaModel:
    """A model of this shape without a file.  It plans, loads and runs like any other; all its
    weights are zero, and so are its logits."""
    matrices = [matrix for layer in shape.layers for matrix in layer.matrices]
    matrices += [shape.embedding, shape.output]
    return LlamaModel(
        shape=shape,
        rms_eps=rms_eps,
        rope_base=rope_base,
        weights={m.name: Weight(_BY_BLOCK[m.columns_unit, m.unit_bytes], m) for m in matrices},
        tied=shape.embedding.name == shape.output.name,
    )


# --- what is uploaded ------------------------------------------------------------------

# A piece of an upload: packing and sending go in pieces of about this many bytes.
UPLOAD_BYTES = 2 << 20


@attrs.frozen(eq=False, repr=False)
class Piece(Value):
    """Bytes [offset, offset + nbytes) of a buffer.  `fill` writes them into a contiguous uint8
    array of just that size; any thread may call it, once."""

    offset: int
    nbytes: int
    fill: Callable[[npt.NDArray[np.uint8]], None]


@attrs.frozen(eq=False, repr=False)
class Upload(Value):
    """A buffer's content, in pieces that are made when they are wanted."""

    buffer: str
    nbytes: int
    pieces: tuple[Piece, ...]
    place: int | None = None
    """Where in the model's packed copy these very bytes are."""


def _whole(buffer: str, data: npt.NDArray[np.generic]) -> Upload:
    flat = np.ascontiguousarray(data).reshape(-1).view(np.uint8)

    def piece(begin: int) -> Piece:
        part = flat[begin : begin + UPLOAD_BYTES]

        def fill(out: npt.NDArray[np.uint8]) -> None:
            out[:] = part

        return Piece(begin, part.size, fill)

    return Upload(buffer, flat.size, tuple(map(piece, range(0, flat.size, UPLOAD_BYTES))))


def _zeros(out: npt.NDArray[np.uint8]) -> None:
    out[:] = 0


def _packed_rows(
    gguf: GGUFFile | None,
    packed: PackedFile | None,
    weight: Weight,
    content: Content,
    offset: int,
) -> Upload:
    buffer, first, rows = content.buffer, content.first, content.stop - content.first
    if packed is not None:
        place = packed.place(weight.shape, weight.format, first, rows)
        if place is not None:
            return _copied(packed, place, buffer, content.nbytes, offset)
    step = max(UPLOAD_BYTES // weight.shape.row_bytes // 16 * 16, 16)
    name = weight.shape.name
    data = None if gguf is None else gguf.tensor_data(name)

    def piece(begin: int) -> Piece:
        count = min(step, rows - begin)

        def fill(out: npt.NDArray[np.uint8]) -> None:
            assert gguf is not None and data is not None
            at = first + begin
            pack(weight.format, data[at : at + count], weight.shape.k, out)
            gguf.forget(name, at, count)

        at = offset + begin * weight.shape.row_bytes
        return Piece(at, weight.shape.packed_bytes(count), _zeros if gguf is None else fill)

    return Upload(buffer, content.nbytes, tuple(map(piece, range(0, rows, step))))


def _copied(packed: PackedFile, place: int, buffer: str, nbytes: int, offset: int) -> Upload:
    def piece(begin: int) -> Piece:
        fill = functools.partial(packed.read, place + begin)
        return Piece(offset + begin, min(UPLOAD_BYTES, nbytes - begin), fill)

    return Upload(buffer, nbytes, tuple(map(piece, range(0, nbytes, UPLOAD_BYTES))), place)


def _columns(gguf: GGUFFile | None, weight: Weight, content: Content) -> Upload:
    begin, end = (edge * weight.shape.unit_bytes for edge in (content.first, content.stop))
    width, rows = end - begin, weight.shape.rows
    step = max(UPLOAD_BYTES // width, 1)
    name = weight.shape.name
    data = None if gguf is None else gguf.tensor_data(name)

    def piece(row: int) -> Piece:
        count = min(step, rows - row)

        def fill(out: npt.NDArray[np.uint8]) -> None:
            assert gguf is not None and data is not None
            out.reshape(count, width)[:] = data[row : row + count, begin:end]
            gguf.forget(name, row, count)

        return Piece(row * width, count * width, _zeros if gguf is None else fill)

    return Upload(content.buffer, rows * width, tuple(map(piece, range(0, rows, step))))


def _norm(model: LlamaModel, gguf: GGUFFile | None, name: str) -> Upload:
    weights = np.zeros(model.shape.hidden, np.float32)
    if gguf is not None:
        kind = gguf.tensors[name].type.name.lower()
        weights = dequantize_row(kind, gguf.tensor_data(name))
    return _whole(name, weights)


def upload(
    model: LlamaModel,
    gguf: GGUFFile | None,
    limits: Limits,
    content: Content,
    packed: PackedFile | None = None,
    offset: int = 0,
) -> Upload:
    """What must be written into a buffer from `offset` on so that it has this content there."""
    buffer = content.buffer
    if buffer == "rope":
        return _whole(buffer, rope.table(limits.context, model.shape.rope_dim, model.rope_base))
    if buffer.endswith("_norm.weight"):
        return _norm(model, gguf, buffer)
    if buffer == COLUMNS:
        return _columns(gguf, model.weights["token_embd.weight"], content)
    name = model.shape.output.name if buffer == "output.rows" else buffer
    return _packed_rows(gguf, packed, model.weights[name], content, offset)


@collecting.paused()
def uploads(
    model: LlamaModel,
    gguf: GGUFFile | None,
    plan: Plan,
    card: int,
    limits: Limits,
    packed: PackedFile | None = None,
) -> tuple[Upload, ...]:
    """What must be written into a card's buffers before its program can run; without a file all
    weights are zero.  What a packed copy of the file has is read from there."""
    return tuple(
        upload(model, gguf, limits, content, packed)
        for content in contents(model.shape, plan, card, limits.context)
    )


@lazy_frozen
class HeldRows(Value):
    """Rows [first, first + count) of a matrix that a card holds, packed from the start of `buffer`
    on; what they are multiplied with lies in `activations`, a row for each token or output."""

    buffer: str
    activations: str
    weight: Weight
    first: int
    count: int


def held_rows(model: LlamaModel, plan: Plan, card: int) -> tuple[HeldRows, ...]:
    """All packed rows that a card of the plan holds."""
    number, share = plan.place(card)
    layers, out = plan.stages[number].layers, []
    for layer in model.shape.layers[layers.start : layers.stop]:
        inputs = {layer.attn_output.name: "att", layer.ffn_down.name: "act"}
        for matrix, first, rows in layer_rows(layer, model.shape, share):
            row = inputs.get(matrix.name, "x" if matrix.quantized else "xn")
            row += "q" if matrix.quantized else ""
            out.append(HeldRows(matrix.name, row, model.weights[matrix.name], first, rows))
    if not share.vocabulary.empty:
        weight, v = model.weights[model.shape.output.name], share.vocabulary
        row = "xoq" if model.shape.output.quantized else "xon"
        out.append(HeldRows("output.rows", row, weight, v.start, v.size))
    return tuple(out)


# --- programs --------------------------------------------------------------------------


def mapped_table(model: LlamaModel, plan: Plan, card: int, packed: PackedFile) -> Upload | None:
    """The whole embedding, for a card that maps a packed copy and needs columns of it: as TABLE,
    instead of columns that would have to be copied.  None where the copy has it not."""
    _, share = plan.place(card)
    if share.columns.empty or embeds_from_output(model.shape, share):
        return None
    weight = model.weights["token_embd.weight"]
    place = packed.place(weight.shape, weight.format, 0, weight.shape.rows)
    if place is None:
        return None
    return Upload(TABLE, weight.shape.packed_bytes(weight.shape.rows), (), place)


@collecting.paused()
def build_program(
    model: LlamaModel,
    plan: Plan,
    card: int,
    limits: Limits,
    down: Down = ALL_UP,
    *,
    maps_table: bool = False,
) -> Program:
    """The program of one step on one card of the plan, around the links that are down: over other
    cards of the plan where there is a way, else over the host.  A card that `maps_table` has the
    whole embedding as TABLE."""
    return Program(
        commands=tuple(_Builder(model, plan, card, limits, down, maps_table).commands()),
        tokens_max=limits.tokens_max,
        outputs_max=limits.outputs_max,
        positions_max=limits.context,
    )


@attrs.define
class _Row:
    """A row-wise activation buffer: `at(element)` is a reference to a column of it."""

    name: str
    elements: int
    quantized: bool = False

    @property
    def stride(self) -> int:
        return q8_bytes(self.elements) if self.quantized else self.elements * 4

    def at(self, element: int = 0) -> Ref:
        return Ref(self.name, self.stride, q8_bytes(element) if self.quantized else element * 4)

    def nbytes(self, elements: int) -> int:
        return q8_bytes(elements) if self.quantized else elements * 4


class _Bests(_Row):
    """The best token of each voter, 8 bytes each."""

    def __init__(self, voters: int) -> None:
        super().__init__("best", voters)

    @property
    def stride(self) -> int:
        return self.elements * 8

    def at(self, element: int = 0) -> Ref:
        return Ref(self.name, self.stride, element * 8)

    def nbytes(self, elements: int) -> int:
        return elements * 8


# A command, or an exchange: its EXCHANGE and its transfers.
_Item = Command | tuple[Command, ...]


class _Builder:
    def __init__(
        self,
        model: LlamaModel,
        plan: Plan,
        card: int,
        limits: Limits,
        down: Down,
        maps_table: bool = False,
    ) -> None:
        self.maps_table = maps_table
        self.model, self.plan, self.card, self.limits = model, plan, card, limits
        self.down = down
        self.shape = shape = model.shape
        number, self.share = plan.place(card)
        self.stage: Stage = plan.stages[number]
        self.previous = plan.stages[number - 1] if number else None
        self.next = plan.stages[number + 1] if number + 1 < len(plan.stages) else None
        attention_row = shape.heads * shape.head_dim
        self.x = _Row("x", shape.hidden)
        self.xn = _Row("xn", shape.hidden)
        self.xq = _Row("xq", shape.hidden, True)
        self.att = _Row("att", attention_row)
        self.attq = _Row("attq", attention_row, True)
        self.y = _Row("y", shape.hidden)
        self.act = _Row("act", shape.ffn)
        self.actq = _Row("actq", shape.ffn, True)
        # Every layer gathers the same rows, each shared in its own way, whole Q8 blocks or not.
        self.gathers: dict[str, list[tuple[Command, ...]]] = {}
        self.whole_blocks: dict[str, bool] = {}
        # The first layer of each kind, and its commands.
        self.kinds: dict[tuple[object, ...], tuple[int, list[Command]]] = {}

    def commands(self) -> list[Command]:
        out: list[Command] = []
        if self.previous is None:
            self._put(out, self._embed())
        else:
            self._put(out, iter(self._handover(self.previous, self.stage)))
        for index in range(self.stage.layers.start, self.stage.layers.stop):
            out += self._layer(index)
        if self.next is None:
            self._put(out, self._output())
        else:
            self._put(out, iter(self._handover(self.stage, self.next)))
        self._put(out, self._choose())
        return out

    def _layer(self, index: int) -> list[Command]:
        """Layers of the same formats and sizes, most of a model, differ in names alone."""
        kind = tuple(
            [
                (self.model.weights[m.name].format, m.rows, m.k, m.quantized)
                for m in self.shape.layers[index].matrices
            ]
        )
        if kind not in self.kinds:
            self.kinds[kind] = index, self._new_layer(index)
        first, commands = self.kinds[kind]
        if first == index:
            return commands
        names = dict(zip(self._names(first), self._names(index), strict=True))
        part = f"blk.{index}"
        return [command.renamed(names, part) if command.part else command for command in commands]

    def _new_layer(self, index: int) -> list[Command]:
        layer, out = self.shape.layers[index], list[Command]()
        for items in (self._attention(index, layer), self._ffn(index, layer)):
            self._put(out, items, f"blk.{index}")
        return out

    def _names(self, index: int) -> list[str]:
        """The buffers that are a layer's own."""
        own = [f"blk.{index}.attn_norm.weight", f"blk.{index}.ffn_norm.weight"]
        own += [f"kv.{index}", f"kv_copy.{index}"]
        return own + [matrix.name for matrix in self.shape.layers[index].matrices]

    def _put(self, out: list[Command], items: Iterator[_Item], part: str = "") -> None:
        """Append commands, as of a part of the model.  Transfers belong where their exchange does;
        on many cards they are many."""
        for item in items:
            if isinstance(item, tuple):
                if item:
                    out.append(item[0].of_part(part) if part else item[0])
                    out += item[1:]
            else:
                out.append(item.of_part(part) if part else item)

    # --- exchanges ---

    def _exchanges(
        self, phases: Sequence[Sequence[Move]], row: _Row, *, outputs: bool = False
    ) -> list[tuple[Command, ...]]:
        """One exchange for each phase that this card takes part in."""
        found = []
        for moves in phases:
            transfers = []
            for move in moves:
                if self.card in (move.source, move.target):
                    send = move.source == self.card
                    transfers.append(
                        Transfer(
                            send=send,
                            peer=move.target if send else move.source,
                            ref=row.at(move.part.start),
                            nbytes=row.nbytes(move.part.size),
                            hosted=(move.source, move.target) in self.down,
                        )
                    )
            if transfers:
                found.append(op.exchange(transfers, outputs=outputs))
        return found

    def _gather(
        self, row: _Row, share_of: Callable[[CardShare], Share]
    ) -> list[tuple[Command, ...]]:
        found = self.gathers.get(row.name)
        if found is None:
            shares = tuple(share_of(s) for s in self.stage.shares)
            phases = gather_phases(self.stage.cards, shares, self.down)
            found = self.gathers[row.name] = self._exchanges(phases, row)
        return found

    def _handover(self, source: Stage, target: Stage) -> list[tuple[Command, ...]]:
        phases = handover_phases(source.cards, target.cards, self.shape.hidden, self.down)
        return self._exchanges(phases, self.x)

    # --- pieces of the model ---

    def _embed(self) -> Iterator[_Item]:
        columns, weight = self.share.columns, self.model.weights["token_embd.weight"]
        if not columns.empty:
            whole = "output.rows" if embeds_from_output(self.shape, self.share) else TABLE
            packed = self.maps_table or whole != TABLE
            nbytes = columns.size // weight.shape.columns_unit * weight.shape.unit_bytes
            yield op.embed(
                weight.format,
                Ref(whole) if packed else Ref(COLUMNS, nbytes),
                Ref("chosen", 4),
                self.x.at(columns.start),
                columns=columns.size,
                vocabulary=self.shape.vocabulary,
                packed_k=self.shape.hidden if packed else 0,
                first=columns.start if packed else 0,
            )
        yield from self._gather(self.x, lambda s: s.columns)

    def _norm(self, weight: str, matrices: Sequence[WeightShape]) -> Iterator[_Item]:
        """x normalised into xn, and into xq where a matrix wants Q8 blocks."""
        hidden = self.shape.hidden
        yield op.rmsnorm(self.x.at(), Ref(weight), self.xn.at(), n=hidden, eps=self.model.rms_eps)
        if any(m.quantized for m in matrices):
            yield op.quantize(self.xn.at(), self.xq.at(), k=hidden)

    def _matmul(self, matrix: WeightShape, rows: int, x: Ref, out: Ref) -> Command:
        fmt = self.model.weights[matrix.name].format
        return op.matmul(fmt, Ref(matrix.name), x, out, rows=rows, k=matrix.k)

    def _gather_input(
        self, matrix: WeightShape, row: _Row, rowq: _Row, share_of: Callable[[CardShare], Share]
    ) -> Iterator[_Item]:
        """Bring the input of `matrix` together: as Q8 blocks where every share consists of whole
        blocks, else as floats that are quantised afterwards."""
        own = share_of(self.share)
        if row.name not in self.whole_blocks:
            self.whole_blocks[row.name] = all(
                part.start % Q8_BLOCK == 0 and part.size % Q8_BLOCK == 0
                for part in map(share_of, self.stage.shares)
            )
        if matrix.quantized and self.whole_blocks[row.name]:
            if not own.empty:
                yield op.quantize(row.at(own.start), rowq.at(own.start), k=own.size)
            yield from self._gather(rowq, share_of)
            return
        yield from self._gather(row, share_of)
        if matrix.quantized:
            yield op.quantize(row.at(), rowq.at(), k=row.elements)

    def _project_and_add(self, matrix: WeightShape, row: _Row, rowq: _Row) -> Iterator[_Item]:
        """x += matrix times the gathered row."""
        own = self.share.hidden
        if not own.empty:
            x = rowq.at() if matrix.quantized else row.at()
            yield self._matmul(matrix, own.size, x, self.y.at(own.start))
        yield from self._gather(self.y, lambda s: s.hidden)
        yield op.add(self.x.at(), self.y.at(), n=self.shape.hidden)

    def _attention(self, index: int, layer: LayerShape) -> Iterator[_Item]:
        shape, share, limits = self.shape, self.share, self.limits
        dim, heads, kv = shape.head_dim, share.heads, share.kv_heads(shape.group)
        inputs = (layer.attn_q, layer.attn_k, layer.attn_v)
        if not heads.empty:
            yield from self._norm(f"blk.{index}.attn_norm.weight", inputs)
            q, k, v = (
                _Row("q", heads.size * dim),
                _Row("k", kv.size * dim),
                _Row("v", kv.size * dim),
            )
            for matrix, out in zip(inputs, (q, k, v), strict=True):
                x = self.xq.at() if matrix.quantized else self.xn.at()
                yield self._matmul(matrix, out.elements, x, out.at())
            for row, count in ((q, heads.size), (k, kv.size)):
                yield op.rope(
                    row.at(), Ref("rope"), heads=count, head_dim=dim, rope_dim=shape.rope_dim
                )
            pool = Ref(f"kv.{index}")
            yield op.kv_append(
                k.at(),
                v.at(),
                pool,
                kv_heads=kv.size,
                head_dim=dim,
                page_positions=limits.page_positions,
                pages=limits.kv_pages,
            )
            yield op.attention(
                q.at(),
                pool,
                self.att.at(heads.start * dim),
                kv_heads=kv.size,
                head_dim=dim,
                page_positions=limits.page_positions,
                pages=limits.kv_pages,
                heads=heads.size,
                first_head=heads.start,
                group=shape.group,
                scale=float(np.float32(1) / np.sqrt(np.float32(dim))),
            )
        yield from self._gather_input(
            layer.attn_output,
            self.att,
            self.attq,
            lambda s: Share(s.heads.start * dim, s.heads.stop * dim),
        )
        if limits.kv_copies:
            yield from self._copy(index)
        yield from self._project_and_add(layer.attn_output, self.att, self.attq)

    def _copy(self, index: int) -> Iterator[_Item]:
        """This card's new keys and values go to who keeps a copy of them, and those of another card
        come here; over the host where the link is down."""
        shape, limits, dim = self.shape, self.limits, self.shape.head_dim
        to, of = keeper(self.plan, self.card), ward(self.plan, self.card)
        transfers = []
        if to is not None:
            size = self.share.kv_heads(shape.group).size * dim
            hosted = (self.card, to) in self.down
            for row in (_Row("k", size), _Row("v", size)):
                transfers.append(
                    Transfer(True, to, row.at(), row.nbytes(row.elements), hosted=hosted)
                )
        heads = ward_heads(shape, self.plan, self.card).size
        k, v = _Row("k_copy", heads * dim), _Row("v_copy", heads * dim)
        if of is not None:
            hosted = (of.card, self.card) in self.down
            for row in (k, v):
                transfers.append(
                    Transfer(False, of.card, row.at(), row.nbytes(row.elements), hosted=hosted)
                )
        if transfers:
            yield op.exchange(transfers)
        if of is not None:
            yield op.kv_append(
                k.at(),
                v.at(),
                Ref(f"kv_copy.{index}"),
                kv_heads=heads,
                head_dim=dim,
                page_positions=limits.page_positions,
                pages=limits.kv_pages,
            )

    def _ffn(self, index: int, layer: LayerShape) -> Iterator[_Item]:
        own = self.share.ffn
        if not own.empty:
            inputs = (layer.ffn_gate, layer.ffn_up)
            yield from self._norm(f"blk.{index}.ffn_norm.weight", inputs)
            gate, up = _Row("gate", own.size), _Row("up", own.size)
            for matrix, out in zip(inputs, (gate, up), strict=True):
                x = self.xq.at() if matrix.quantized else self.xn.at()
                yield self._matmul(matrix, own.size, x, out.at())
            yield op.swiglu(gate.at(), up.at(), self.act.at(own.start), n=own.size)
        yield from self._gather_input(layer.ffn_down, self.act, self.actq, lambda s: s.ffn)
        yield from self._project_and_add(layer.ffn_down, self.act, self.actq)

    def _output(self) -> Iterator[_Item]:
        shape, vocabulary = self.shape, self.share.vocabulary
        if vocabulary.empty:
            return
        fmt = self.model.weights[shape.output.name].format
        xo, xon = _Row("xo", shape.hidden), _Row("xon", shape.hidden)
        xoq, logits = _Row("xoq", shape.hidden, True), _Row("logits", vocabulary.size)
        yield op.select(self.x.at(), xo.at(), n=shape.hidden)
        yield op.rmsnorm(
            xo.at(),
            Ref("output_norm.weight"),
            xon.at(),
            n=shape.hidden,
            eps=self.model.rms_eps,
            outputs=True,
        )
        x = xon
        if shape.output.quantized:
            yield op.quantize(xon.at(), xoq.at(), k=shape.hidden, outputs=True)
            x = xoq
        yield op.matmul(
            fmt,
            Ref("output.rows"),
            x.at(),
            logits.at(),
            rows=vocabulary.size,
            k=shape.hidden,
            outputs=True,
        )
        yield op.logit_stats(
            logits.at(), Ref("stats", chunks(vocabulary.size) * 8), n=vocabulary.size
        )
        yield op.top_k(
            logits.at(),
            Ref("top", self.limits.candidates * 8),
            n=vocabulary.size,
            k=self.limits.candidates,
            first_id=vocabulary.start,
        )

    def _choose(self) -> Iterator[_Item]:
        """The most likely token goes to the cards that embed it, so that the next step can begin
        before the host has seen it."""
        voters, embedders = self.plan.voters, self.plan.embedders

        best = _Bests(len(voters))
        if self.card in voters:
            candidates = self.limits.candidates
            own = best.at(voters.index(self.card))
            yield op.best(Ref("top", candidates * 8), own, k=candidates)
        yield from self._exchanges(choice_phases(voters, embedders, self.down), best, outputs=True)
        if self.card in embedders:
            yield op.choose(best.at(), Ref("chosen", 4), lists=len(voters))
