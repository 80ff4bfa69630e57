"""A model must give each row of a padded batch the same answer as alone; a probe verifies this.

It holds if no logit depends on a later token. The probe runs when a model is loaded. A pass is
cached on the host, by the digest of the files, the device model and the versions of torch and
transformers. A failure is never cached: a faulty device may have caused it.

It also says whether an engine computes the model; one that it does not compute exactly is computed
in padded batches.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dask_pcm import user_cache
from dask_pcm.context.bundles import digest_of
from dask_pcm.errors import ModelError
from dask_pcm.inference.engine.attention import UnfitError
from dask_pcm.inference.engine.probe import narrowed, packed_hidden, packed_logits
from dask_pcm.ladder.device import device_model
from dask_pcm.ladder.objects.tensors import is_sticky

if TYPE_CHECKING:
    from dask_pcm.inference.padded import PaddedModel

logger = logging.getLogger(__name__)

#: Length of the longest probe text: longer than one chunk of most models with chunked attention.
_N_TOKENS = 66
#: Limits of the difference of logits, relative to their standard deviation, that rounding explains:
#: by later tokens, by neighbours in a batch. In half precision, rounding may route single positions
#: to another expert, so the median position decides instead of the worst.
_FULL, _HALF = (1e-3, 1e-3), (0.02, 0.1)
_KIND = "probes"


def ensure_exact(model: PaddedModel, content: str | None) -> bool:
    """Probe a model, unless the same model has passed on this host before.

    Returns
    -------
    bool
        Whether an engine may compute it.

    Parameters
    ----------
    content
        Digest of the model's files; None disables the cache.

    Raises
    ------
    ModelError
        If its answers would depend on the other rows of a batch.
    """
    what = "packed, no masks" + ", fixed shapes" * model.shapes.is_fixed
    key = None if content is None else cache_key(what, model, content)
    found = None if key is None else user_cache.recall(_KIND, key)
    if not isinstance(found, dict):
        found = probe(model)
        logger.info("Probe of %s: %s", type(model.model).__name__, found)
        if key is not None and not found["unfit"]:
            user_cache.note(_KIND, key, found)
    if reason := found.get("unfit"):
        name = type(model.model).__name__
        logger.info("%s is computed in padded batches: %s.", name, reason)
    return not reason


def probe(model: PaddedModel) -> dict[str, Any]:
    """Measure how much later tokens and batch neighbours change logits, and an engine.

    Returns
    -------
    dict of str to float or str
        RMS differences relative to the standard deviation of the logits; and why an engine cannot
        compute the model, empty if it can.

    Raises
    ------
    ModelError
        If a difference is larger than rounding explains.
    """
    rows = _rows(model)
    is_half = model.model.dtype.itemsize < 4
    most_later, most_beside = _HALF if is_half else _FULL
    name = type(model.model).__name__
    later = _measured(_later_tokens(model, rows), is_half) if model.is_causal else 0.0
    if later > most_later:
        raise ModelError(
            f"{name} is not a causal model as this folder configures it: later tokens change the"
            f" logits of earlier ones (by {later:.2g} of their spread), so it cannot score answers."
            " Use a causal language model; some need is_decoder in config.json."
        )
    beside = _measured(_beside_others(model, rows), is_half)
    if beside > most_beside:
        raise ModelError(
            f"{name} gives a text different results in a batch than alone (by {beside:.2g} of their"
            f" spread; rounding explains {most_beside:g}), so answers would depend on the other"
            " rows of a batch. Use another model."
        )
    try:
        by_engine = _measured(_by_engine(model, rows), is_half)
        is_exact = by_engine <= most_beside
        what = "logits" if model.is_causal else "hidden states"
        unfit = (
            "" if is_exact else f"an engine changes its {what} by {by_engine:.2g} of their spread"
        )
    except UnfitError as error:
        by_engine, unfit = None, str(error)
    except Exception as error:  # of code that knows nothing of packs
        if is_sticky(error):
            raise
        by_engine, unfit = None, f"{type(error).__name__}: {error}"
    return {"later_tokens": later, "beside_others": beside, "packed": by_engine, "unfit": unfit}


def _later_tokens(model: PaddedModel, rows: Sequence[list[int]]) -> list[tuple[Any, Any]]:
    """Logits of a text's first half, followed by one repeated token and by other tokens."""
    whole = rows[0]
    half = (len(whole) + 1) // 2
    other = [*whole[:half], *[whole[half - 1]] * (len(whole) - half)]
    positions = _some(half)
    return [(model.logits([other], positions)[0], model.logits([whole], positions)[0])]


def _beside_others(model: PaddedModel, rows: Sequence[list[int]]) -> list[tuple[Any, Any]]:
    """Logits, or hidden states, of each text, in a batch with the others and alone."""
    if not model.is_causal:
        found = zip(model.hidden(rows), rows, strict=True)
        return [(one[: len(row)], model.hidden([row])[0]) for one, row in found]
    positions = sorted({position for row in rows for position in _some(len(row))})
    batch = model.logits(rows, positions)
    pairs = []
    for line, row in enumerate(rows):
        own = [position for position in positions if position < len(row)]
        pairs.append((batch[line, : len(own)], model.logits([row], own)[0]))
    return pairs


def _by_engine(model: PaddedModel, rows: Sequence[list[int]]) -> list[tuple[Any, Any]]:
    """Logits, or hidden states, of all texts in a pack and of each alone, beyond any window."""
    short = model.shapes.short_tokens
    if short is not None:
        raise UnfitError(
            f"its rotary frequencies depend on whether a row has more than {short} tokens"
        )
    with narrowed(model.model):
        if not model.is_causal:
            found = packed_hidden(model.model, rows, model.first_position)
            return [(one, model.hidden([row])[0]) for one, row in zip(found, rows, strict=True)]
        pairs = []
        for row, found in zip(rows, packed_logits(model.model, rows), strict=True):
            positions = _some(len(row))
            pairs.append((found[positions], model.logits([row], positions)[0]))
    return pairs


def _measured(pairs: Sequence[tuple[Any, Any]], is_half: bool) -> float:
    """RMS difference of logits relative to their standard deviation, of the worst text.

    Each text counts by its worst position, in half precision by its median position.
    """
    found = []
    for changed, expected in pairs:
        changed, expected = changed.float(), expected.float()
        spread = expected.std(dim=-1)
        # NaN and infinity are ignored here: scoring reports them as errors of single rows.
        differences = (changed - expected).nan_to_num(0.0, 0.0, 0.0).square().mean(dim=-1).sqrt()
        ratios = differences / spread.nan_to_num(1.0).clamp(min=1e-12)
        found.append(float(ratios.median() if is_half else ratios.max()))
    return max(found)


def _some(n_tokens: int) -> list[int]:
    """Positions to compare: near both ends and in the middle."""
    return sorted({0, n_tokens // 3, n_tokens // 2, max(0, n_tokens - 2), n_tokens - 1})


def _rows(model: PaddedModel) -> list[list[int]]:
    """Token sequences of several lengths, without special tokens; the same for every run."""
    config = model.model.config.get_text_config()
    special = {*model.tokenizer.all_special_ids}
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        ids = getattr(config, name, None)
        special |= {*ids} if isinstance(ids, (list, tuple)) else {ids}
    known = [token for token in range(model.n_embeddings) if token not in special]
    known = known or list(range(model.n_embeddings))
    longest = min(_N_TOKENS, model.max_tokens or _N_TOKENS)
    text = [known[(7919 * at + 11) % len(known)] for at in range(longest)]
    return [
        text,
        text[longest // 3 : longest // 3 + max(1, longest // 2)],
        text[-min(3, longest) :],
    ]


def cache_key(what: str, model: PaddedModel, content: str) -> str:
    """The key under which something found of a model is cached: all that can change it.

    Parameters
    ----------
    what
        What was found, and how.
    content
        Digest of the model's files.
    """
    import torch
    import transformers

    facts = [what, content, device_model(), *model.facts.values()]
    facts += [type(model.model).__name__, torch.__version__, transformers.__version__]
    return digest_of(json.dumps(facts).encode()).hex()
