"""What a result depends on, recorded beside it: code, params, data, device, library versions. No clocks."""

import ast
import hashlib
import importlib.metadata
import importlib.util
import platform
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import tailcal

PACKAGE = Path(tailcal.__file__).parent
OURS = {"tailcal": PACKAGE.parent, "stages": PACKAGE.parent.parent}  # our packages, and the folder each lies in
LIBRARIES = ("torch", "torchvision", "numpy")  # torchvision builds the backbones for photographs


def _file_of(module: str) -> Path | None:
    """The source file of a module of ours, or None for anything else."""
    package, *_ = parts = module.split(".")
    if package not in OURS:
        return None
    base = OURS[package].joinpath(*parts)
    candidates = (base.with_suffix(".py"), base / "__init__.py")
    return next((path for path in candidates if path.is_file()), None)


@cache
def _imports(module: str) -> frozenset[str]:
    """The modules of ours that are loaded before a module of ours: its packages, and what its import statements name,
    wherever they stand in it."""
    path = _file_of(module)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    named = {module}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            named |= {origin, *(f"{origin}.{alias.name}" for alias in node.names)}
    with_packages = {name.rsplit(".", i)[0] for name in named for i in range(name.count(".") + 1)}
    return frozenset(name for name in with_packages if _file_of(name))


def closure(*modules: str) -> list[Path]:
    """The source files of these modules of ours and of all modules of ours that they import, directly or not; sorted.

    Modules that are loaded by name, as methods are, must be given. Raises ValueError for what is no module of ours.
    """
    if wrong := [module for module in modules if not _file_of(module)]:
        raise ValueError(f"{wrong[0]} is no module of ours")
    seen: set[str] = set()
    todo = list(modules)
    while todo:
        module = todo.pop()
        if module not in seen:
            seen.add(module)
            todo.extend(_imports(module))
    return sorted(_file_of(module) for module in seen)


def code_version(*modules: str, data: Iterable[Path] = ()) -> str:
    """A digest of the sources of modules of ours, imports included, and of the files `data` that they read.

    It changes when, and only when, one of these does. Raises ValueError as `closure` does.
    """
    digest = hashlib.sha256()
    for path in [*closure(*modules), *sorted(data)]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return f"{tailcal.__version__}+{digest.hexdigest()[:12]}"


def versions() -> dict[str, Any]:
    """Versions of Python and of the libraries that compute results."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in LIBRARIES}}
