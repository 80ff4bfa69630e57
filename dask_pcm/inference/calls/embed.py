"""Turn a text into a vector: the hidden states of its tokens, pooled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from dask_pcm.inference.calls.prompted import ERROR, Fields, Prompted, checked_tokens
from dask_pcm.inference.engine.rows import Embedded, Pooling, Row, RowError
from dask_pcm.inference.prompts import Tokens

if TYPE_CHECKING:
    from dask_pcm.inference.padded import PaddedModel

EMBEDDING = "embedding"


@dataclass(frozen=True, slots=True)
class Vector:
    """The vector of a text; None with an error.

    Attributes
    ----------
    embedding
        Shape (width,), float32.
    error
        Why there is none.
    """

    embedding: Any
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Embed(Prompted):
    """Makes a vector of the prompt.

    Attributes
    ----------
    pooling
        How the hidden states of a text's tokens become one.
    normalize
        Whether vectors have length 1.
    """

    pooling: Pooling
    normalize: bool = True

    __name__ = "embed"
    is_causal = False

    def about(self) -> dict[str, Any]:
        """See ``Prompted``."""
        given = {"pooling": self.pooling.value, "normalize": self.normalize}
        return {**Prompted.about(self), **given}

    def plans(self, model: PaddedModel, rows: Sequence[Fields]) -> list[Tokens | str]:
        """Tokenise every text, with the tokens at both ends that the tokenizer adds."""
        tokens = model.tokenize(self._prompts(rows), keeps_end=True) if rows else []
        return [
            checked_tokens(model, tuple(one)) if one else "The text has no token." for one in tokens
        ]

    def n_tokens(self, plan: Tokens) -> int:
        """See ``Prompted``."""
        return len(plan)

    def rows(self, model: PaddedModel, plan: Tokens) -> list[Row]:
        """See ``Prompted``."""
        return [Embedded(list(plan), pooling=self.pooling)]

    def result(self, model: PaddedModel, plan: Tokens, found: Sequence[Any]) -> Any:
        """See ``Prompted``."""
        (vector,) = found
        if isinstance(vector, RowError) or not self.normalize:
            return vector
        length = math.sqrt(float(vector @ vector))
        return vector / length if length else vector

    def padded(self, model: PaddedModel, plans: Sequence[Tokens]) -> list[Any]:
        """See ``Prompted``."""
        found = model.embed(plans, self.pooling, self.batch_tokens)
        return [self.result(model, plan, [one]) for plan, one in zip(plans, found, strict=True)]

    def value(self, result: Any) -> Vector:
        """See ``Prompted``."""
        return Vector(None, result) if isinstance(result, str) else Vector(result)

    def columns(self, values: Sequence[Vector]) -> dict[str, Any]:
        """See ``Prompted``."""
        import pyarrow as pa

        good = [one.embedding for one in values if one.error is None]
        flat = np.concatenate(good) if good else np.empty(0, np.float32)
        lengths = [0 if one.error is not None else len(one.embedding) for one in values]
        ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        is_null = pa.array([one.error is not None for one in values], pa.bool_())
        lists = pa.ListArray.from_arrays(pa.array(ends), pa.array(flat), mask=is_null)
        return {
            EMBEDDING: pd.arrays.ArrowExtensionArray(lists),
            ERROR: pd.array([one.error for one in values], dtype="str"),
        }

    def dtypes(self) -> dict[str, Any]:
        """See ``Prompted``."""
        import pyarrow as pa

        return {EMBEDDING: pd.ArrowDtype(pa.list_(pa.float32())), ERROR: "str"}
