"""A forward of a pack, by a model whose attention was switched."""

from __future__ import annotations

import inspect
from typing import Any

from dask_pcm.inference.engine.attention import packed


class Forward:
    """Computes logits, or hidden states, of packs.

    Parameters
    ----------
    model
        A model of transformers.
    is_causal
        False for encoders, which have no cache and no logits.
    """

    def __init__(self, model: Any, is_causal: bool = True) -> None:
        self._model = model
        self._base = getattr(model, "base_model", model)
        self._options = {"use_cache": False} if is_causal else {}
        self._keeps_some = "logits_to_keep" in inspect.signature(model.forward).parameters

    def logits(self, pack: Any, kept: Any = None) -> Any:
        """Logits of the tokens at the places `kept`, of all if None; (tokens, vocabulary), float32.

        Where no token is kept, hidden states, of which there are none either.
        """
        if kept is None:
            return self._outputs(self._model, pack).logits[0].float()
        if not len(kept):
            return self.hidden(pack, kept)
        if self._keeps_some:
            return self._outputs(self._model, pack, logits_to_keep=kept).logits[0].float()
        return self._outputs(self._model, pack).logits[0, kept].float()

    def hidden(self, pack: Any, kept: Any) -> Any:
        """Last hidden states of the tokens at the places `kept`; shape (tokens, width), float32."""
        return self._outputs(self._base, pack).last_hidden_state[0, kept].float()

    def _outputs(self, model: Any, pack: Any, **options: Any) -> Any:
        with packed(pack):
            return model(
                input_ids=pack.ids, position_ids=pack.positions, **self._options, **options
            )
