# SPDX-License-Identifier: Apache-2.0
"""RISC-V cards: firmware in an emulator, each card a process.

    spec       which ones
    emulator   the firmware and what runs it here: found, checked, made into a command
    rig        the cards of one fleet, soft ones among them or not

A card itself is spanker.device.remote.RemoteCard, its process spanker.device.process.
"""
