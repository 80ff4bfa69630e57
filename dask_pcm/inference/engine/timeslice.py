"""Whose tokens an engine computes next: fair by class and client first, then by request.

Pure: tokens in, an order out. Each client has a virtual token counter, after Sheng et al.,
"Fairness in Serving Large Language Models" (OSDI 2024): the tokens that it was served, over its
weight; the client with the least is next. Idle time earns no credit: a client that comes back is lifted
to the least served of those that are there. Classes share in the same way, above clients.

Below a client, questions take turns in slices, as in the fair scheduler of Vijaya Kumar et al.,
"AQUA: Network-Accelerated Memory Offloading for LLMs in Scale-Up GPU Domains" (ASPLOS 2025): the
least served goes first, so a new one at once. Rows of a batch take no turns.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class Kind(Enum):
    """Classes of rows: questions, whose answers are waited for, and rows of batches."""

    QUESTION = "question"
    BATCH = "batch"


@dataclass(frozen=True, slots=True)
class Owner:
    """Who is served: a client, in a class."""

    kind: Kind = Kind.BATCH
    client: str = ""
