"""Which sequences a padded forward computes together, and which shape it has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

#: Rows of a forward, and of what its lengths are multiples, where shapes are fixed; and positions
#: whose logits are kept. Few are computed in vain then.
_FIXED_ROWS, _FIXED_TOKENS, _FIXED_POSITIONS = 16, 32, 16
#: What configurations call the number of experts, of which each has the tokens of all rows.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


class Shapes:
    """The shapes of a model's padded forwards.

    Parameters
    ----------
    config
        The configuration of its text model.
    max_tokens
        Its context length; None if it states none.

    Attributes
    ----------
    is_fixed
        Whether a shape depends on the length of a row and on nothing else: then neither do the
        orders in which a device sums numbers.
    n_rows
        Rows of a forward then; one where experts would have the tokens of other rows as well.
    short_tokens
        Longer sequences have other rotary frequencies, and transformers takes those of the longest
        sequence for a whole forward (LongRoPE). None if all have the same.
    """

    def __init__(self, config: Any, max_tokens: int | None, is_fixed: bool) -> None:
        self.is_fixed = is_fixed
        has_experts = any((getattr(config, name, None) or 0) > 1 for name in _EXPERTS)
        self.n_rows = 1 if has_experts else _FIXED_ROWS
        short = _short_tokens(config)
        is_all = short is None or (max_tokens is not None and max_tokens <= short)
        self.short_tokens = None if is_all else short
        self._limits = [limit for limit in (max_tokens, self.short_tokens) if limit]

    def batches(self, lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
        """Group sequences by the forward that computes them.

        Parameters
        ----------
        lengths
            Tokens of each.
        batch_tokens
            Tokens of a forward at most, padding included, unless shapes are fixed.
        """
        kinds: dict[Any, list[int]] = {}
        for k, n in enumerate(lengths):
            shape = self._length(n) if self.is_fixed else None
            kinds.setdefault((n > (self.short_tokens or math.inf), shape), []).append(k)
        found = []
        for mine in kinds.values():
            if self.is_fixed:
                groups = chunks(range(len(mine)), self.n_rows)
            else:
                groups = batches_by_length([lengths[k] for k in mine], batch_tokens)
            found += [[mine[k] for k in group] for group in groups]
        return found

    def padded(self, sequences: Sequence[Sequence[int]]) -> list[list[int]]:
        """The sequences of a forward, of one length; with rows more if shapes are fixed.

        Each is padded with its own last token: not every model has a padding token.
        """
        n_tokens = max(map(len, sequences))
        if self.is_fixed:
            n_tokens = self._length(n_tokens)
            sequences = [*sequences, *[sequences[-1]] * (self.n_rows - len(sequences))]
        return [[*tokens, *[tokens[-1]] * (n_tokens - len(tokens))] for tokens in sequences]

    def kept(self, positions: Sequence[int]) -> list[Sequence[int]]:
        """The positions whose logits are wanted, by forward; the last may have some more."""
        if not self.is_fixed:
            return [positions]
        # Which positions there are depends on the other rows: as many at a time.
        more = [positions[-1]] * (-len(positions) % _FIXED_POSITIONS)
        return chunks([*positions, *more], _FIXED_POSITIONS)

    def _length(self, n_tokens: int) -> int:
        """The tokens that a sequence has when its shape is fixed."""
        rounded = -(-n_tokens // _FIXED_TOKENS) * _FIXED_TOKENS
        return min([rounded, *(limit for limit in self._limits if n_tokens <= limit)])


def batches_by_length(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Group sequences of similar length, longest first, by the number of tokens after padding.

    Returns
    -------
    list of list of int
        Groups of positions in `lengths`. The longest length of a group times its size is at most
        `max_tokens`, unless the group has one sequence.

    Examples
    --------
    >>> batches_by_length([3, 9, 4, 8], max_tokens=18)
    [[1, 3], [2, 0]]
    """
    groups: list[list[int]] = []
    for position in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= max_tokens:
            groups[-1].append(position)
        else:
            groups.append([position])
    return groups


def chunks(values: Sequence[Any], n: int) -> list[Any]:
    """Cut a sequence into parts of `n` values, the last one perhaps shorter."""
    return [values[at : at + n] for at in range(0, len(values), n)]


def _short_tokens(config: Any) -> int | None:
    """Tokens up to which sequences have the rotary frequencies of short ones; None if all have."""
    told = getattr(config, "rope_parameters", None) or {}
    # One set for all layers, or one for each kind of layer.
    parts = [told, *(part for part in told.values() if isinstance(part, dict))]
    limits = [
        part.get("original_max_position_embeddings")
        or getattr(config, "original_max_position_embeddings", None)
        for part in parts
        if part.get("rope_type") == "longrope"
    ]
    return min((int(limit) for limit in limits if limit), default=None)
