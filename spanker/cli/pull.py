# SPDX-License-Identifier: Apache-2.0
"""`spanker pull`: fetch a model, or list those there are."""

from __future__ import annotations

from spanker.cli import terminal
from spanker.ggml import catalog, hub


def pull(name: str, *, force: bool) -> None:
    """Fetch a model, of the catalogue or of the hub, and print its path on stdout."""
    with terminal.progress_bar(f"pulling {name}") as advance:

        def progress(phase: str, done: int, total: int) -> None:
            if advance is not None:
                advance(done, total)

        path = catalog.pull(name, progress=progress, force=force)
    terminal.emit(str(path))


def show_catalog() -> None:
    """The catalogue on stdout; that there is more is said on stderr."""
    made = terminal.table("name", ">size", "licence", "cached", "model")
    for entry in catalog.CATALOG.values():
        cached = entry.is_cached
        size = terminal.size(entry.size_bytes)
        made.add_row(entry.name, size, entry.licence, "yes" if cached else "no", entry.description)
    terminal.show(made)
    terminal.note(f"Any GGUF file on the Hugging Face hub: spanker pull {hub.FORM}")
