"""The engine: each step computes the tokens of many rows in one forward.

For one thread. ``schedule.py`` says what a step computes.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

from dask_pcm.inference.engine.attention import packed
from dask_pcm.inference.engine.packs import Pack
from dask_pcm.inference.engine.pages import PagePool
from dask_pcm.inference.engine.rows import Embedded, Generated, Prefix, Row, RowError, Scored
from dask_pcm.inference.engine.sampling import Sampling, choose
from dask_pcm.inference.engine.schedule import Part, Schedule
from dask_pcm.ladder.objects.tensors import is_sticky

#: Logits that a step keeps at most.
_MOST_LOGITS = 1 << 26
#: Steps do not become smaller than this, however little memory there is.
_LEAST_TOKENS = 32


class Engine:
    """Computes rows with a model whose attention was switched (``attention.switch``).

    Parameters
    ----------
    model
        A model of transformers.
    pool
        Pages for keys and values.
    budget_tokens
        Tokens of a step at most.
    n_vocabulary
        Logits of a token.

    Attributes
    ----------
    n_steps, n_tokens
        Forwards so far, and the tokens that they computed.
    """

    def __init__(self, model: Any, pool: PagePool, budget_tokens: int, n_vocabulary: int) -> None:
        self._model = model
        self._base = getattr(model, "base_model", model)
        self._pool = pool
        self.budget_tokens = budget_tokens
        self._keeps_some = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.schedule = Schedule(pool, max(1, _MOST_LOGITS // n_vocabulary))
        self.n_steps = 0
        self.n_tokens = 0

    @property
    def n_rows(self) -> int:
        """Rows that have not ended."""
        return self.schedule.n_rows

    def add(self, rows: Iterable[Row]) -> None:
        """Add rows; each is told its result by ``Row.done`` within ``step``."""
        self.schedule.add(rows)

    def step(self) -> None:
        """Compute one forward; does nothing without rows."""
        parts = self.schedule.choose(self.budget_tokens)
        if parts:
            self._try(parts)

    def _try(self, parts: Sequence[Part]) -> None:
        """Compute a forward; if it fails, its halves, down to the rows that are the cause."""
        try:
            self._run(parts)
            return
        except Exception as error:
            if is_sticky(error):  # every later forward would fail, and the rows are not the cause
                raise
            if is_out_of_memory(error):
                n_tokens = sum(len(part.segment.tokens) for part in parts)
                self.budget_tokens = max(_LEAST_TOKENS, min(self.budget_tokens, n_tokens // 2))
            if len(parts) == 1:
                self.schedule.fail(parts[0].row, RowError(f"{type(error).__name__}: {error}"))
                return
        half = len(parts) // 2
        self._try(parts[:half])
        self._try(parts[half:])

    def _run(self, parts: Sequence[Part]) -> None:
        """Compute a forward, and take what it says of each row."""
        import torch

        pack = Pack([part.segment for part in parts], self._pool, self._pool.kv.device)
        self.n_steps += 1
        self.n_tokens += pack.ids.shape[1]
        kept: list[int] = []
        found: list[tuple[Part, int]] = []
        for part, start in zip(parts, pack.starts, strict=True):
            found.append((part, len(kept)))
            kept += [start + k for k in part.kept]
        is_embedding = isinstance(parts[0].row, Embedded)
        with torch.inference_mode(), packed(pack):
            at = torch.tensor(kept, dtype=torch.long, device=pack.ids.device)
            outputs = self._forward(pack, at, is_embedding)
        for part in parts:
            if part.segment.is_stored:
                part.row.n_done += len(part.segment.tokens)
                if isinstance(part.row, Prefix) and part.row.is_ready:
                    self.schedule.prefixes.leave(part.row)  # it has what it needs of its outer one
        found = [(part, at) for part, at in found if part.kept]
        self._take_scores([(p.row, at) for p, at in found if isinstance(p.row, Scored)], outputs)
        self._take_tokens([(p.row, at) for p, at in found if isinstance(p.row, Generated)], outputs)
        for part, first in found:
            if isinstance(part.row, Embedded):
                vector = part.row.pool(outputs[first : first + len(part.kept)])
                self.schedule.end(part.row, vector)

    def _forward(self, pack: Pack, kept: Any, is_embedding: bool) -> Any:
        """Logits, or hidden states, of the tokens that are kept; float32."""
        inputs = {"input_ids": pack.ids, "position_ids": pack.positions, "use_cache": False}
        if is_embedding or not len(kept):
            return self._base(**inputs).last_hidden_state[0, kept].float()
        if self._keeps_some:
            return self._model(**inputs, logits_to_keep=kept).logits[0].float()
        return self._model(**inputs).logits[0, kept].float()

    def _take_scores(self, found: Sequence[tuple[Scored, int]], logits: Any) -> None:
        """Sum the log-probabilities of each ending's tokens."""
        import torch

        if not found:
            return
        wanted = [
            (at + 1 + index, token)
            for row, at in found
            for ending in row.trie.wanted
            for index, token in ending
        ]
        line, token = torch.tensor(wanted, device=logits.device).unbind(1)
        values = iter((logits[line, token] - torch.logsumexp(logits, -1)[line]).tolist())
        for row, _ in found:
            scores = [sum(next(values) for _ in ending) for ending in row.trie.wanted]
            self.schedule.end(row, scores)

    def _take_tokens(self, found: Sequence[tuple[Generated, int]], logits: Any) -> None:
        """Choose the next token of each row."""
        groups: dict[Sampling, list[tuple[Generated, int]]] = {}
        for row, at in found:
            groups.setdefault(row.sampling, []).append((row, at))
        for sampling, members in groups.items():
            numbers = [row.number for row, _ in members]
            places = [len(row.tokens) for row, _ in members]
            tokens = choose(logits[[at for _, at in members]], sampling, numbers, places).tolist()
            for (row, _), token in zip(members, tokens, strict=True):
                if row.append(token):
                    self.schedule.end(row, row.new)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a forward has found no memory, on a device or on the host."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)
