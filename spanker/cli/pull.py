# SPDX-License-Identifier: Apache-2.0
"""`spanker pull`: fetch a model, or list those there are."""

from __future__ import annotations

from spanker.cli import terminal
from spanker.ggml import catalog


def pull(name: str, *, force: bool) -> None:
    """Fetch a model and print its path on stdout."""
    with terminal.progress_bar(f"pulling {name}") as advance:

        def progress(phase: str, done: int, total: int) -> None:
            if advance is not None:
                advance(done, total)

        path = catalog.pull(name, progress=progress, force=force)
    terminal.emit(str(path))


def show_catalog() -> None:
    made = terminal.table("name", ">size", "licence", "cached", "model")
    for entry in catalog.CATALOG.values():
        cached = entry.is_cached
        size = terminal.size(entry.size_bytes)
        made.add_row(entry.name, size, entry.licence, "yes" if cached else "no", entry.description)
    terminal.show(made)
