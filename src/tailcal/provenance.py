"""What a result depends on, recorded beside it: code, params, data, device, library versions. No clocks."""

import ast
import hashlib
import importlib.metadata
import importlib.util
import io
import platform
import tokenize
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


@cache
def without_prose(source: str) -> str:
    """A Python source without comments, docstrings and blank lines, which decide no result; the same text by every
    version of Python, whose tokens of f-strings differ."""
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    code = [token for token in tokens if token.type not in (tokenize.COMMENT, tokenize.NL)]
    prose = [token for token in tokens if token.type == tokenize.COMMENT or not token.line.strip()]  # or blank
    begins = tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT  # what a statement comes after
    for before, token, after in zip([None, *code], code, code[1:], strict=False):
        alone = (before is None or before.type in begins) and after.type == tokenize.NEWLINE
        if token.type == tokenize.STRING and alone and token.string.lstrip("rRuU")[0] in "'\"":  # f-strings run code
            prose.append(token)
    lines = source.split("\n")  # as tokenize has them, and no other separators
    for (row, column), (last, end) in sorted({(token.start, token.end) for token in prose}, reverse=True):
        if row <= len(lines):  # the end of the source is a token too
            kept = (lines[row - 1][:column] + lines[last - 1][end:]).rstrip()
            lines[row - 1 : last] = [kept] if kept else []
    return "\n".join(lines)


def code_version(*modules: str, data: Iterable[Path] = ()) -> str:
    """A digest of the sources of modules of ours, imports included, and of the files `data` that they read.

    It changes when, and only when, one of these does, comments and docstrings aside. Raises ValueError as `closure`
    does.
    """
    digest = hashlib.sha256()
    for path in closure(*modules):
        digest.update(f"{path.name}\0{without_prose(path.read_text(encoding='utf-8'))}\0".encode())
    for path in sorted(data):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return f"{tailcal.__version__}+{digest.hexdigest()[:12]}"


def versions() -> dict[str, Any]:
    """Versions of Python and of the libraries that compute results."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in LIBRARIES}}
