"""Continue a prompt, greedily or by samples that are seeded by row."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd

from dask_pcm.inference.calls.prompted import ERROR, Fields, Prompted, checked_tokens
from dask_pcm.inference.calls.score import N_TOKENS
from dask_pcm.inference.engine.rows import Generated, Row, RowError
from dask_pcm.inference.engine.sampling import Sampling
from dask_pcm.inference.padded_generate import continue_rows
from dask_pcm.inference.prompts import Tokens

if TYPE_CHECKING:
    from dask_pcm.inference.padded import PaddedModel

TEXT, FINISH_REASON = "text", "finish_reason"


@dataclass(frozen=True, slots=True)
class Continuation:
    """A text that follows a prompt; its attributes are None with an error.

    Attributes
    ----------
    n_tokens
        Tokens that were generated.
    finish_reason
        "stop" at a stop token or string, "length" at the limit.
    error
        Why there is none.
    """

    text: str | None
    n_tokens: int | None
    finish_reason: str | None
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Generate(Prompted):
    """Continues the prompt.

    Attributes
    ----------
    max_tokens
        New tokens at most.
    stop
        Texts before which a continuation ends.
    n
        Continuations of each row.
    """

    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    n: int = 1

    __name__ = "generate"
    has_drafts = True

    def about(self) -> dict[str, Any]:
        """See ``Prompted``."""
        return {
            **Prompted.about(self),
            "max_tokens": self.max_tokens,
            "temperature": self.sampling.temperature,
            "top_k": self.sampling.top_k,
            "top_p": self.sampling.top_p,
            "seed": self.sampling.seed,
            "stop": list(self.stop),
            "n": self.n,
        }

    def plans(self, model: PaddedModel, rows: Sequence[Fields]) -> list[Tokens | str]:
        """Tokenise every prompt."""
        tokens = model.tokenize(self._prompts(rows)) if rows else []
        return [
            checked_tokens(model, tuple(one)) if one else "The prompt has no token."
            for one in tokens
        ]

    def n_tokens(self, plan: Tokens) -> int:
        """Those of the prompt, and one that is new."""
        return len(plan) + 1

    def too_long(self, plan: Tokens, limit: int) -> str:
        """See ``Prompted``."""
        needs = ", and its answer needs one more" if len(plan) == limit else ""
        return f"The row has {len(plan)} tokens{needs}; the model takes {limit}."

    def rows(self, model: PaddedModel, plan: Tokens) -> list[Row]:
        """See ``Prompted``."""
        is_over = self._is_over(model) if self.stop else None
        stops = model.stops_of(self.stop)
        return [
            Generated(
                list(plan),
                n_prompt=len(plan),
                n_max=self._n_max(model, plan),
                stops=stops,
                sampling=self.sampling,
                number=number,
                is_over=is_over,
                key=self._key(plan, number),
            )
            for number in self._numbers(plan)
        ]

    def result(self, model: PaddedModel, plan: Tokens, found: Sequence[Any]) -> Any:
        """See ``Prompted``."""
        failed = next((one for one in found if isinstance(one, RowError)), None)
        return failed or [self._continuation(model, plan, tokens) for tokens in found]

    def padded(
        self,
        model: PaddedModel,
        plans: Sequence[Tokens],
        is_enough: Callable[[Sequence[int]], bool] | None = None,
    ) -> list[Any]:
        """See ``Prompted``.

        Parameters
        ----------
        is_enough
            Called with the new tokens of a row after each; ends it if true.
        """
        is_over = self._is_over(model) if self.stop else None
        wanted = [(plan, number) for plan in plans for number in self._numbers(plan)]
        each = iter(
            continue_rows(
                model,
                [plan for plan, _ in wanted],
                [number for _, number in wanted],
                [self._n_max(model, plan) for plan, _ in wanted],
                self.sampling,
                _either(is_over, is_enough),
                self.batch_tokens,
                model.stops_of(self.stop),
            )
        )
        return [self.result(model, plan, [next(each) for _ in range(self.n)]) for plan in plans]

    def value(self, result: list[Continuation] | str) -> list[Continuation]:
        """See ``Prompted``."""
        if isinstance(result, str):
            return [Continuation(None, None, None, result)] * self.n
        return result

    def columns(self, values: Sequence[list[Continuation]]) -> dict[str, Any]:
        """See ``Prompted``; a list in each row, for several continuations."""
        found: dict[str, list[Any]] = {}
        for name, of in ((TEXT, "text"), (N_TOKENS, "n_tokens"), (FINISH_REASON, "finish_reason")):
            each = [[getattr(one, of) for one in row] for row in values]
            if self.n == 1:
                found[name] = [one for (one,) in each]
            else:
                pairs = zip(each, values, strict=True)
                found[name] = [None if row[0].error is not None else one for one, row in pairs]
        found[ERROR] = [row[0].error for row in values]
        dtypes = self.dtypes()
        return {name: pd.array(found[name], dtype=dtype) for name, dtype in dtypes.items()}

    def dtypes(self) -> dict[str, Any]:
        """See ``Prompted``."""
        import pyarrow as pa

        single = {TEXT: "str", N_TOKENS: "Int64", FINISH_REASON: "str"}
        lists = {
            TEXT: pd.ArrowDtype(pa.list_(pa.string())),
            N_TOKENS: pd.ArrowDtype(pa.list_(pa.int64())),
            FINISH_REASON: pd.ArrowDtype(pa.list_(pa.string())),
        }
        return {**(single if self.n == 1 else lists), ERROR: "str"}

    def _n_max(self, model: PaddedModel, plan: Tokens) -> int:
        if model.max_tokens is None:
            return self.max_tokens
        return min(self.max_tokens, model.max_tokens - len(plan))

    def _numbers(self, plan: Tokens) -> list[int]:
        """What samples of a row depend on, beside the seed: its prompt, and which sample it is.

        So they are the same in any order and partition of the rows.
        """
        digest = hashlib.blake2b(array("q", plan).tobytes(), digest_size=8).digest()
        first = int.from_bytes(digest, "little", signed=True)
        return [first + k for k in range(self.n)]

    def _key(self, plan: Tokens, number: int) -> int:
        """Names a row among drafts: by all that its new tokens depend on."""
        about = repr((self.max_tokens, self.sampling, self.stop, number)).encode()
        digest = hashlib.blake2b(array("q", plan).tobytes() + about, digest_size=8).digest()
        return int.from_bytes(digest, "little", signed=True)

    def _is_over(self, model: PaddedModel) -> Any:
        # A character takes four tokens at most, where tokens are bytes.
        n_tail = 4 * max(map(len, self.stop)) + 8

        def is_over(tokens: Sequence[int]) -> bool:
            tail = model.decode(tokens[-n_tail:])
            return any(one in tail for one in self.stop)

        return is_over

    def _continuation(
        self, model: PaddedModel, plan: Tokens, tokens: Sequence[int]
    ) -> Continuation:
        text = model.decode(tokens)
        ends = [at for one in self.stop if (at := text.find(one)) >= 0]
        is_full = len(tokens) >= self._n_max(model, plan) and not ends
        text = text[: min(ends)] if ends else text
        return Continuation(text, len(tokens), "length" if is_full else "stop")


def _either(
    one: Callable[[Sequence[int]], bool] | None, other: Callable[[Sequence[int]], bool] | None
) -> Callable[[Sequence[int]], bool] | None:
    """Whether one of two says so."""
    if one is None or other is None:
        return one or other
    return lambda tokens: other(tokens) or one(tokens)
