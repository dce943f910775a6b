# SPDX-License-Identifier: Apache-2.0
"""Kernel cards: cards behind the kernel module, /dev/spankerN.

    spec       which ones
    programs   a program as the module takes it
    card       one card: an open file, and what it holds
    rig        the cards of one fleet
    survey     what there is, for people

The module moves and guards; what is policy is here: a card belongs to one fleet at a time, one that
has failed is reset when a fleet opens it, and every fleet begins in an epoch of its own.  How the
kernel is spoken to, ioctl by ioctl, is in device/uapi.py.
"""
