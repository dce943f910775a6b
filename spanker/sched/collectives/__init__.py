# SPDX-License-Identifier: Apache-2.0
"""Collective operations as plans: pure functions from shares to transfers."""
