"""Errors on their way from a worker to a user."""

from __future__ import annotations

import inspect

import pytest
from distributed.protocol.pickle import dumps, loads

from dask_pcm import errors

CLASSES = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]
KINDS = [kind for kind in CLASSES if not issubclass(kind, Warning)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_error_arrives_as_what_it_is(kind):
    assert issubclass(kind, errors.PCMError)
    found = loads(dumps(kind("what was found")))
    assert type(found) is kind and str(found) == "what was found"


def test_messages_do_nothing_to_a_terminal_and_show_no_secrets():
    found = errors.OutputError("row '\x1b[2J\x9b\u202e\r': at ftp://me:pw@host/x?k=v\n\tnext")
    assert str(found) == "row '\\x1b[2J\\x9b\\u202e\\r': at ftp://host/x\n\tnext"
    assert str(loads(dumps(found))) == str(found)
