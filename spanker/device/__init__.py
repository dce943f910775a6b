# SPDX-License-Identifier: Apache-2.0
"""Cards: the CardDevice contract and its bodies, and the card model in C."""
