"""The files of ``jobqueue-configs`` on a real Slurm with partitions and GPUs of the same names."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from distributed import Client

import dask_pcm as pcm
from dask_pcm.pools.batch import Start
from dask_pcm.pools.pool import pools_of
from dask_pcm.pools.slurm import script
from tests.support.jobs import found_in
from tests.support.patience import patient

CONFIGS = Path(__file__).parents[2] / "jobqueue-configs"
SLURM = sorted(path.name for path in CONFIGS.glob("slurm-*.yaml"))


@pytest.fixture
def run(claims, tmp_path):
    """Compute rows with one job of each of some pools; return the workers' environments."""

    def run(cluster, pools, n_workers):
        frame = pcm.map_partitions(
            lambda frame, model: frame[["id"]],
            pcm.read_parquet(claims(n_files=1, n_rows=40)),
            context=pcm.Context(dict, [("a", 1)], device_memory="1 GiB"),
            meta={"id": "i8"},
            batch_rows=4,
        )
        cluster.scale({name: cluster.pools[name].workers_per_job for name in pools})
        with Client(cluster) as client:
            client.wait_for_workers(n_workers, timeout=patient(120))
            pcm.write_parquet(frame, tmp_path / "out", client=client, progress=False)
            assert sorted(found_in(tmp_path / "out").id) == list(range(40))
            return list(
                client.run(lambda dask_worker: (str(dask_worker.name), dict(os.environ))).values()
            )

    return run


@pytest.mark.parametrize("name", SLURM)
def test_slurm_would_take_each_script(slurm, name, tmp_path):
    for pool, given in pools_of(CONFIGS / name).items():
        path = tmp_path / f"{pool}.sh"
        path.write_text(script(Start("tls://10.0.0.1:8786", pool, given, {}, tmp_path)))
        command = ["sbatch", "--test-only", str(path)]
        said = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
        assert said.returncode == 0 and "to start at" in said.stderr, said.stderr


def test_three_gpu_models_on_a_partition_that_preempts(slurm, cluster, run):
    one = cluster(CONFIGS / "slurm-preemptible.yaml")
    found = run(one, one.pools, 3)
    assert {name.split("-")[0] for name, _ in found} == {"h100", "a10", "titanx"}
    budgets = {name.split("-")[0]: env["DASK_PCM__LADDER__DEVICE__BUDGET"] for name, env in found}
    assert budgets == {"h100": "72000000000", "a10": "21600000000", "titanx": "10800000000"}


def test_a_whole_node_with_four_gpus_and_its_own_disk(slurm, cluster, run, tmp_path, monkeypatch):
    scratch = tmp_path / "local disk"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))  # as a site sets it in its jobs
    one = cluster(CONFIGS / "slurm-whole-nodes.yaml")
    found = run(one, ["node"], 4)
    assert sorted(env["CUDA_VISIBLE_DEVICES"] for _, env in found) == ["0", "1", "2", "3"]
    assert list(scratch.glob("dask-scratch-space*"))


def test_two_nodes_a_job_with_ports_from_ranges(slurm, cluster, run):
    one = cluster(CONFIGS / "slurm-rationed.yaml")
    assert 8786 <= int(one.scheduler_address.rpartition(":")[2]) <= 8799
    found = run(one, ["gpu"], 2)
    assert {env["SLURM_NODEID"] for _, env in found} == {"0", "1"}
    assert len(one._fleets["gpu"].jobs) == 1
    for address, worker in one.scheduler_info["workers"].items():
        ports = {int(url.rpartition(":")[2]) for url in (address, worker["nanny"])}
        assert ports <= set(range(9000, 9100)) and len(ports) == 2


@pytest.mark.skipif(
    shutil.which("qsub") is None,
    reason="no qsub: apt-get install -y --no-install-recommends slurm-wlm-torque",
)
def test_a_chunk_of_a_vnode(slurm, cluster, run):
    """Through sbatch's reading of the script, for which mem has to be last in the select."""
    one = cluster(CONFIGS / "pbs-vnodes.yaml")
    ((name, _),) = run(one, ["a100"], 1)
    assert name.startswith("a100-")


def test_a_laptop(cluster, run):
    ((name, _),) = run(cluster(CONFIGS / "laptop.yaml"), ["laptop"], 1)
    assert name.startswith("laptop-")
