"""Memory addresses in texts: they differ in every process, so they are no part of an identity."""

from __future__ import annotations

import gc
import re

#: Numbers that may be memory addresses.
_ADDRESS = re.compile(r"(?P<of> (?:object )?at )?\b(?P<number>0x[0-9a-f]{6,16}|[1-9]\d{8,19})\b")


class Addresses:
    """The addresses of the objects that exist when the first number is looked at.

    Only those count: a number of the user's that merely looks like an address is kept.
    """

    def __init__(self) -> None:
        self._known: set[int] = set()

    def without(self, text: str) -> str:
        """`text` with each address replaced by a word."""
        return _ADDRESS.sub(self._replaced, text)

    def _replaced(self, found: re.Match[str]) -> str:
        # Listing all objects takes tenths of a second: once per walk, and only for a number.
        if not self._known:
            self._known |= {id(value) for value in gc.get_objects()}
        is_address = found["of"] or int(found["number"], 0) in self._known
        return "address" if is_address else found[0]
