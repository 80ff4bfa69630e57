"""Keys and values of cached tokens, in pages: a page holds some tokens of one row, of all layers.

The pool is one tensor, page-major: ``kv[page, layer, slot, head, key + value]``. So a page is one
contiguous piece of memory. Rows share the pages of a common prefix; a
page is free again once its last row has let go of it. The layout follows Kwon et al., "Efficient
Memory Management for Large Language Model Serving with PagedAttention" (SOSP 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

#: Tokens of a page: what is gathered for a row exceeds what it has by half of this on average.
PAGE_TOKENS = 16


class PoolFullError(Exception):
    """There are not enough free pages."""


@dataclass(frozen=True, slots=True)
class KVShape:
    """What each layer keeps of a token.

    Attributes
    ----------
    n_layers, n_heads
        Layers, and key/value heads of each.
    key_dim, value_dim
        Numbers of a head.
    """

    n_layers: int
    n_heads: int
    key_dim: int
    value_dim: int

    def page_bytes(self, itemsize: int) -> int:
        """Bytes of a page, for numbers of `itemsize` bytes."""
        width = self.key_dim + self.value_dim
        return self.n_layers * PAGE_TOKENS * self.n_heads * width * itemsize


class PagePool:
    """Pages on one device; for one thread.

    Parameters
    ----------
    n_pages
        Its size.
    shape
        What is kept of a token.
    dtype, device
        Of the numbers, in torch's terms.

    Attributes
    ----------
    scratch
        A page that no row has: what fills up forwards of a fixed shape is written there.
    """

    def __init__(self, n_pages: int, shape: KVShape, dtype: Any, device: Any) -> None:
        import torch

        self.shape = shape
        self.n_pages = n_pages
        width = shape.key_dim + shape.value_dim
        self.scratch = n_pages
        sizes = (n_pages + 1, shape.n_layers, PAGE_TOKENS, shape.n_heads, width)
        self.kv = torch.zeros(sizes, dtype=dtype, device=device)
        self._free = list(range(n_pages))
        self._n_users = [0] * n_pages
        #: Pages with numbers of rows before, which may be none (NaN).
        self._unclean: set[int] = set()

    @property
    def n_free(self) -> int:
        """Free pages."""
        return len(self._free)

    def take(self, n_pages: int) -> list[int]:
        """Take free pages.

        Raises
        ------
        PoolFullError
            There are not as many.
        """
        if n_pages > len(self._free):
            raise PoolFullError(f"{n_pages} pages are wanted, and {len(self._free)} are free.")
        taken = [self._free.pop() for _ in range(n_pages)]
        for page in taken:
            self._n_users[page] = 1
        self._unclean.update(taken)
        return taken

    def share(self, pages: Sequence[int]) -> None:
        """Another row uses pages, which it does not write."""
        for page in pages:
            self._n_users[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """A row lets go of pages."""
        for page in pages:
            self._n_users[page] -= 1
            if not self._n_users[page]:
                self._free.append(page)

    def n_exclusive(self, pages: Sequence[int]) -> int:
        """How many of these pages are free once their row lets go of them."""
        return sum(self._n_users[page] == 1 for page in pages)

    def fill(self, pages: Sequence[int]) -> None:
        """Pages that were taken have been written."""
        self._unclean.difference_update(pages)

    def clean(self) -> None:
        """Empty the pages that were taken since: what is masked still takes part in products."""
        if self._unclean:
            self.kv[on_device(sorted(self._unclean), self.kv.device)] = 0
            self._unclean.clear()

    def index(self, pages: Any, slots: Any) -> Any:
        """Where keys and values of tokens are, for ``gather``; shape of `pages` and `slots`."""
        return pages * (self.shape.n_layers * PAGE_TOKENS) + slots

    def gather(self, index: Any, layer: int) -> Any:
        """Keys and values of one layer, shape (tokens, heads, key + value)."""
        lines = self.kv.view(-1, self.kv.shape[3] * self.kv.shape[4])
        found = lines.index_select(0, index + layer * PAGE_TOKENS)
        return found.view(-1, *self.kv.shape[3:])

    def copy(self, page: int, to: int) -> None:
        """Copy a page to one that was taken."""
        self.kv[to] = self.kv[page]
        self.fill([to])

    def validate(self) -> None:
        """Raise AssertionError if the books contradict each other."""
        assert len(set(self._free)) == len(self._free)
        assert all(not self._n_users[page] for page in self._free)
        used = sum(n > 0 for n in self._n_users)
        assert min(self._n_users, default=0) >= 0 and used + len(self._free) == self.n_pages


def n_pages_for(n_tokens: int) -> int:
    """Pages that a number of tokens take.

    >>> n_pages_for(0), n_pages_for(16), n_pages_for(17)
    (0, 1, 2)
    """
    return -(-n_tokens // PAGE_TOKENS)


def on_device(values: Sequence[Any], device: Any, dtype: Any = None) -> Any:
    """A tensor of whole numbers on a device, without waiting for what the device has to do."""
    import torch

    return moved(torch.tensor(values, dtype=dtype or torch.int64), device)


def moved(values: Any, device: Any) -> Any:
    """A tensor of the host on a device, without waiting for what the device has to do."""
    import torch

    if torch.device(device).type != "cuda":
        return values.to(device)
    # Pinned memory is written, which is refused where elements share it, as in expanded tensors.
    return values.contiguous().pin_memory().to(device, non_blocking=True)


def on_host(values: Any) -> Callable[[], Any]:
    """Begin to bring a tensor to the host; the function that is returned waits for it."""
    import torch

    if not values.is_cuda:
        return lambda: values
    found = values.to("cpu", non_blocking=True)
    is_there = torch.cuda.Event()
    is_there.record()

    def wait() -> Any:
        is_there.synchronize()
        return found

    return wait
