"""What a result depends on, recorded beside it: code, params, data, device, library versions. No clocks."""

import ast
import hashlib
import importlib.metadata
import platform
from functools import cache
from pathlib import Path
from typing import Any

import tailcal

PACKAGE = Path(tailcal.__file__).parent
LIBRARIES = ("torch", "numpy")


def _file_of(module: str) -> Path | None:
    """The source file of a module of ours, or None for anything else."""
    base = PACKAGE.parent / Path(*module.split("."))
    candidates = (base.with_suffix(".py"), base / "__init__.py")
    return next((path for path in candidates if path.is_file()), None)


@cache
def _imports(path: Path) -> tuple[Path, ...]:
    """Our source files that a source file names in its import statements, wherever they stand in it."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    with_parents = {
        ".".join(m.split(".")[: i + 1])
        for m in modules
        if m.split(".")[0] == "tailcal"
        for i in range(len(m.split(".")))
    }
    return tuple(sorted(found for m in with_parents if (found := _file_of(m))))


def closure(*paths: Path) -> list[Path]:
    """The given source files and all of our source files they import, directly or not; sorted."""
    seen: set[Path] = set()
    todo = list(paths)
    while todo:
        path = todo.pop()
        if path not in seen:
            seen.add(path)
            todo.extend(_imports(path))
    return sorted(seen)


def code_version(*paths: Path) -> str:
    """A digest of the sources that `paths` consist of, imports included: it changes when, and only when, they do."""
    digest = hashlib.sha256()
    for path in closure(*paths):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return f"{tailcal.__version__}+{digest.hexdigest()[:12]}"


def versions() -> dict[str, Any]:
    """Versions of Python and of the libraries that compute results."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in LIBRARIES}}
