"""``ddf.pcm`` on Dask's frames, without importing them: a worker may never see one.

Dask's dataframes cost a process pandas and pyarrow, some 90 MiB. So the accessor is registered when
Dask's module has been imported, by whoever needs it, and its class is imported when it is used.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cached_property
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_FRAMES, _NAME = "dask.dataframe", "pcm"


def register_accessor() -> None:
    """Register it: now, if Dask's dataframes have been imported, or else as soon as they are."""
    if _FRAMES in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _After(_FRAMES, _register))


def _register() -> None:
    from dask.dataframe import DataFrame
    from dask.dataframe.accessor import CachedAccessor

    class LateAccessor(CachedAccessor):  # type: ignore[misc]
        def __init__(self) -> None:
            self._name = _NAME

        @cached_property
        def _accessor(self) -> Any:
            from dask_pcm.accessor import Accessor

            return Accessor

    DataFrame.pcm = LateAccessor()
    DataFrame._accessors.add(_NAME)


class _After(MetaPathFinder):
    """Finds what the finders behind it find, and calls something once a module is imported."""

    def __init__(self, name: str, then: Callable[[], None]) -> None:
        self._name = name
        self._then = then

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self._name:
            return None
        finders = [finder for finder in sys.meta_path if finder is not self]
        specs = (finder.find_spec(name, path, target) for finder in finders)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_then(module: ModuleType) -> None:
            execute(module)
            self._then()

        # The loader is this spec's own: to look for a module without importing it changes nothing.
        spec.loader.exec_module = execute_then  # type: ignore[method-assign]
        return spec
