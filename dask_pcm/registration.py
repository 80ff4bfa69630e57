"""``ddf.pcm`` is registered when ``dask.dataframe`` is imported, and never imports it itself.

``dask.dataframe`` imports pandas and pyarrow, about 90 MiB per process, and many workers never use
a frame. The accessor's class is imported when it is first used.
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
    """Register ``ddf.pcm``: now if ``dask.dataframe`` is imported, otherwise when it is."""
    if _FRAMES in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _After(_FRAMES, _register))


def _register() -> None:
    """Register the accessor on Dask's DataFrame class."""
    from dask.dataframe import DataFrame
    from dask.dataframe.accessor import CachedAccessor

    class LateAccessor(CachedAccessor):  # type: ignore[misc]
        """Dask's accessor descriptor, with the accessor's class imported on first use."""

        def __init__(self) -> None:
            self._name = _NAME

        @cached_property
        def _accessor(self) -> Any:
            """The class that Dask's descriptor instantiates with the frame."""
            from dask_pcm.accessor import Accessor

            return Accessor

    DataFrame.pcm = LateAccessor()
    DataFrame._accessors.add(_NAME)


class _After(MetaPathFinder):
    """Delegates to the other finders, and calls `then` after one module has been imported."""

    def __init__(self, name: str, then: Callable[[], None]) -> None:
        self._name = name
        self._then = then

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of the module, whose loader also calls `then`; None for other modules."""
        if name != self._name:
            return None
        finders = [finder for finder in sys.meta_path if finder is not self]
        specs = (finder.find_spec(name, path, target) for finder in finders)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_then(module: ModuleType) -> None:
            """Execute the module, then call `then`."""
            execute(module)
            self._then()

        # Each spec has its own loader, so ``importlib.util.find_spec`` without an import has no
        # side effect.
        spec.loader.exec_module = execute_then  # type: ignore[method-assign]
        return spec
