# SPDX-License-Identifier: Apache-2.0
"""`spanker pack`: write a model's packed copy, remove it, or list those there are."""

from __future__ import annotations

from pathlib import Path

from spanker.cli import terminal
from spanker.cli.errors import Failure
from spanker.errors import ModelNotFoundError
from spanker.ggml import catalog, packed
from spanker.ggml.architectures import llama
from spanker.ggml.gguf import GGUFFile


def pack(model: str) -> Path:
    """Write the copy of a model by name or path, with a progress bar."""
    path = catalog.resolve(model)
    with GGUFFile(path) as gguf, terminal.progress_bar(f"packing {path.name}") as advance:
        return packed.write(gguf, llama.read_model(gguf).multiplied, advance)


def show(path: Path, *, as_json: bool) -> None:
    """Where a copy is, on stdout."""
    if as_json:
        terminal.emit_json({"path": str(path), "bytes": path.stat().st_size})
    else:
        terminal.emit(str(path))


def is_packed(path: Path) -> bool:
    """Whether a model file has a copy that is used."""
    with GGUFFile(path) as gguf:
        copy = packed.PackedFile.find(gguf)
    if copy is not None:
        copy.close()
    return copy is not None


def remove(model: str) -> None:
    """Remove the copy of a model, whose file may be gone already."""
    try:
        path = catalog.resolve(model)
    except ModelNotFoundError:
        path = Path(model)
    if not packed.remove(path):
        raise Failure(f"there is no packed copy of {path}; `spanker pack` lists those there are")
    terminal.note(f"removed the packed copy of {path}")


def show_all(*, as_json: bool) -> None:
    """A table of all copies on stdout."""
    copies = packed.copies()
    if as_json:
        terminal.emit_json(
            [
                {"model": str(c.source), "bytes": c.nbytes, "path": str(c.path), "used": c.current}
                for c in copies
            ]
        )
        return
    if not copies:
        terminal.note("there are no packed copies; `spanker pack MODEL` writes one")
        return
    made = terminal.table("model", ">size", "used")
    for copy in copies:
        used = "yes" if copy.current else "no: the model has changed, or is gone"
        made.add_row(str(copy.source), terminal.size(copy.nbytes), used)
    terminal.show(made)
