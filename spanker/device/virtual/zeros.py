# SPDX-License-Identifier: Apache-2.0
"""What a hollow card brings back: the results of a model whose weights are all zero.

Then every logit is 0.  So the statistics of a chunk of the vocabulary are its maximum 0 and as many
times exp(0) as it has rows, and of equal candidates the first have the lowest ids.  Everything else
reads as zeros.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence

import numpy as np

from spanker.device.base import Read
from spanker.device.virtual.costs import Rows
from spanker.kernels.program import LOGIT_CHUNK, NO_CANDIDATE, Op

# As the native card fills up a list of too few candidates.
_NO_VALUE = -3.0e38


def answer(results: Sequence[Rows], read: Read) -> bytes:
    """The bytes of one read, of a step whose program leaves these results."""
    handle, offset, nbytes = read
    for rows in results:
        if rows.buffer == handle:
            return _rows(rows, offset, nbytes)
    return bytes(nbytes)


@functools.lru_cache(maxsize=256)
def _rows(rows: Rows, offset: int, nbytes: int) -> bytes:
    row = _statistics(rows.args[0]) if rows.op == Op.LOGIT_STATS else _candidates(*rows.args[:3])
    end = offset + nbytes
    count = -(-max(end - rows.offset, 0) // max(rows.stride, len(row), 1))
    image = bytes(rows.offset) + row.ljust(rows.stride, b"\0") * count
    return image[offset:end].ljust(nbytes, b"\0")


def _statistics(n: int) -> bytes:
    pairs = np.zeros((-(-n // LOGIT_CHUNK), 2), "<f4")
    pairs[:, 1] = LOGIT_CHUNK
    if n % LOGIT_CHUNK:
        pairs[-1, 1] = n % LOGIT_CHUNK
    return pairs.tobytes()


def _candidates(n: int, k: int, first_id: int) -> bytes:
    held = min(n, k)
    ids = [*range(first_id, first_id + held), *[NO_CANDIDATE] * (k - held)]
    values = [0.0] * held + [_NO_VALUE] * (k - held)
    return struct.pack(f"<{k}I{k}f", *ids, *values)
