"""What workers do with a batch of rows, each of which becomes a prompt.

Each row is planned on the task's thread: its prompt is filled, tokenised and cut to the model's
context length. Then an engine computes it among the rows of other batches (``submit``), or it is
computed here in padded batches, if the model has no engine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import pandas as pd

from dask_pcm.errors import PromptError
from dask_pcm.futures import then
from dask_pcm.inference.engine.rows import Row, RowError, Scored, trie_of
from dask_pcm.inference.engine.serving import Serving
from dask_pcm.inference.engine.timeslice import Kind, Owner
from dask_pcm.inference.fields import rows_as_text
from dask_pcm.inference.prompts import Scoring, ScoringError, Template, Text, cut_to_fit
from dask_pcm.plugins.worker.task import client_of_task

if TYPE_CHECKING:
    from dask_pcm.inference.language_model import LanguageModel
    from dask_pcm.inference.padded import PaddedModel

ERROR = "error"
Fields = Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompted(ABC):
    """A function of batches of rows, each of which becomes a prompt.

    Attributes
    ----------
    template
        The prompt.
    truncate_column
        The field that is cut if a row is too long.
    kept
        Columns of the input that the result keeps.
    batch_tokens
        Tokens of a padded batch.
    special_tokens_in_fields
        Whether control tokens count in fields.
    """

    template: Template
    truncate_column: str | None
    kept: tuple[str, ...]
    batch_tokens: int
    special_tokens_in_fields: bool = False

    #: An engine has rows of several batches at a time; see ``Call.is_served``.
    is_served: ClassVar[bool] = True

    #: The verb.
    __name__: ClassVar[str]
    #: Whether unfinished rows have drafts; see ``Call.has_drafts``.
    has_drafts: ClassVar[bool] = False
    #: Whether it needs a causal model.
    is_causal: ClassVar[bool] = True

    @property
    def fields(self) -> tuple[str, ...]:
        """The columns that are read."""
        return self.template.fields

    def about(self) -> dict[str, Any]:
        """The arguments that change results; the ledger refuses to resume a job if they differ."""
        return {
            "prompt": self.template.text,
            "truncate_column": self.truncate_column,
            "columns": list(self.kept),
            "special_tokens_in_fields": self.special_tokens_in_fields,
        }

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        # Without batch_tokens: the size of a forward pass changes no result.
        return (type(self).__name__, *self.about().items())

    def __call__(self, frame: pd.DataFrame, model: LanguageModel) -> pd.DataFrame:
        """Results in padded batches."""
        return self._joined(frame, self._padded(model.padded, frame))

    def submit(self, frame: pd.DataFrame, model: LanguageModel | Serving) -> Future[pd.DataFrame]:
        """Begin a batch by an engine; it is computed at once, if the model has none."""
        return then(self._submitted(frame, model), lambda found: self._joined(frame, found))

    def values(self, frame: pd.DataFrame, model: LanguageModel | Serving) -> list[Any]:
        """The value of each row; waits for them."""
        found = self._submitted(frame, model)
        try:
            return [self.value(one) for one in found.result()]
        finally:
            found.cancel()  # if this thread was interrupted

    def check_model(self, model: PaddedModel) -> None:
        """Raise PromptError if the model is an encoder, and this needs a causal one."""
        if self.is_causal and not model.is_causal:
            raise encoder_refused(self.__name__, type(model.model).__name__)

    @abstractmethod
    def plans(self, model: PaddedModel, rows: Sequence[Fields]) -> list[Any]:
        """What is computed of each row; a text for one that has an error."""

    @abstractmethod
    def n_tokens(self, plan: Any) -> int:
        """Tokens that a row takes of the model's context length."""

    def too_long(self, plan: Any, limit: int) -> str:
        """That a row takes more of the context length than there is."""
        return f"The row has {self.n_tokens(plan)} tokens; the model takes {limit}."

    @abstractmethod
    def rows(self, model: PaddedModel, plan: Any) -> list[Row]:
        """What an engine computes of a row."""

    @abstractmethod
    def result(self, model: PaddedModel, plan: Any, found: Sequence[Any]) -> Any:
        """The result of a row, of what an engine has found for each of ``rows``."""

    @abstractmethod
    def padded(self, model: PaddedModel, plans: Sequence[Any]) -> list[Any]:
        """The result of each row, in padded batches."""

    @abstractmethod
    def value(self, result: Any) -> Any:
        """The value of a row, from its result; or from the error of a row, a text."""

    @abstractmethod
    def columns(self, values: Sequence[Any]) -> dict[str, Any]:
        """The columns that are added, ``error`` among them."""

    @abstractmethod
    def dtypes(self) -> dict[str, Any]:
        """Of the columns that are added."""

    def _submitted(self, frame: pd.DataFrame, model: LanguageModel | Serving) -> Future[list[Any]]:
        """Begin rows; the results are in their order, a text for each that has an error."""
        if not isinstance(model, Serving):
            done: Future[list[Any]] = Future()
            done.set_result(self._padded(model.padded, frame))
            return done
        live: PaddedModel = model.live.padded
        planned = self.planned(live, rows_as_text(frame, self.fields))
        plans = [plan for plan in planned if not isinstance(plan, str)]
        rows = [self.rows(live, plan) for plan in plans]
        owner = Owner(Kind.BATCH, client_of_task())
        for mine in rows:
            for row in mine:
                row.owner = owner

        def merged(served: list[Any]) -> list[Any]:
            each = iter(served)
            results = [
                self.result(live, plan, [next(each) for _ in mine])
                for plan, mine in zip(plans, rows, strict=True)
            ]
            return _merged(planned, results)

        return then(model.submit([row for mine in rows for row in mine]), merged)

    def _padded(self, model: PaddedModel, frame: pd.DataFrame) -> list[Any]:
        """Results of rows in padded batches, a text for each that has an error."""
        planned = self.planned(model, rows_as_text(frame, self.fields))
        plans = [plan for plan in planned if not isinstance(plan, str)]
        return _merged(planned, self.padded(model, plans))

    def _joined(self, frame: pd.DataFrame, results: Sequence[Any]) -> pd.DataFrame:
        """The kept columns, and those that are added."""
        out = frame[list(self.kept)].copy()
        for name, values in self.columns([self.value(one) for one in results]).items():
            out[name] = values
        return out

    def planned(self, model: PaddedModel, rows: Sequence[dict[str, str] | str]) -> list[Any]:
        """The plan of each row, or the error of a row that cannot be computed."""
        good = [row for row in rows if not isinstance(row, str)]
        found: Iterator[Any] = iter(zip(good, self.plans(model, good), strict=True))
        return [row if isinstance(row, str) else self._fit(model, *next(found)) for row in rows]

    def _fit(self, model: PaddedModel, row: Fields, plan: Any) -> Any:
        """The plan, of a row cut to the context length if needed; an error if it cannot fit."""
        limit = model.max_tokens
        if isinstance(plan, str) or limit is None or self.n_tokens(plan) <= limit:
            return plan

        def count(cut: Fields) -> int:
            """Tokens of a row that was cut; over the limit if it cannot be computed."""
            (found,) = self.plans(model, [cut])
            return limit + 1 if isinstance(found, str) else self.n_tokens(found)

        if self.truncate_column is not None:
            cut = cut_to_fit(row, self.truncate_column, limit, count)
            if cut is not None:
                return self.plans(model, [cut])[0]
        return self.too_long(plan, limit)

    def _prompts(self, rows: Sequence[Fields]) -> list[Text]:
        return [self.template.text_of(row, self.special_tokens_in_fields) for row in rows]


class ByScore(Prompted):
    """A function of rows with endings that are scored; the plan of a row is a ``Scoring``."""

    __slots__ = ()

    def n_tokens(self, plan: Scoring) -> int:
        """See ``Prompted``."""
        return plan.n_tokens

    def rows(self, model: PaddedModel, plan: Scoring) -> list[Row]:
        """See ``Prompted``."""
        return [Scored(list(plan.shared), trie=trie_of(plan.endings))]

    def padded(self, model: PaddedModel, plans: Sequence[Scoring]) -> list[Any]:
        """See ``Prompted``."""
        scores = model.score(plans, self.batch_tokens)
        return [self.result(model, plan, [one]) for plan, one in zip(plans, scores, strict=True)]


def encoder_refused(verb: str, model: str) -> PromptError:
    """The error for an encoder where a causal model is needed."""
    return PromptError(f"{verb} needs a causal language model; {model} is an encoder: use embed.")


def _merged(planned: Sequence[Any], results: Sequence[Any]) -> list[Any]:
    """All results in the order of the rows; `results` are of the rows without an error."""
    each = iter(results)
    whole = [plan if isinstance(plan, str) else next(each) for plan in planned]
    return [str(one) if isinstance(one, RowError) else one for one in whole]


def checked_tokens(model: PaddedModel, plan: Any) -> Any:
    """The plan; the error of a row with a token that the model does not know."""
    try:
        model.check_tokens(plan)
    except ScoringError as error:
        return str(error)
    return plan
