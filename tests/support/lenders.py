"""Neighbours that lend memory to an engine, without processes of their own."""

from __future__ import annotations

import torch


class Loan:
    """Memory of a neighbour."""

    def __init__(self, n_bytes, is_own=False):
        self._memory = torch.zeros(n_bytes, dtype=torch.uint8)
        self.is_wanted_back = self.is_closed = False
        self.is_own = is_own

    def memory(self):
        return self._memory

    def on_wanted(self, call):
        self.call = call

    def want_back(self):
        self.is_wanted_back = True
        self.call()

    def close(self):
        self._memory.fill_(0xEE)  # as what has it next does
        self.is_closed = True


class Lender:
    """Lends as many bytes of each rung, a loan at a time."""

    def __init__(self, is_own=False, **most_bytes):
        self.is_own = is_own
        self.left = most_bytes
        self.loans = []
        self.n_wakes = 0

    def borrow(self, rung, n_bytes):
        if self.left.get(rung, 0) < n_bytes:
            return None
        self.left[rung] -= n_bytes
        self.loans.append(Loan(n_bytes, self.is_own))
        return self.loans[-1]

    def wake(self):
        self.n_wakes += 1
