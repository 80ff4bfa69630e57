"""Imported by the fork server of ``plugins/rebirth.py``: what workers need, as far as it is there.

Nothing that is missing or broken here may end the server: whoever needs it finds out by itself.
"""

from __future__ import annotations

import importlib
from contextlib import suppress

from dask_pcm.config import Config

for _name in Config.read().imports:
    with suppress(Exception):
        importlib.import_module(_name)
