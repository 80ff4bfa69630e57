"""The files of ``jobqueue-configs``: what each submits, to the letter.

The expected texts were checked line by line against the documentation that is cited beside them.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from dask_pcm.pools import htcondor, local, pbs, slurm
from dask_pcm.pools.batch import Start
from dask_pcm.pools.pool import pools_of
from dask_pcm.pools.settings import ClusterSettings

CONFIGS = Path(__file__).parents[2] / "jobqueue-configs"
SCRIPTS = {
    "slurm": slurm.script,
    "pbs": pbs.script,
    "htcondor": htcondor.script,
    "local": local.script,
}
PYTHON = shlex.quote(sys.executable)
#: As within '...' of HTCondor's own.
QUOTED_PYTHON = PYTHON.replace("'", "''")

# https://slurm.schedmd.com/sbatch.html
#   -J, -p, -A           --job-name, --partition, --account
#   -n 1                 --ntasks: one task, and so one node
#   --cpus-per-task      cores of the task
#   --mem=64G            memory "required per node", units [K|M|G|T]
#   -t 08:00:00          --time, "hours:minutes:seconds"
#   --no-requeue         "the batch job should never be requeued under any circumstances"
#   --signal=B:USR1@60   "[{R|B}:]<sig_num>[@sig_time]": B is "only the batch shell", which exec
#                        below makes the launcher
#   --gres=gpu:h100:1    "name[[:type]:count]", "allocated to the job on each node"
# Lines after the first that is no comment are a shell's.
H100 = f"""\
#!/usr/bin/env bash

#SBATCH -J pcm-h100
#SBATCH -p preemptible
#SBATCH -A my-account
#SBATCH -n 1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH -t 08:00:00
#SBATCH --no-requeue
#SBATCH --signal=B:USR1@60
#SBATCH --gres=gpu:h100:1
export DASK_PCM__WORKER__POOL=h100
export DASK_PCM__WORKER__WALLTIME=28800s
export DASK_PCM__WORKER__IMPORTS='[]'
export DASK_PCM__LADDER__DEVICE__BUDGET=72000000000
exec {PYTHON} -m dask_pcm.pools.launcher tls://10.0.0.1:8786 --name h100 --nthreads 8\
 --memory-limit 64.00GiB --death-timeout 60 --pool h100 --workers 1
"""

# As above.
A10 = f"""\
#!/usr/bin/env bash

#SBATCH -J pcm-a10
#SBATCH -p preemptible
#SBATCH -A my-account
#SBATCH -n 1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH -t 08:00:00
#SBATCH --no-requeue
#SBATCH --signal=B:USR1@60
#SBATCH --gres=gpu:a10:1
export DASK_PCM__WORKER__POOL=a10
export DASK_PCM__WORKER__WALLTIME=28800s
export DASK_PCM__WORKER__IMPORTS='[]'
export DASK_PCM__LADDER__DEVICE__BUDGET=21600000000
exec {PYTHON} -m dask_pcm.pools.launcher tls://10.0.0.1:8786 --name a10 --nthreads 8\
 --memory-limit 32.00GiB --death-timeout 60 --pool a10 --workers 1
"""

# As above.
TITANX = f"""\
#!/usr/bin/env bash

#SBATCH -J pcm-titanx
#SBATCH -p preemptible
#SBATCH -A my-account
#SBATCH -n 1
#SBATCH --cpus-per-task=4
#SBATCH --mem=32G
#SBATCH -t 08:00:00
#SBATCH --no-requeue
#SBATCH --signal=B:USR1@60
#SBATCH --gres=gpu:titanx:1
export DASK_PCM__WORKER__POOL=titanx
export DASK_PCM__WORKER__WALLTIME=28800s
export DASK_PCM__WORKER__IMPORTS='[]'
export DASK_PCM__LADDER__DEVICE__BUDGET=10800000000
exec {PYTHON} -m dask_pcm.pools.launcher tls://10.0.0.1:8786 --name titanx --nthreads 4\
 --memory-limit 32.00GiB --death-timeout 60 --pool titanx --workers 1
"""

# https://slurm.schedmd.com/sbatch.html
#   --exclusive   "allocated all CPUs and GRES on all nodes in the allocation, but is only allocated
#                 as much memory as it requested"
#   --mem=0       "grants the job access to all of the memory on each node"
# TMPDIR is the job's: its shell fills it in.
NODE = f"""\
#!/usr/bin/env bash

#SBATCH -J pcm-node
#SBATCH -p gpu-nodes
#SBATCH -A my-account
#SBATCH -n 1
#SBATCH --cpus-per-task=32
#SBATCH -t 12:00:00
#SBATCH --no-requeue
#SBATCH --signal=B:USR1@60
#SBATCH --gres=gpu:a100:4
#SBATCH --exclusive
#SBATCH --mem=0
export DASK_PCM__WORKER__POOL=node
export DASK_PCM__WORKER__WALLTIME=43200s
export DASK_PCM__WORKER__IMPORTS='[]'
export DASK_PCM__LADDER__DEVICE__BUDGET=72000000000
ulimit -n 65536 || true
exec {PYTHON} -m dask_pcm.pools.launcher tls://10.0.0.1:8786 --name node --nthreads 32\
 --memory-limit 480.00GiB --death-timeout 60 --local-directory "$TMPDIR" --pool node --workers 4
"""

# https://slurm.schedmd.com/sbatch.html
#   --nodes=2             "If only one number is specified, this is used as both the minimum and
#                         maximum node count"
#   --ntasks-per-node=1   "Meant to be used with the --nodes option"; no -n, which would precede it
#   no --mem              the site's DefMemPerCPU, DefMemPerNode or none
# https://slurm.schedmd.com/srun.html
#   --kill-on-bad-exit=0  a node whose workers fail does not end the others
#   --cpus-per-task=4     "Beginning with 22.05, srun will not inherit the --cpus-per-task value"
#   its signals           "automatically forwarded to the tasks it is controlling"
# https://distributed.dask.org/en/stable/worker.html (dask worker --help)
#   --worker-port, --nanny-port   "<first-port>:<last-port>"
RATIONED = f"""\
#!/usr/bin/env bash

#SBATCH -J pcm-gpu
#SBATCH -p gpu
#SBATCH -A my-account
#SBATCH --cpus-per-task=4
#SBATCH -t 04:00:00
#SBATCH --no-requeue
#SBATCH --signal=B:USR1@60
#SBATCH --gres=gpu:a10:1
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
export DASK_PCM__WORKER__POOL=gpu
export DASK_PCM__WORKER__WALLTIME=14400s
export DASK_PCM__WORKER__IMPORTS='[]'
export DASK_PCM__LADDER__DEVICE__BUDGET=21600000000
export DASK_PCM__LADDER__TRANSFER__PORTS=9000:9099
exec srun --kill-on-bad-exit=0 --cpus-per-task=4 {PYTHON} -m dask_pcm.pools.launcher\
 tls://10.0.0.1:8786 --name gpu --nthreads 4 --memory-limit 16.00GiB --death-timeout 60 --pool gpu\
 --workers 1 --worker-port 9000:9099 --nanny-port 9000:9099
"""

# qsub(1B), https://github.com/openpbs/openpbs/blob/master/doc/man1/qsub.1B
#   -N, -q, -A         name (an alphabetic or numeric character first), destination, account string
#   -l walltime        job-wide, outside of select
#   -r n               "Job is not rerunnable"; several jobs go as "-r y -J 0-n" on the
#                      command line, which precedes: arrays have to be rerunnable
#   -j oe              standard error "merged into standard output"
#   -l select=1:...    "[N:]chunk", "resource_name=value[:resource_name=value ...]"
#   -l place=pack:shared   "All chunks will be taken from one host", "can share the vnodes chosen"
# pbs_resources(7B), https://github.com/openpbs/openpbs/blob/master/doc/man1/pbs_resources.7B
#   ncpus, mem=64gb are host-level; ngpus and gpu_model are the site's own resources; place may not
#   be used without select
VNODES = f"""\
#!/usr/bin/env bash

#PBS -N pcm-a100
#PBS -q gpu
#PBS -A my-account
#PBS -l walltime=08:00:00
#PBS -r n
#PBS -j oe
#PBS -l select=1:ncpus=8:ngpus=1:gpu_model=a100:mem=64gb
#PBS -l place=pack:shared
export DASK_PCM__WORKER__POOL=a100
export DASK_PCM__WORKER__WALLTIME=28800s
export DASK_PCM__WORKER__IMPORTS='[]'
export DASK_PCM__LADDER__DEVICE__BUDGET=72000000000
exec {PYTHON} -m dask_pcm.pools.launcher tls://10.0.0.1:8786 --name a100 --nthreads 8\
 --memory-limit 64.00GiB --death-timeout 60 --pool a100 --workers 1
"""

# condor_submit(1), https://htcondor.readthedocs.io/en/latest/man-pages/condor_submit.html
#   batch_name, accounting_group   the name that condor_q shows; whose share it is
#   request_cpus, request_memory, request_gpus, request_disk   units MB, GB
#   output, stream_output          standard output, written "as the job runs"
#   transfer_executable = False    it is on the machine
#   job_max_vacate_time = 120      seconds to leave after the soft kill signal (SIGTERM)
#   periodic_remove                an expression by which a job leaves the queue
#   Arguments = "..."              in double quotes: '...' is one argument, '' a quote in it, and ""
#                                  a double quote
#   $(DOLLAR)                      "a literal dollar sign"; $(ClusterId).$(ProcId) is the job
#   Queue 1                        how many jobs
BACKFILL = f"""\
#!/usr/bin/env bash

batch_name = pcm-backfill
accounting_group = my-group
request_cpus = 4
request_memory = 32768MB
request_gpus = 1
transfer_executable = False
output = /logs/pcm-backfill-$(ClusterId).$(ProcId).out
stream_output = True
job_max_vacate_time = 120
periodic_remove = JobStatus == 2 && time() - EnteredCurrentStatus > 28680
request_disk = 20GB
requirements = TARGET.GPUs >= 1

Arguments = "-c 'exec 2>&1; export PCM_JOB_ID=$(ClusterId).$(ProcId);\
 export DASK_PCM__WORKER__POOL=backfill; export DASK_PCM__WORKER__WALLTIME=28800s;\
 export DASK_PCM__WORKER__IMPORTS=''[]'';\
 exec {QUOTED_PYTHON} -m dask_pcm.pools.launcher tls://10.0.0.1:8786 --name backfill\
 --nthreads 4 --memory-limit 32.00GiB --death-timeout 60\
 --local-directory ""$(DOLLAR)_CONDOR_SCRATCH_DIR"" --pool backfill --workers 1'"
Executable = /bin/bash

Queue 1
"""

# A script for /bin/sh: no batch system.
LAPTOP = f"""\
export DASK_PCM__WORKER__POOL=laptop
export DASK_PCM__WORKER__IMPORTS='[]'
exec {PYTHON} -m dask_pcm.pools.launcher tls://10.0.0.1:8786 --name laptop --nthreads 1\
 --memory-limit 2.00GiB --death-timeout 60 --pool laptop --workers 1"""

EXPECTED = {
    "slurm-preemptible.yaml": {"h100": H100, "a10": A10, "titanx": TITANX},
    "slurm-whole-nodes.yaml": {"node": NODE},
    "slurm-rationed.yaml": {"gpu": RATIONED},
    "pbs-vnodes.yaml": {"a100": VNODES},
    "htcondor-backfill.yaml": {"backfill": BACKFILL},
    "laptop.yaml": {"laptop": LAPTOP},
}


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_each_pool_of_a_file_submits_exactly_this(name):
    written = {
        pool: SCRIPTS[given.batch](Start("tls://10.0.0.1:8786", pool, given, {}, Path("/logs")))
        for pool, given in pools_of(CONFIGS / name).items()
    }
    assert written == EXPECTED[name]


def test_every_file_is_tested_and_names_no_site():
    assert {path.name for path in CONFIGS.iterdir()} == EXPECTED.keys()
    for name in EXPECTED:
        accounts = {pool.account for pool in pools_of(CONFIGS / name).values()}
        assert accounts <= {"my-account", "my-group", None}


def test_the_limits_of_a_site_that_counts():
    name = "slurm-rationed.yaml"
    (pool,) = pools_of(CONFIGS / name).values()
    settings = ClusterSettings().over_file(CONFIGS / name)
    assert settings == ClusterSettings(poll_interval="120s", port="8786:8799")
    assert settings.poll_s == 120.0
    assert (pool.max_jobs, pool.max_queued, pool.is_array, pool.mem) == (4, 2, True, "none")
    assert pool.max_workers == 8
