"""Whether a model gives each row of a padded batch the answer that it would have alone.

It does where no logit depends on a later token. So that is asked of a model when it is loaded, once
for its content, the device model and the versions of what runs it: what passed is remembered on the
host. What fails is asked again, for a fault of a device is not to be held against a model for ever.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dask_pcm import user_cache
from dask_pcm.context.bundles import digest_of
from dask_pcm.errors import ModelError
from dask_pcm.ladder.device import device_model

if TYPE_CHECKING:
    from dask_pcm.inference.padded import PlainModel

logger = logging.getLogger(__name__)

#: Longer than a chunk of most models that read in chunks.
_N_TOKENS = 66
#: Differences of logits over their spread that are rounding: later tokens, neighbours in a batch.
#: In half precision an expert may be chosen differently at a position: most positions decide.
_FULL, _HALF = (1e-3, 1e-3), (0.02, 0.1)
_KIND = "probes"


def ensure_exact(model: PlainModel, content: str | None) -> None:
    """Probe a model, unless its like has passed here.

    Parameters
    ----------
    content
        Identity of the model's files; without one nothing is remembered.

    Raises
    ------
    ModelError
        Where its answers would depend on what shares a batch.
    """
    key = None if content is None else _key(model, content)
    if key is not None and user_cache.recall(_KIND, key) is not None:
        return
    found = probe(model)
    logger.info("Probe of %s: %s", type(model.model).__name__, found)
    if key is not None:
        user_cache.note(_KIND, key, found)


def probe(model: PlainModel) -> dict[str, float]:
    """How much logits change by what should not change them, over their spread.

    Raises
    ------
    ModelError
        Where that is more than rounding.
    """
    rows = _rows(model)
    is_half = model.model.dtype.itemsize < 4
    most_later, most_beside = _HALF if is_half else _FULL
    name = type(model.model).__name__
    later = _measured(_later_tokens(model, rows), is_half)
    if later > most_later:
        raise ModelError(
            f"{name} is no causal model as this folder configures it: later tokens change the"
            f" logits of earlier ones (by {later:.2g} of their spread), so it cannot score answers."
            " Give a model that was trained to continue texts; some have is_decoder in config.json."
        )
    beside = _measured(_beside_others(model, rows), is_half)
    if beside > most_beside:
        raise ModelError(
            f"{name} gives a text other logits in a batch than alone (by {beside:.2g} of their"
            f" spread; rounding explains {most_beside:g}), so answers would depend on which rows"
            " share a batch."
        )
    return {"later_tokens": later, "beside_others": beside}


def _later_tokens(model: PlainModel, rows: Sequence[list[int]]) -> list[tuple[Any, Any]]:
    """Logits of a text's first half, before one token again and again and before other ones."""
    whole = rows[0]
    half = (len(whole) + 1) // 2
    other = [*whole[:half], *[whole[half - 1]] * (len(whole) - half)]
    positions = _some(half)
    return [(model.logits([other], positions)[0], model.logits([whole], positions)[0])]


def _beside_others(model: PlainModel, rows: Sequence[list[int]]) -> list[tuple[Any, Any]]:
    """Logits of each text in a batch with the others, and alone."""
    positions = sorted({position for row in rows for position in _some(len(row))})
    batch = model.logits(rows, positions)
    pairs = []
    for line, row in enumerate(rows):
        own = [position for position in positions if position < len(row)]
        pairs.append((batch[line, : len(own)], model.logits([row], own)[0]))
    return pairs


def _measured(pairs: Sequence[tuple[Any, Any]], is_half: bool) -> float:
    """Root mean square of differences over the spread, of the worst text.

    By its worst position, or the median one.
    """
    found = []
    for changed, expected in pairs:
        changed, expected = changed.float(), expected.float()
        spread = expected.std(dim=-1)
        # What is no number is said of each row when it is scored.
        differences = (changed - expected).nan_to_num(0.0, 0.0, 0.0).square().mean(dim=-1).sqrt()
        ratios = differences / spread.nan_to_num(1.0).clamp(min=1e-12)
        found.append(float(ratios.median() if is_half else ratios.max()))
    return max(found)


def _some(n_tokens: int) -> list[int]:
    """Some positions of a text: its ends, and between them."""
    return sorted({0, n_tokens // 3, n_tokens // 2, max(0, n_tokens - 2), n_tokens - 1})


def _rows(model: PlainModel) -> list[list[int]]:
    """Texts of several lengths of tokens without a meaning of their own."""
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


def _key(model: PlainModel, content: str) -> str:
    import torch
    import transformers

    facts = [content, device_model(), *model.facts.values()]
    facts += [type(model.model).__name__, torch.__version__, transformers.__version__]
    return digest_of(json.dumps(facts).encode()).hex()
