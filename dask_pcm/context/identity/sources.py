"""Installed modules count by name; all others are the user's and count by their source.

Finding a module imports nothing: its packages are located one by one, outermost first, with the
finders on ``sys.meta_path``.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import importlib.util
import re
import site
import sys
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from dask_pcm.errors import IdentityWarning

#: Packages that count by name even from a source folder: this package and Dask.
_INSTALLED_PACKAGES = frozenset({"dask_pcm", "dask", "distributed", "builtins"})
_INSTALLED_FOLDERS = frozenset({"site-packages", "dist-packages"})
#: A package with more source than this counts by name: reading it would take many seconds.
_MAX_PACKAGE_BYTES = 2 << 20
_N_SHOWN = 3


@functools.lru_cache(maxsize=16384)
def is_installed(module: str | None) -> bool:
    """Whether a module counts by name alone: it belongs to Python or to an installed package.

    A module is installed if it is in one of Python's own folders, in a folder named
    ``site-packages`` or ``dist-packages``, or listed in the metadata of a package beside it, as
    after ``pip install --target``.
    """
    if module is None or module == "__main__":
        return False
    if module.partition(".")[0] in _INSTALLED_PACKAGES:
        return True
    spec = find(module)
    if spec is None or spec.origin is None:  # missing, or a namespace package
        return False
    if spec.origin in ("built-in", "frozen"):
        return True
    path = Path(spec.origin)
    return any(_lies_installed(p, module) for p in (path, _resolved(path)))


def _lies_installed(path: Path, module: str) -> bool:
    """Whether a module's file is in a folder of installed packages."""
    if not _INSTALLED_FOLDERS.isdisjoint(path.parts):
        return True
    if any(path.is_relative_to(folder) for folder in _pythons_folders()):
        return True
    top = module.partition(".")[0]
    return any(top in _listed_packages(str(folder)) for folder in _roots(path, module))


def _roots(path: Path, module: str) -> Sequence[Path]:
    """The folder that a module was found from: `a.b` in root/a/b.py or root/a/b/__init__.py."""
    depth = module.count(".") + (path.stem == "__init__")
    return path.parents[depth : depth + 1]


@functools.cache
def _pythons_folders() -> tuple[Path, ...]:
    """The folders of this Python's standard library and packages."""
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    found = {sysconfig.get_path(name) for name in names} | {site.getusersitepackages()}
    found |= set(site.getsitepackages())
    return tuple({Path(f) for f in found} | {_resolved(Path(f)) for f in found})


@functools.cache
def _listed_packages(folder: str) -> frozenset[str]:
    """Top-level names in the metadata of the packages in a folder (``*.dist-info``).

    Without ``*.egg-info``, which is found beside the user's own sources as well.
    """
    names: set[str] = set()
    for metadata in Path(folder).glob("*.dist-info"):
        with contextlib.suppress(OSError):
            for line in (metadata / "RECORD").read_text(errors="replace").splitlines():
                names.add(re.split(r"[/.,]", line, maxsplit=1)[0])
    return frozenset(names)


def _resolved(path: Path) -> Path:
    """A path with links resolved, if possible."""
    try:
        return path.resolve()
    except (OSError, RuntimeError):  # a loop of links
        return path


def find(module: str) -> ModuleSpec | None:
    """The spec of a module, as importing it would find it; None if there is none.

    Neither the module nor the packages that it is in are imported.
    """
    with contextlib.suppress(Exception):  # a module in sys.modules may be anything
        loaded = ModuleType.__getattribute__(sys.modules[module], "__dict__").get("__spec__")
        if isinstance(loaded, ModuleSpec):
            return loaded
    parent = module.rpartition(".")[0]
    places: Sequence[str] | None = None
    if parent:
        package = find(parent)
        if package is None or package.submodule_search_locations is None:
            return None
        places = package.submodule_search_locations
    return next((spec for spec in _asked(module, places) if spec is not None), None)


def _asked(module: str, places: Sequence[str] | None) -> Iterator[ModuleSpec | None]:
    """The answers of all finders."""
    for finder in list(sys.meta_path):
        with contextlib.suppress(Exception):  # third-party finders may raise anything
            yield finder.find_spec(module, places)


def user_modules(name: str) -> dict[str, str]:
    """Digests of a user's module and, recursively, of the user's modules that it imports.

    A package with more than 2 MiB of source counts by name, with a warning that says where it was
    found: it is probably not part of one job.
    """
    found: dict[str, str] = {}
    n_bytes: dict[str, int] = {}
    todo = [name]
    while todo:
        module = todo.pop()
        package = module.partition(".")[0]
        if module in found or n_bytes.get(package, 0) > _MAX_PACKAGE_BYTES or is_installed(module):
            continue
        if (path := origin(module)) is None:
            continue
        with contextlib.suppress(OSError, SyntaxError, ValueError, RecursionError):
            status = path.stat()
            n_bytes[package] = n_bytes.get(package, 0) + status.st_size
            found[module], imports = _parsed(str(path), status.st_mtime_ns, status.st_size)
            todo += _absolute(imports, module, path)
    large = sorted(package for package, size in n_bytes.items() if size > _MAX_PACKAGE_BYTES)
    for package in large:
        _warn_of_size(package, [module for module in found if module.startswith(package)])
    return {m: source for m, source in found.items() if m.partition(".")[0] not in large}


def _absolute(imports: Sequence[str], module: str, path: Path) -> Iterator[str]:
    """Absolute names of what a module imports."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for imported in imports:
        with contextlib.suppress(ImportError):  # a relative import beyond the top
            yield importlib.util.resolve_name(imported, package)


def _warn_of_size(package: str, walked: Sequence[str]) -> None:
    """Warn that a package is too large to be identified by its source."""
    warnings.warn(
        f"The package {package!r} ({origin(package) or 'a folder without __init__.py'}) is not"
        " installed, so its source would tell one job from another, but it is too large to be read"
        f" for that ({len(walked):,} modules so far: {', '.join(walked[:_N_SHOWN])}, ...). It"
        " counts by its name: a resumed run does not notice changes in it. Install it with pip to"
        " say that it is not a part of the job.",
        IdentityWarning,
        stacklevel=2,
    )


def origin(module: str) -> Path | None:
    """The source file of a module; None if there is no such module or no source."""
    spec = find(module)
    is_source = spec is not None and spec.has_location and str(spec.origin).endswith(".py")
    return Path(str(spec.origin)) if spec is not None and is_source else None


@functools.lru_cache(maxsize=4096)
def _parsed(path: str, modified_ns: int, size: int) -> tuple[str, tuple[str, ...]]:
    """The digest of a file's code without comments, docstrings and positions; and its imports."""
    tree = without_docstrings(ast.parse(Path(path).read_bytes()))
    imports: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imports += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = "." * node.level + (node.module or "")
            joint = "" if start.endswith(".") else "."
            imports += [start, *(f"{start}{joint}{alias.name}" for alias in node.names)]
    dump = ast.dump(tree).encode()
    named = tuple(name for name in imports if name.strip("."))
    return hashlib.sha256(dump).hexdigest()[:32], named


def without_docstrings(tree: ast.Module) -> ast.Module:
    """Remove the docstrings of modules, classes, functions and fields."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            kept = [statement for statement in body if not _is_text(statement)]
            node.body = kept or [ast.Pass()]  # type: ignore[attr-defined]
    return tree


def _is_text(statement: ast.stmt) -> bool:
    """Whether a statement is only a constant, such as a docstring."""
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
