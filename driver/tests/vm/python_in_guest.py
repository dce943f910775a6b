# SPDX-License-Identifier: Apache-2.0
"""Lists what a guest needs to run this very Python with Spanker: paths, one a line, as JSON.

Run by the interpreter of .venv, so that the guest runs what the tests of this tree ran with.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
import sysconfig
from pathlib import Path

WANTED = ("spanker", "pytest", "pytest-trio", "hypothesis", "gguf")
# Wanted by name alone: Spanker never downloads in a guest, and they bring many more.
LEFT_OUT = {"huggingface-hub", "pyyaml", "requests", "tqdm", "sentencepiece"}
NOT_IN_STDLIB = re.compile(
    r"^(site-packages|dist-packages|test|idlelib|tkinter|turtledemo|lib2to3|ensurepip|config-[^/]*"
    r"|distutils)(/|$)|(^|/)(tests?|_tkinter[^/]*)(/|$)|\.a$"
)


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def closure() -> dict[str, importlib.metadata.Distribution]:
    found: dict[str, importlib.metadata.Distribution] = {}
    todo = list(WANTED)
    while todo:
        name = canonical(todo.pop())
        if name in found or name in LEFT_OUT:
            continue
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            if name in WANTED:
                raise
            continue  # of another Python or system
        for line in found[name].requires or ():
            requirement, _, marker = line.partition(";")
            if "extra" not in marker:
                todo.append(re.match(r"[\w.-]+", requirement.strip())[0])
    return found


def package_files(distribution: importlib.metadata.Distribution) -> list[str]:
    # Tests of other packages stay behind; scripts lie outside of the packages' directory.
    return [
        str(file)
        for file in distribution.files or ()
        if not str(file).startswith("..") and not re.search(r"(^|/)tests?/", str(file))
    ]


def main() -> None:
    stdlib = Path(sysconfig.get_path("stdlib")).resolve()
    standard = [
        str(path.relative_to(stdlib))
        for path in sorted(stdlib.rglob("*"))
        if path.is_file() and not NOT_IN_STDLIB.search(str(path.relative_to(stdlib)))
    ]
    packages = {
        name: {"root": str(distribution.locate_file("")), "files": package_files(distribution)}
        for name, distribution in closure().items()
        if name != "spanker"
    }
    print(
        json.dumps(
            {
                "executable": str(Path(sys.executable).resolve()),
                "prefix": sys.base_prefix,
                "stdlib": str(stdlib),
                "standard": standard,
                "packages": packages,
            }
        )
    )


main()
