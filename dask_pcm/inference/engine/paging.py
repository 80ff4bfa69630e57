"""Pages of rows that wait are off the device, and come back as they were, to the bit.

A page is one contiguous copy each way, and one that has not changed since it was last there is not
sent again: a row only writes its last one. Pages of a prefix stay, as other rows use them. What is
cheaper to compute again is not sent, where that cannot change a token.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from dask_pcm.inference.engine.pages import PAGE_TOKENS, PagePool, n_pages_for
from dask_pcm.inference.engine.rows import Row
from dask_pcm.inference.engine.slabs import Borrow, Place, Slab, Slabs

logger = logging.getLogger(__name__)

#: Seconds that a copy takes to begin, a page one way, and a token to be computed, until they are
#: measured.
_CALL_S, _PAGE_S, _TOKEN_S = 1e-4, 1e-5, 1e-4
#: Copies of as many pages say what a page takes; smaller ones, what a copy takes to begin.
_LARGE = 8
#: Bytes of a number with which the same tokens are chosen, no matter what is computed together.
_SINGLE = 4
#: Memory of the host for pages, by default, over that of the device.
_MANY = 8
#: Weight of the latest measurement.
_NEWS = 0.2
#: Copies that are waited for on a device, to measure them.
_N_MEASURED = 8


class Paging:
    """Sends pages of rows off the device and brings them back; for the engine's thread.

    Parameters
    ----------
    pool
        The pages on the device.
    most_bytes
        Memory of the host that pages may take; by default eight times that of `pool`.
    may_recompute
        Whether a row may be computed again instead; by default in float32. In half precision that
        may change its tokens.

    Attributes
    ----------
    n_out, n_sent, n_unchanged, n_back
        Rows that were sent, pages that were, and were not since they had not changed, and pages
        that came back.
    n_recomputed
        Tokens of rows that were let go instead.
    n_moved
        Pages that left memory which was wanted back.
    """

    def __init__(
        self, pool: PagePool, most_bytes: int | None = None, may_recompute: bool | None = None
    ) -> None:
        is_single = pool.kv.dtype.itemsize >= _SINGLE
        page_bytes = pool.shape.page_bytes(pool.kv.dtype.itemsize)
        most_bytes = _MANY * pool.n_pages * page_bytes if most_bytes is None else most_bytes
        self._pool = pool
        self._may_recompute = is_single if may_recompute is None else may_recompute
        self.slabs = Slabs(
            partial(_memory, pool.kv.shape[1:], pool.kv.dtype, pool.kv.is_cuda),
            max(0, most_bytes) // page_bytes,
        )
        #: Rows with copies, by identity.
        self._rows: dict[int, Row] = {}
        #: Rungs whose memory is none for this engine.
        self._unfit: set[str] = set()
        #: Those that are off the device, by identity.
        self._parked: set[int] = set()
        self._call_s, self._page_s, self._token_s = _CALL_S, _PAGE_S, _TOKEN_S
        self._n_to_measure = _N_MEASURED
        #: Whether pages may be on their way to memory of the host, which must not be read yet.
        self._is_sending = False
        self.n_out = self.n_sent = self.n_unchanged = self.n_back = self.n_recomputed = 0
        self.n_moved = 0

    @property
    def n_bytes(self) -> int:
        """What rows take off the engine's device; read on any thread."""
        return self.slabs.n_elsewhere * int(self._pool.kv[0].nbytes)

    @property
    def parked(self) -> list[Row]:
        """Rows that are off the device."""
        return [row for row in self._rows.values() if not row.pages]

    def observe(self, n_tokens: int, seconds: float) -> None:
        """A full step has taken so long."""
        self._token_s += _NEWS * (seconds / n_tokens - self._token_s)

    def out(self, row: Row, is_wanted: bool = False) -> bool:
        """Send a row's own pages off the device, and release all that it has; False if not.

        Then there is no room, or it is cheaper to compute the row again, unless `is_wanted`.
        """
        n_own = n_pages_for(row.n_done) - row.n_shared
        first = row.n_shared - row.n_out
        dirty = row.pages[first + row.n_clean : first + n_own]
        is_wanted = is_wanted or row.n_out > 0
        if n_own <= 0 or (not is_wanted and self._is_cheaper_again(row, n_own, len(dirty))):
            return False
        spare = row.copies[row.n_clean :]
        more = self._places(max(0, len(dirty) - len(spare)), row)
        if more is None:
            return False
        self.slabs.release(spare[len(dirty) :])
        places = [*spare[: len(dirty)], *more]
        self._copy(dirty, places, is_out=True)
        row.copies = [*row.copies[: row.n_clean], *places]
        self._pool.release(row.pages)
        row.pages, row.n_out = [], 0
        self._rows[id(row)] = row
        self._parked.add(id(row))
        self.n_out, self.n_sent = self.n_out + 1, self.n_sent + len(dirty)
        self.n_unchanged += n_own - len(dirty)
        return True

    def out_first(self, row: Row, n_pages: int) -> bool:
        """Send the first pages of a row off the device, which stay there while it runs.

        They are full, and its own. False if there is no room.
        """
        stop = row.n_out + n_pages
        dirty = row.pages[row.n_clean - row.n_out : n_pages]
        spare = row.copies[row.n_clean : stop]
        more = self._places(len(dirty) - len(spare), row)
        if more is None:
            return False
        places = [*spare, *more]
        self._copy(dirty, places, is_out=True)
        self._arrive()
        row.copies = [*row.copies[: row.n_clean], *places, *row.copies[row.n_clean + len(spare) :]]
        self._pool.release(row.pages[:n_pages])
        row.pages, row.n_out, row.n_clean = row.pages[n_pages:], stop, max(row.n_clean, stop)
        self._rows[id(row)] = row
        self.n_sent, self.n_unchanged = (
            self.n_sent + len(dirty),
            self.n_unchanged + n_pages - len(dirty),
        )
        return True

    def back(self, row: Row, shared: Sequence[int], pages: list[int]) -> None:
        """Bring a row back to pages that were taken, after those that it shares.

        Its first ones, `Row.n_out`, stay where they are.
        """
        if row.n_out:
            self._arrive()
        self._copy(pages, row.copies[row.n_out :], is_out=False)
        self._pool.fill(pages)
        self._parked.discard(id(row))
        row.pages, row.n_shared = [*shared, *pages], len(shared)
        # It writes the last one next, unless that is full.
        row.n_clean = row.n_done // PAGE_TOKENS - row.n_shared
        self.n_back += len(pages)

    def forget(self, row: Row) -> None:
        """A row needs its copies no more."""
        if self._rows.pop(id(row), None) is not None:
            self.slabs.release(row.copies)
        self._parked.discard(id(row))
        row.copies, row.n_clean, row.n_out = [], 0, 0

    def lend(self, borrow: Borrow, wake: Callable[[], None]) -> None:
        """Where memory can be borrowed.

        Parameters
        ----------
        wake
            Called on any thread once ``evacuate`` has to be.
        """
        shape, dtype = self._pool.kv.shape[1:], self._pool.kv.dtype
        page_bytes = self._pool.kv[0].nbytes

        def borrowed(rung: str, n_pages: int) -> Slab | None:
            loan = borrow(rung, n_pages * page_bytes) if rung not in self._unfit else None
            if loan is None:
                return None
            try:
                numbers = loan.memory()[: n_pages * page_bytes].view(dtype)
                if numbers.is_cuda and not self._pool.kv.is_cuda:
                    self._unfit.add(rung)
                    raise RuntimeError("it is on a GPU, and the engine is not")
                slab = Slab(numbers.view(n_pages, *shape), loan)
            except (OSError, MemoryError, RuntimeError) as error:
                logger.info("Memory that is lent cannot be used: %s", error)
                loan.close()
                return None
            loan.on_wanted(wake)
            return slab

        self.slabs.lend(borrowed)

    def evacuate(self, let_go: Callable[[Row], None]) -> None:
        """Leave memory that lenders want back.

        Parameters
        ----------
        let_go
            Has a row, for which there is no other room, and those that need it computed again.
        """
        wanted = self.slabs.wanted_back()
        if not wanted:
            return
        if self._pool.kv.is_cuda:
            self._wait()  # for copies to and from places that others get here
        for row in list(self._rows.values()):
            theirs = [k for k, (slab, _) in enumerate(row.copies) if slab in wanted]
            if not theirs:
                continue
            if row.pages and not row.n_out:  # all of it is on the device
                self.forget(row)
                continue
            places = self._places(len(theirs), row)
            if places is None:
                let_go(row)
                continue
            before = [row.copies[k] for k in theirs]
            for (slab, index), (to, at) in zip(before, places, strict=True):
                to.memory[at].copy_(slab.memory[index], non_blocking=True)
            for k, place in zip(theirs, places, strict=True):
                row.copies[k] = place
            self.slabs.release(before)
            self.n_moved += len(theirs)
        # On the streams of the devices that pages have come from.
        self._wait(*{slab.memory.device for slab in wanted if slab.memory.is_cuda})
        self.slabs.return_lent()

    def return_unused(self) -> None:
        """Return memory that is lent and has no pages."""
        if self._pool.kv.is_cuda:
            self._wait()  # for copies of pages that were there
        self.slabs.return_lent(is_all=True)

    def close(self) -> None:
        """Let go of all memory."""
        for row in self._rows.values():
            row.copies, row.n_clean, row.n_out = [], 0, 0
        self._rows.clear()
        self._parked.clear()
        self.slabs.close()

    def _is_cheaper_again(self, row: Row, n_own: int, n_dirty: int) -> bool:
        n_tokens = row.n_done - row.n_shared * PAGE_TOKENS
        there_and_back_s = 2 * self._call_s + (n_dirty + n_own) * self._page_s
        return self._may_recompute and n_tokens * self._token_s < there_and_back_s

    def _places(self, n_pages: int, row: Row) -> list[Place] | None:
        """Room for pages; copies of rows that are on the device make some if there is none."""
        found = self.slabs.take(n_pages)
        for other in list(self._rows.values()) if found is None else ():
            if other is not row and other.pages and not other.n_out:
                self.forget(other)
                found = self.slabs.take(n_pages) if self.slabs.n_free >= n_pages else None
                if found is not None:
                    break
        return found

    def _copy(self, pages: Sequence[int], places: Sequence[Place], is_out: bool) -> None:
        """Copy pages to places, or from there, in their order."""
        if not pages:
            return
        kv = self._pool.kv
        is_measured = not kv.is_cuda or self._n_to_measure > 0
        if is_measured and kv.is_cuda:
            self._wait()  # for what the device does already
        begun = time.perf_counter()
        if kv.is_cuda:
            for page, (slab, index) in zip(pages, places, strict=True):
                here, there = kv[page], slab.memory[index]
                (there if is_out else here).copy_(here if is_out else there, non_blocking=True)
            self._is_sending = self._is_sending or is_out
            if is_measured:  # others overlap with what the host does
                self._n_to_measure -= 1
                self._wait()
        else:
            _copy_on_host(kv, pages, places, is_out)
        if is_measured:
            self._note(len(pages), time.perf_counter() - begun)

    def _note(self, n_pages: int, seconds: float) -> None:
        """Learn from a copy of pages what such copies take."""
        if n_pages >= _LARGE:
            self._page_s += _NEWS * (max(0.0, seconds - self._call_s) / n_pages - self._page_s)
        else:
            self._call_s += _NEWS * (max(0.0, seconds - n_pages * self._page_s) - self._call_s)

    def _arrive(self) -> None:
        """Have all pages that were sent off the device there, since the host reads them next."""
        if self._is_sending:
            self._wait()

    def _wait(self, *others: Any) -> None:
        """Wait for what the device does, and others."""
        import torch

        self._is_sending = False
        for device in {self._pool.kv.device, *others}:
            if device.type == "cuda":
                torch.cuda.synchronize(device)

    def validate(self) -> None:
        """Raise AssertionError if the books contradict each other."""
        self.slabs.validate()
        places = [place for row in self._rows.values() for place in row.copies]
        assert len(set(places)) == len(places) == self.slabs.n_used
        assert self._parked == {key for key, row in self._rows.items() if not row.pages}
        for row in self._rows.values():
            assert 0 <= row.n_out <= row.n_clean <= len(row.copies)


def _memory(shape: Sequence[int], dtype: Any, is_pinned: bool, n_pages: int) -> Any:
    """Memory of the host for pages; pinned for a GPU, as far as that is possible."""
    import torch

    if is_pinned:
        try:
            return torch.empty((n_pages, *shape), dtype=dtype, pin_memory=True)
        except RuntimeError as error:  # a limit for locked memory
            logger.info("Pages are sent from memory that is not pinned: %s", error)
    return torch.empty((n_pages, *shape), dtype=dtype)


def _copy_on_host(kv: Any, pages: Sequence[int], places: Sequence[Place], is_out: bool) -> None:
    """Copies between tensors of the host, one call for each slab."""
    import torch

    by_slab: dict[int, tuple[Any, list[int], list[int]]] = {}
    for page, (slab, index) in zip(pages, places, strict=True):
        _, mine, theirs = by_slab.setdefault(id(slab), (slab.memory, [], []))
        mine.append(page)
        theirs.append(index)
    for memory, mine, theirs in by_slab.values():
        here, there = torch.tensor(mine), torch.tensor(theirs)
        if is_out:
            memory.index_copy_(0, there, kv.index_select(0, here))
        else:
            kv.index_copy_(0, here, memory.index_select(0, there))
