# SPDX-License-Identifier: Apache-2.0
"""`python -m spanker` is the command `spanker`."""

from spanker.cli import main

main()
