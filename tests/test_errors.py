"""Errors on their way from a worker to a user."""

from __future__ import annotations

import inspect

import pytest
from distributed.protocol.pickle import dumps, loads

from dask_pcm import errors

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_error_arrives_as_what_it_is(kind):
    assert issubclass(kind, errors.PCMError)
    found = loads(dumps(kind("what was found")))
    assert type(found) is kind and str(found) == "what was found"
