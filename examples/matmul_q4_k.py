# SPDX-License-Identifier: Apache-2.0
"""One int4 matrix product on an emulated card, and what crosses the card's AXI4 boundary.

Run it with `python examples/matmul_q4_k.py`.
"""

import numpy as np

import spanker
from spanker.device.axi import AxiRecorder
from spanker.device.soft import SoftCardSpec, SoftRig
from spanker.ggml.gguf import GGMLType
from spanker.testing.quantize import encode

M, K, N = 100, 512, 7

rng = np.random.default_rng(0)
weights = rng.standard_normal((M, K)).astype(np.float32)
columns = rng.standard_normal((N, K)).astype(np.float32)
out = np.empty((M, N), np.float32)

with SoftRig([SoftCardSpec(ddr_bytes=1 << 20)]) as rig:
    card = AxiRecorder(rig.cards[0])
    a, b = encode(weights, GGMLType.Q4_K), encode(columns, GGMLType.Q4_K)
    spanker.matmul_q4_k(a, b, out, M, K, N, card=card)

exact = weights @ columns.T
error = np.linalg.norm(out - exact) / np.linalg.norm(exact)
print(f"{M} x {K} times {K} x {N} in int4: {error:.1%} off the product of the floats")
for line in card.lines():
    print(line)
