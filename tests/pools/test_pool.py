"""What a pool may be, and what is said of one that cannot be."""

from __future__ import annotations

import pytest

import dask_pcm as pcm
from dask_pcm.errors import PoolError
from dask_pcm.pools.pool import pools_of


def test_sizes_and_times_are_parsed_and_workers_counted():
    pool = pcm.Pool(
        memory="16 GiB", walltime="90m", gpus_per_job=4, gpus_per_worker=2, nodes_per_job=3
    )
    assert (pool.memory_bytes, pool.walltime_s, pool.idle_s) == (16 << 30, 5400.0, 60.0)
    assert (pool.workers_per_node, pool.workers_per_job) == (2, 6)
    assert pcm.Pool(max_jobs=3, gpus_per_job=2).max_workers == 6
    assert pcm.Pool().workers_per_job == 1


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"batch": "lsf"}, "batch is 'lsf'; expected one of slurm, pbs, htcondor, local"),
        ({"mem": "some"}, "mem is 'some'; expected one of total, per-cpu"),
        ({"memory": "many"}, "memory is 'many'; expected a size"),
        ({"walltime": "soon"}, "walltime is 'soon'; expected a time"),
        ({"walltime": "0h"}, "walltime is '0h'; expected more than 0"),
        ({"walltime": 60}, "walltime is 60; expected a time with its unit"),
        ({"walltime": 43_200}, "in YAML, a clock in quotes: '2:00:00'"),  # 12:00:00 without
        ({"walltime": " 60"}, "walltime is ' 60'; expected a time with its unit"),
        ({"memory": "8"}, "memory is '8'; expected a size with its unit"),
        ({"memory": 8}, "memory is 8; expected a size with its unit"),
        ({"directives": None}, "directives is None; expected a list"),
        ({"worker_args": 5}, "worker_args is 5; expected a list"),
        ({"queue": "a\nb"}, "expected a text of one line"),
        ({"python": 5}, "python is 5; expected a text"),
        ({"cores": 0}, "cores is 0; expected a whole number, at least 1"),
        ({"cores": True}, "cores is True; expected a whole number"),
        ({"max_jobs": -1}, "max_jobs is -1; expected a whole number, at least 0"),
        ({"gpus_per_job": 3, "gpus_per_worker": 2}, "gpus_per_job=3 cannot be divided"),
        ({"mem": "per-gpu"}, "mem='per-gpu' needs gpus_per_job"),
        ({"directives": "--constraint=a"}, "directives is '--constraint=a'; expected a list"),
        ({"directives": ["#SBATCH -C a"]}, "expected options without '#SBATCH'"),
        ({"gpu_per_job": 1}, "unknown key 'gpu_per_job'. Did you mean 'gpus_per_job'"),
        ({"gpus_per_job": 1, "device_memory": "big"}, "device_memory is 'big'; expected a size"),
        ({"device_memory": "8 GB"}, "device_memory needs gpus_per_job of 1 or more"),
        ({"ports": "9000"}, "ports is '9000'; expected 3 or more: 3 a worker"),
        ({"ports": "a:b"}, "ports is 'a:b'; expected 'first:last'"),
        ({"zzz": 1}, "unknown key 'zzz'. Known are batch, queue"),
    ],
)
def test_what_cannot_be_used_is_named_with_its_pool(given, text):
    with pytest.raises(PoolError, match="Pool 'a10'") as raised:
        pools_of({"a10": given})
    assert text in str(raised.value)


def test_what_contexts_of_a_worker_may_take():
    pool = pcm.Pool(gpus_per_job=4, gpus_per_worker=2, device_memory="80 GB")
    assert pool.device_bytes == 2 * 72_000_000_000
    assert pcm.Pool(gpus_per_job=1).device_bytes is None


@pytest.mark.parametrize(
    ("given", "seconds"),
    [("90m", 5400), ("02:00:00", 7200), ("1-12:00:00", 129_600), ("90:00", 5400)],
)
def test_times_as_batch_systems_write_them(given, seconds):
    assert pcm.Pool(walltime=given).walltime_s == seconds


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"pools: {a: {batch: local}, a: {batch: local}}", "it has 'a' more than once"),
        (b"pools: {a: {cores: 1, cores: 2}}", "it has 'cores' more than once"),
        ("pools: {\xe4: {}}".encode("latin-1"), "cannot be read: .*utf-8"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused(tmp_path, content, words):
    path = tmp_path / "cluster.yaml"
    path.write_bytes(content)
    with pytest.raises(PoolError, match=words):
        pools_of(path)


def test_a_file_has_pools_by_name(tmp_path):
    path = tmp_path / "cluster.yaml"
    path.write_text("pools:\n  a10: {queue: owners, gpus_per_job: 2}\n  cpu: {batch: local}\n")
    assert pools_of(path) == {
        "a10": pcm.Pool(queue="owners", gpus_per_job=2),
        "cpu": pcm.Pool(batch="local"),
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a10: {}", "must have a section pools"),
        ("pools: [", "cannot be read"),
        ("pools: {}", "no pool"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path, text, said):
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    with pytest.raises(PoolError, match=said):
        pools_of(path)


@pytest.mark.parametrize("given", [{}, {"a b": {}}, {"-1": {}}, {"--help": {}}, {"a10": 3}])
def test_pools_that_are_none_are_refused(given):
    with pytest.raises(PoolError):
        pools_of(given)
