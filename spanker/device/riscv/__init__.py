# SPDX-License-Identifier: Apache-2.0
"""RISC-V cards: firmware in an emulator, each card a process.

    spec       which ones
    emulator   the firmware and what runs it here: found, checked, made into a command
    processes  those cards of a rig that are processes, and their links with any others

A card itself is spanker.device.remote.RemoteCard, its process spanker.device.process, and the rig
that of soft cards.
"""
