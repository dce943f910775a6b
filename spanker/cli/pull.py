# SPDX-License-Identifier: Apache-2.0
"""`spanker pull`: fetch a model, or list those there are."""

from __future__ import annotations

from spanker.cli import pack as packing
from spanker.cli import terminal
from spanker.ggml import catalog, hub


def pull(name: str, *, force: bool, pack: bool) -> None:
    """Fetch a model, of the catalogue or of the hub, and print its path on stdout; with `pack` one
    of the catalogue gets its packed copy."""
    with terminal.progress_bar(f"pulling {name}") as advance:

        def progress(phase: str, done: int, total: int) -> None:
            if advance is not None:
                advance(done, total)

        path = catalog.pull(name, progress=progress, force=force)
    if name.startswith(hub.PREFIX):
        # It may be huge: whether it is worth the disk is for its owner to say.
        terminal.note(f"`spanker pack {name}` makes it start faster, for as much of the disk again")
    elif pack and (force or not packing.is_packed(path)):
        packing.pack(str(path))
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
