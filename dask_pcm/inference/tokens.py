"""Control tokens count in a template but not in a row's fields; each text has one beginning.

A tokenizer converts the name of a control token wherever it occurs, so a row that contains
``<|im_end|>`` could end its own turn (prompt injection). If a row spells out such a name, a second
tokenizer encodes the text. Its control tokens have random names, and only the template's control
tokens are renamed to them. Everything else, including tokens that span parts, is as in the model's
own tokenizer.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from typing import Any

from dask_pcm.inference.prompts import Part, Text

#: Byte-fallback tokens, such as ``<0x0A>``: marked special in some vocabularies, but harmless.
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
#: Methods of a tokenizer that a call of it goes through.
_CALLED = {
    "__call__",
    "_encode_plus",
    "_batch_encode_plus",
    "_convert_encoding",
    "_switch_to_input_mode",
    "set_truncation_and_padding",
}


class Encoder:
    """Encodes texts with a transformers tokenizer.

    Parameters
    ----------
    tokenizer
        Its own padding and truncation settings are ignored.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._bos, self._eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        names = {str(token) for token in added if token.special} | {*tokenizer.all_special_tokens}
        control = [name for name in names if name and not _BYTE.fullmatch(name)]
        #: Ids of control tokens, by name.
        self.control_ids = {name: int(tokenizer.convert_tokens_to_ids(name)) for name in control}
        longest_first = sorted(control, key=lambda name: (-len(name), name))
        self._control = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._guarded: _Guarded | None = None
        # Once, here: what a folder's tokenizer says would be changed at the first call, which
        # may be one of several threads at a time.
        if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
            backend.no_truncation()
            backend.no_padding()
        #: Whether its backend alone has the ids; that is three times as fast as a call.
        self._is_plain = backend is not None and not _has_own_call(type(tokenizer))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_guarded": None}  # large, rarely needed, and rebuilt on demand

    def __call__(self, texts: Sequence[str | Text], *, keeps_end: bool = False) -> list[list[int]]:
        """Token ids of each text, with a beginning-of-text token.

        Parameters
        ----------
        texts
            In plain strings nothing is a control token.
        keeps_end
            Whether an end-of-text token that the tokenizer adds is kept.
        """
        given = [Text((Part(t, is_own=False),)) if isinstance(t, str) else t for t in texts]
        said = [str(text) for text in given]
        is_guarded = list(map(self._spells_control, given, said))
        found = iter(
            self._encode([s for s, guarded in zip(said, is_guarded, strict=True) if not guarded])
        )
        return [
            self._trimmed(self._encode_guarded(text) if guarded else next(found), keeps_end)
            for text, guarded in zip(given, is_guarded, strict=True)
        ]

    def _spells_control(self, text: Text, said: str) -> bool:
        """Whether a control token's name overlaps a part that is not the template's own."""
        spans = [match.span() for match in self._control.finditer(said)]
        if not spans:
            return False
        start = 0
        for part in text.parts:
            stop = start + len(part.text)
            if not part.is_own and any(first < stop and start < end for first, end in spans):
                return True
            start = stop
        return False

    def _encode(self, texts: list[str]) -> list[list[int]]:
        """Encode texts with the model's own tokenizer, in one call."""
        if not texts:
            return []
        if self._is_plain:
            backend, splits = (
                self._tokenizer.backend_tokenizer,
                self._tokenizer.split_special_tokens,
            )
            # A copy has forgotten the first; a call of the tokenizer may have left the others.
            if backend.encode_special_tokens != splits:
                backend.encode_special_tokens = splits
            if backend.truncation is not None:
                backend.no_truncation()
            if backend.padding is not None:
                backend.no_padding()
            return [one.ids for one in backend.encode_batch_fast(texts)]
        found = self._tokenizer(texts, add_special_tokens=True, verbose=False)
        return [list(ids) for ids in found["input_ids"]]

    def _encode_guarded(self, text: Text) -> list[int]:
        """Encode a text whose row spells out a control token."""
        if getattr(self._tokenizer, "backend_tokenizer", None) is None:
            return self._encode_apart(text)
        if self._guarded is None:
            self._guarded = _Guarded(self._tokenizer.backend_tokenizer)
        return self._guarded.encode(text, self._control)

    def _encode_apart(self, text: Text) -> list[int]:
        """For slow (Python) tokenizers: encode the text between control tokens separately."""
        ids: list[int] = []
        pending = ""
        for part in text.parts:
            at = 0
            for match in self._control.finditer(part.text) if part.is_own else ():
                ids += self._plain(pending + part.text[at : match.start()])
                ids.append(self._tokenizer.convert_tokens_to_ids(match.group()))
                pending, at = "", match.end()
            pending += part.text[at:]
        ids += self._plain(pending)
        return list(self._tokenizer.build_inputs_with_special_tokens(ids))

    def _plain(self, text: str) -> list[int]:
        """Token ids of a text in which nothing is a control token."""
        options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        return list(self._tokenizer(text, **options)["input_ids"]) if text else []

    def _trimmed(self, ids: list[int], keeps_end: bool) -> list[int]:
        """Remove a repeated beginning-of-text token, and an end-of-text token."""
        # A template may start with the beginning-of-text token that the tokenizer adds itself.
        while self._bos is not None and ids[:2] == [self._bos, self._bos]:
            ids = ids[1:]
        # Some tokenizers append an end-of-text token, after which no answer can follow.
        return ids[:-1] if len(ids) > 1 and ids[-1] == self._eos and not keeps_end else ids


def _has_own_call(kind: type) -> bool:
    """Whether a class of tokenizers does something of its own to texts, before its backend."""
    return any(
        _CALLED & vars(one).keys()
        for one in kind.__mro__
        if not one.__module__.startswith("transformers.tokenization_")
    )


class _Guarded:
    """A copy of a tokenizer whose control tokens have random names, which no row can contain.

    Parameters
    ----------
    backend
        A ``tokenizers.Tokenizer``.
    """

    def __init__(self, backend: Any) -> None:
        from tokenizers import Tokenizer

        state = json.loads(backend.to_str())
        secret = secrets.token_hex(8)
        self._names: dict[str, str] = {}
        for token in state["added_tokens"]:
            if token["special"] and not _BYTE.fullmatch(token["content"]):
                name = self._names[token["content"]] = f"\ue000{secret}.{token['id']}\ue001"
                token.update(content=name, normalized=False)
        _rename(state["model"], self._names)
        state.update(padding=None, truncation=None)
        self._tokenizer = Tokenizer.from_str(json.dumps(state))

    def encode(self, text: Text, control: re.Pattern[str]) -> list[int]:
        """Token ids of a text; names that match `control` count only in the template's parts."""
        renamed = [
            control.sub(lambda match: self._names.get(match.group(), match.group()), part.text)
            if part.is_own
            else part.text
            for part in text.parts
        ]
        return list(self._tokenizer.encode("".join(renamed)).ids)


def _rename(model: dict[str, Any], names: dict[str, str]) -> None:
    """Rename tokens in a tokenizer's vocabulary and merges; their old names become plain text."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(token, token): at for token, at in vocabulary.items()}
    else:
        model["vocab"] = [[names.get(token, token), score] for token, score in vocabulary]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        merges = (pair for pair in model["merges"] if not {*pair, "".join(pair)} & names.keys())
        model["merges"] = list(merges)
