"""Dask's own news is not shown while any cluster of pools is open."""

from __future__ import annotations

import logging

import pytest

import dask_pcm as pcm
from dask_pcm.errors import PoolError
from dask_pcm.pools.quiet import Quiet


@pytest.fixture
def handler():
    found = logging.StreamHandler()
    found.setLevel(logging.INFO)
    logging.getLogger("distributed").addHandler(found)
    yield found
    logging.getLogger("distributed").removeHandler(found)


def test_the_last_cluster_that_is_closed_restores_what_there_was(handler):
    quiet = Quiet()
    quiet.begin(logging.WARNING)
    quiet.begin(logging.ERROR)
    quiet.end()
    assert handler.level == logging.ERROR
    quiet.end()
    assert handler.level == logging.INFO


def test_a_cluster_is_quiet_after_another_was_refused_or_closed(handler, cluster):
    with pytest.raises(PoolError, match="Pool 'cpu': The interpreter"):
        cluster({"cpu": pcm.Pool(batch="local", python="/nowhere/python")})
    assert handler.level == logging.INFO
    one, other = cluster(), cluster()
    one.close()
    assert handler.level == logging.WARNING
    other.close()
    assert handler.level == logging.INFO
    with pytest.raises(PoolError, match="The cluster is closed"):
        other.scale(1)
    with pytest.raises(PoolError, match="The cluster is closed"):
        other.adapt()
