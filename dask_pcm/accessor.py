"""``ddf.pcm``: the verbs on a Dask DataFrame, for notebooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dask.dataframe as dd
from dask.dataframe.extensions import register_dataframe_accessor

from dask_pcm.dataframe import map_partitions
from dask_pcm.inference import LLM, classify
from dask_pcm.ledger import write_parquet


@register_dataframe_accessor("pcm")
class Accessor:
    """The toolkit's verbs on a frame: ``ddf.pcm.classify(llm, ...).pcm.write_parquet(path)``.

    Each is the function of the same name with the frame as its first argument.
    """

    def __init__(self, ddf: dd.DataFrame) -> None:
        self._ddf = ddf

    def map_partitions(self, func: Callable[..., Any], *args: Any, **options: Any) -> dd.DataFrame:
        """See ``dask_pcm.map_partitions``."""
        return map_partitions(func, self._ddf, *args, **options)

    def classify(self, llm: LLM, **options: Any) -> dd.DataFrame:
        """See ``dask_pcm.classify``."""
        return classify(self._ddf, llm, **options)

    def write_parquet(self, path: str, **options: Any) -> Any:
        """See ``dask_pcm.write_parquet``."""
        return write_parquet(self._ddf, path, **options)
