"""Sampling that depends on the row, not on what it is computed with.

A token is drawn by the Gumbel-max trick: argmax of the logits over the temperature plus Gumbel
noise, which is a hash of seed, row, position and token. So a row gets the same tokens in any batch,
on any worker and in any attempt, as far as its logits are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dask_pcm.errors import PromptError
from dask_pcm.inference.engine.pages import on_device

_GOLDEN, _MIX_1, _MIX_2 = -7046029254386353131, -4658895280553007687, -7723592293110705685


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen.

    Attributes
    ----------
    temperature
        0 takes the likeliest token.
    top_k
        As many of the likeliest tokens are candidates; None for all.
    top_p
        Candidates are the fewest tokens whose probabilities sum to this or more.
    seed
        Rows of another seed get other tokens.

    Raises
    ------
    PromptError
        A value is out of its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, is_good, wanted in (
            ("temperature", _is_number(self.temperature) and self.temperature >= 0, "0 or more"),
            ("top_k", self.top_k is None or _is_whole(self.top_k, 1), "1 or more, or None"),
            ("top_p", _is_number(self.top_p) and 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("seed", _is_whole(self.seed, None), "a whole number"),
        ):
            if not is_good:
                raise PromptError(f"{name} is {getattr(self, name)!r}; expected {wanted}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_whole(value: Any, least: int | None) -> bool:
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return is_whole and (least is None or value >= least)


def choose(logits: Any, sampling: Sampling, rows: Sequence[int], positions: Sequence[int]) -> Any:
    """Choose the next token of each row.

    Parameters
    ----------
    logits
        Shape (rows, vocabulary), float32.
    rows, positions
        Stable id of each row, and the position in it that is filled.

    Returns
    -------
    torch.Tensor
        Token ids, shape (rows,).
    """
    return perturbed(logits, sampling, rows, positions).argmax(-1)


def perturbed(
    logits: Any, sampling: Sampling, rows: Sequence[int], positions: Sequence[int]
) -> Any:
    """What is greatest for the token that is chosen; as for ``choose``."""
    if not sampling.temperature:
        return logits
    scaled = _filtered(logits / sampling.temperature, sampling)
    return scaled + gumbel(sampling.seed, rows, positions, logits)


def gumbel(seed: int, rows: Sequence[int], positions: Sequence[int], like: Any) -> Any:
    """Gumbel noise of shape (rows, vocabulary), on the device of `like`.

    A counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC
    2011) with the mixing function of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
    """
    import torch

    def put(values: Sequence[int]) -> Any:
        return on_device([_signed(value) for value in values], like.device)

    key = _mix(_mix(_mix(put([seed])) + put(rows)) + put(positions))
    tokens = torch.arange(like.shape[-1], device=like.device)
    bits = _mix(key[:, None] + tokens[None] * _GOLDEN)
    uniform = ((bits >> 12) & ((1 << 52) - 1)).double().add(0.5).mul(2.0**-52)  # never 0 or 1
    return -torch.log(-torch.log(uniform)).float()


def _mix(x: Any) -> Any:
    """SplitMix64's finaliser; integers wrap, and shifts are made logical by a mask."""
    x = x + _GOLDEN
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _MIX_1
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _MIX_2
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _signed(value: int) -> int:
    """The low 64 bits of a whole number, as a signed one."""
    return ((value + (1 << 63)) % (1 << 64)) - (1 << 63)


def _filtered(scaled: Any, sampling: Sampling) -> Any:
    """Logits with those of tokens that are no candidates set to minus infinity."""
    import torch

    if sampling.top_k is not None and sampling.top_k < scaled.shape[-1]:
        least = scaled.topk(sampling.top_k, dim=-1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < least, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = scaled.sort(dim=-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        dropped = torch.zeros_like(before, dtype=torch.bool).scatter(
            -1, order, before >= sampling.top_p
        )
        scaled = scaled.masked_fill(dropped, -torch.inf)
    return scaled
