# SPDX-License-Identifier: Apache-2.0
"""Virtual cards: cards of a profile's speeds, in modelled time.

    units      picoseconds
    costs      what each command of a program takes
    flows      what is on its way over links and ports, and at what rate
    engine     which card does what when
    spec       how to make one
    recorder   executed commands, for traces
    card       the card itself, with the arithmetic of the native card or hollow
    zeros      what a hollow card answers

All of it is synchronous and knows no clock; docs/api/timing-model.md says what it models.
"""
