"""What all tests of plugins have in common."""

from __future__ import annotations

import dask
import pytest


@pytest.fixture(autouse=True)
def fork_servers_import_little(request):
    """Each cluster has a fork server of its own, and transformers takes it seconds to import."""
    imports = getattr(request.module, "IMPORTS", [])  # where it is about fork servers
    with dask.config.set({"pcm.worker.imports": imports}):
        yield
