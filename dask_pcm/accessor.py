"""``ddf.pcm`` offers the package's functions as methods of a Dask DataFrame.

``registration`` registers it with Dask.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Any

import dask.dataframe as dd

from dask_pcm.frames.map_partitions import map_partitions
from dask_pcm.inference import LLM, classify, embed, generate, score
from dask_pcm.runs.sampling import sample
from dask_pcm.runs.write import write_parquet


def _like(func: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a method the docstring and the signature of `func`, without its `ddf`."""

    def decorate(method: Callable[..., Any]) -> Callable[..., Any]:
        """Set both on `method`; its body stays."""
        own = inspect.signature(method).parameters["self"]
        theirs = inspect.signature(func).parameters.values()
        shown = [own, *(parameter for parameter in theirs if parameter.name != "ddf")]
        method.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
        method.__doc__ = func.__doc__
        return method

    return decorate


class Accessor:
    """Methods of a Dask DataFrame: ``ddf.pcm.classify(llm, ...).pcm.write_parquet(path)``.

    Each method calls the function of the same name in ``dask_pcm`` with the frame as its `ddf`,
    and has that function's docstring.
    """

    def __init__(self, ddf: dd.DataFrame) -> None:
        self._ddf = ddf

    @_like(map_partitions)
    def map_partitions(self, func: Callable[..., Any], *args: Any, **options: Any) -> dd.DataFrame:
        return map_partitions(func, self._ddf, *args, **options)

    @_like(classify)
    def classify(self, llm: LLM, **options: Any) -> dd.DataFrame:
        return classify(self._ddf, llm, **options)

    @_like(embed)
    def embed(self, llm: LLM, **options: Any) -> dd.DataFrame:
        return embed(self._ddf, llm, **options)

    @_like(generate)
    def generate(self, llm: LLM, **options: Any) -> dd.DataFrame:
        return generate(self._ddf, llm, **options)

    @_like(score)
    def score(self, llm: LLM, **options: Any) -> dd.DataFrame:
        return score(self._ddf, llm, **options)

    @_like(sample)
    def sample(self, n_rows: int, **options: Any) -> Any:
        return sample(self._ddf, n_rows, **options)

    @_like(write_parquet)
    def write_parquet(self, path: str | os.PathLike[str], **options: Any) -> Any:
        return write_parquet(self._ddf, path, **options)
