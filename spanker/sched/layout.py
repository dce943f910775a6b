# SPDX-License-Identifier: Apache-2.0
"""What lies in a card's DDR under a plan: every buffer by name, with its size.

This is the one statement of a card's memory.  The planner sums it to see whether a plan fits, the
coordinator allocates it, and programs name its buffers.  T is the tokens of the largest step, O
its outputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import attrs

from spanker.errors import CardMemoryError
from spanker.sched.copies import ward_heads
from spanker.sched.plan import (
    DDR_ALIGN,
    LOGIT_CHUNK,
    Q8_BLOCK,
    Q8_BLOCK_BYTES,
    CardShare,
    LayerShape,
    Limits,
    ModelShape,
    Plan,
    WeightShape,
    tensor_pipeline,
)
from spanker.values import Value


@attrs.frozen(eq=False, repr=False)
class BufferSpec(Value):
    """A buffer: `nbytes` as allocated; on the card it takes whole multiples of 64."""

    name: str
    nbytes: int

    @property
    def ddr_bytes(self) -> int:
        return -(-self.nbytes // DDR_ALIGN) * DDR_ALIGN


def q8_bytes(k: int) -> int:
    """Bytes of k activations as Q8 blocks."""
    return k // Q8_BLOCK * Q8_BLOCK_BYTES


def chunks(rows: int) -> int:
    """Chunks of 256 vocabulary rows."""
    return -(-rows // LOGIT_CHUNK)


def layer_rows(
    layer: LayerShape, shape: ModelShape, share: CardShare
) -> tuple[tuple[WeightShape, int, int], ...]:
    """(matrix, first row, rows) of each matrix that a card holds of a layer."""
    heads, kv, dim = share.heads, share.kv_heads(shape.group), shape.head_dim
    all_rows = (
        (layer.attn_q, heads.start * dim, heads.size * dim),
        (layer.attn_k, kv.start * dim, kv.size * dim),
        (layer.attn_v, kv.start * dim, kv.size * dim),
        (layer.attn_output, share.hidden.start, share.hidden.size),
        (layer.ffn_gate, share.ffn.start, share.ffn.size),
        (layer.ffn_up, share.ffn.start, share.ffn.size),
        (layer.ffn_down, share.hidden.start, share.hidden.size),
    )
    return tuple(entry for entry in all_rows if entry[2])


def embeds_from_output(shape: ModelShape, share: CardShare) -> bool:
    """Whether a card needs no embedding of its own: it holds the whole output matrix, and the model
    uses the same one for both."""
    return (
        shape.embedding.name == shape.output.name
        and share.columns.size == shape.hidden
        and share.vocabulary.size == shape.vocabulary
    )


def layer_buffers(shape: ModelShape, index: int, share: CardShare) -> tuple[BufferSpec, ...]:
    """The weights of one layer that a card holds: norms and packed rows."""
    norms = (
        BufferSpec(f"blk.{index}.{norm}.weight", shape.hidden * 4)
        for norm in ("attn_norm", "ffn_norm")
    )
    matrices = (
        BufferSpec(matrix.name, matrix.packed_bytes(rows))
        for matrix, _, rows in layer_rows(shape.layers[index], shape, share)
    )
    return (*norms, *matrices)


def weight_buffers(shape: ModelShape, plan: Plan, card: int) -> tuple[BufferSpec, ...]:
    """Weights of one card: packed rows of its layers, norms, its part of embedding and output."""
    number, share = plan.place(card)
    layers = plan.stages[number].layers
    embedding, output = end_buffers(shape, share)
    return (
        *embedding,
        *(
            spec
            for index in range(layers.start, layers.stop)
            for spec in layer_buffers(shape, index, share)
        ),
        *output,
    )


def end_buffers(
    shape: ModelShape, share: CardShare
) -> tuple[tuple[BufferSpec, ...], tuple[BufferSpec, ...]]:
    """A card's part of the embedding, and of the output."""
    embedding: tuple[BufferSpec, ...] = ()
    output: tuple[BufferSpec, ...] = ()
    if not share.columns.empty and not embeds_from_output(shape, share):
        e = shape.embedding
        column_bytes = share.columns.size // e.columns_unit * e.unit_bytes
        embedding = (BufferSpec(e.name + ".columns", e.rows * column_bytes),)
    if not share.vocabulary.empty:
        output = (
            BufferSpec("output_norm.weight", shape.hidden * 4),
            BufferSpec("output.rows", shape.output.packed_bytes(share.vocabulary.size)),
        )
    return embedding, output


def kv_page_bytes(shape: ModelShape, share: CardShare, limits: Limits) -> int:
    """Bytes of one page in one layer: keys and values in f16."""
    return kv_heads_bytes(shape, share.kv_heads(shape.group).size, limits)


def kv_heads_bytes(shape: ModelShape, kv_heads: int, limits: Limits) -> int:
    """The same of so many KV heads."""
    return kv_heads * limits.page_positions * shape.head_dim * 2 * 2


def kv_buffers(shape: ModelShape, plan: Plan, card: int, limits: Limits) -> tuple[BufferSpec, ...]:
    """The KV pool of each of the card's layers, then the copies of another card's."""
    number, share = plan.place(card)
    layers = plan.stages[number].layers
    heads = {"kv": share.kv_heads(shape.group)}
    if limits.kv_copies:
        heads["kv_copy"] = ward_heads(shape, plan, card)
    return tuple(
        BufferSpec(f"{name}.{i}", limits.kv_pages * kv_heads_bytes(shape, own.size, limits))
        for name, own in heads.items()
        for i in range(layers.start, layers.stop)
        if not own.empty and limits.kv_pages
    )


def work_buffers(
    shape: ModelShape, plan: Plan, card: int, limits: Limits
) -> tuple[BufferSpec, ...]:
    """Activations and results, reused by every layer."""
    number, share = plan.place(card)
    last = number == len(plan.stages) - 1
    lists = len(plan.voters) if plan.chooses(card) else 0
    copied = ward_heads(shape, plan, card).size if limits.kv_copies else 0
    return stage_work_buffers(shape, share, limits, last=last, lists=lists, copied=copied)


def stage_work_buffers(
    shape: ModelShape,
    share: CardShare,
    limits: Limits,
    *,
    last: bool,
    lists: int,
    copied: int = 0,
) -> tuple[BufferSpec, ...]:
    """The same for a share, of the last stage or not, that chooses among `lists` best tokens and
    keeps copies of so many KV heads."""
    t, o, hidden, dim = limits.tokens_max, limits.outputs_max, shape.hidden, shape.head_dim
    kv = share.kv_heads(shape.group).size
    sizes = {
        "rope": limits.context * shape.rope_dim * 4,
        "x": t * hidden * 4,
        "xn": t * hidden * 4,
        "xq": t * q8_bytes(hidden),
        "q": t * share.heads.size * dim * 4,
        "k": t * kv * dim * 4,
        "v": t * kv * dim * 4,
        "k_copy": t * copied * dim * 4,
        "v_copy": t * copied * dim * 4,
        "att": t * shape.heads * dim * 4,
        "attq": t * q8_bytes(shape.heads * dim),
        "y": t * hidden * 4,
        "gate": t * share.ffn.size * 4,
        "up": t * share.ffn.size * 4,
        "act": t * shape.ffn * 4,
        "actq": t * q8_bytes(shape.ffn),
    }
    if last:
        v = share.vocabulary.size
        sizes |= {
            "xo": o * hidden * 4,
            "xon": o * hidden * 4,
            "xoq": o * q8_bytes(hidden),
            "logits": o * v * 4,
            "stats": o * chunks(v) * 8,
            "top": o * limits.candidates * 8 if v else 0,
        }
    if lists:
        sizes["best"] = o * lists * 8
    if not share.columns.empty:
        sizes["chosen"] = o * 4
    return tuple(BufferSpec(name, nbytes) for name, nbytes in sizes.items() if nbytes)


def card_buffers(
    shape: ModelShape, plan: Plan, card: int, limits: Limits
) -> tuple[BufferSpec, ...]:
    """Everything a card holds; () for a card that the plan does not use."""
    if card not in plan.cards:
        return ()
    return (
        weight_buffers(shape, plan, card)
        + kv_buffers(shape, plan, card, limits)
        + work_buffers(shape, plan, card, limits)
    )


def card_bytes(
    shape: ModelShape, plan: Plan, card: int, limits: Limits, *, granule: int = DDR_ALIGN
) -> int:
    """DDR bytes that a plan takes on a card which takes them in multiples of `granule`."""
    if card not in plan.cards:
        return 0
    number, share = plan.place(card)
    layers = plan.stages[number].layers
    kinds = shape.kinds[0]
    # Layers of a kind take as much.
    counted = Counter(kinds[layers.start : layers.stop])
    embedding, output = end_buffers(shape, share)
    ends = (*embedding, *output, *work_buffers(shape, plan, card, limits))
    total = _rounded(ends, granule)
    for kind, count in counted.items():
        total += count * _rounded(layer_buffers(shape, kinds.index(kind), share), granule)
    return total + _rounded(kv_buffers(shape, plan, card, limits), granule)


def _rounded(buffers: Iterable[BufferSpec], granule: int) -> int:
    return sum([-(-buffer.nbytes // granule) * granule for buffer in buffers])


def rounding_bytes(shape: ModelShape, limits: Limits, granule: int) -> int:
    """What a plan takes at most, on a card with such a granule, beyond what is planned for it: a
    card has few buffers that one with the whole model has not."""
    if granule <= DDR_ALIGN:
        return 0
    whole, limits = tensor_pipeline(shape, 1, 1), attrs.evolve(limits, kv_pages=1)
    # An embedding apart from the output, lists of best tokens.
    count = len(card_buffers(shape, whole, 0, limits)) + 4
    return count * (granule - DDR_ALIGN)


def fit_kv_pages(
    shape: ModelShape, plan: Plan, limits: Limits, ddr_bytes: tuple[int, ...], wanted: int
) -> int:
    """The most KV pages, up to `wanted`, that fit on every card; `ddr_bytes` are free, by card
    number.

    Raises CardMemoryError, with the bytes needed, where not even one full context fits.
    """
    least = -(-limits.context // limits.page_positions)
    pages = max(wanted, least)
    for card in plan.cards:
        empty = card_bytes(shape, plan, card, attrs.evolve(limits, kv_pages=0))
        number, share = plan.place(card)
        layers = plan.stages[number].layers.size
        page_bytes = kv_page_bytes(shape, share, limits)
        if limits.kv_copies:
            page_bytes += kv_heads_bytes(shape, ward_heads(shape, plan, card).size, limits)
        need = empty + sum(
            b.ddr_bytes for b in kv_buffers(shape, plan, card, attrs.evolve(limits, kv_pages=least))
        )
        if need > ddr_bytes[card]:
            raise CardMemoryError(
                f"plan {plan.name} needs {need:,} bytes on card {card} ({empty:,} for weights and "
                f"activations, the rest for a context of {limits.context:,}), but it has "
                f"{ddr_bytes[card]:,} of DDR free: use more cards, a shorter --ctx or "
                f"--prompt-chunk, or more memory per card",
                card=card,
            )
        if page_bytes:
            # Each layer's pool takes whole allocation units.
            per_layer = (ddr_bytes[card] - empty) // layers // DDR_ALIGN * DDR_ALIGN
            pages = min(pages, per_layer // page_bytes)
    return pages
