"""What a test needs and this machine lacks: the test is skipped, or fails where it must be there.

``PCM_TEST_NEEDS=weights,slurm`` lists what must be there; ``.ci/run`` sets it.
"""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def lacking(what: str, why: str) -> NoReturn:
    """Skip the test; fail it if `what` is listed."""
    is_needed = what in os.environ.get("PCM_TEST_NEEDS", "").split(",")
    (pytest.fail if is_needed else pytest.skip)(why)
