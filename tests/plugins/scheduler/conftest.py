"""Fixtures of the tests of the gate."""

from __future__ import annotations

import pytest

from tests.support.gate_tasks import DONE


@pytest.fixture(autouse=True)
def nothing_done():
    DONE.clear()
