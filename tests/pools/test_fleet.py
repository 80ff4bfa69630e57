"""Which jobs of a pool are submitted and cancelled, as workers and the batch system come and go."""

from __future__ import annotations

import pytest

import dask_pcm as pcm
from dask_pcm.pools.batch import JobState
from dask_pcm.pools.fleet import Fleet, Steps

RUNS, WAITS = JobState(True), JobState(False, "Priority")
ENDS = JobState(True, is_ending=True)


class Played:
    """A fleet of which a test says what happens, with a clock of its own."""

    def __init__(self, **pool):
        self.fleet = Fleet("a10", pcm.Pool(**{"batch": "local", **pool}))
        self.now = 0.0

    def submit(self, *ids):
        self.fleet.submitted(ids, self.now)

    def poll(self, **states):
        return [j.id for j in self.fleet.answered({k[1:]: s for k, s in states.items()}, self.now)]

    def workers(self, *names, noticed=()):
        self.fleet.sync({**dict.fromkeys(names, False), **dict.fromkeys(noticed, True)}, self.now)

    def cancelled(self, job):
        self.fleet.jobs[job].cancelled_at = self.now

    def steps(self, n_workers, needed=(), is_adaptive=True):
        return self.fleet.decide(n_workers, needed, is_adaptive, self.now)


@pytest.fixture
def two():
    """Two jobs with a worker each, joined."""
    one = Played()
    one.submit("1", "2")
    one.workers("a10-1", "a10-2")
    return one


def test_what_is_lacking_is_submitted_at_once_and_once():
    one = Played()
    assert one.steps(3) == Steps(n_submit=3)
    one.submit("1_0", "1_1", "1_2")
    assert one.steps(3) == Steps()
    assert one.steps(5) == Steps(n_submit=2)


def test_workers_are_counted_by_the_job():
    one = Played(gpus_per_job=2, nodes_per_job=2)
    assert one.steps(5) == Steps(n_submit=2)


def test_limits_of_jobs_and_of_those_that_wait():
    one = Played(max_jobs=4, max_queued=3)
    assert one.steps(10) == Steps(n_submit=3)
    one.submit("1", "2", "3")
    assert one.steps(10) == Steps()
    one.workers("a10-1")
    assert one.steps(10) == Steps(n_submit=1)


def test_a_worker_under_notice_is_replaced_at_the_notice(two):
    two.workers("a10-1", noticed=["a10-2"])
    assert two.steps(2) == Steps(n_submit=1)
    two.submit("3")
    assert two.steps(2) == Steps()


def test_a_worker_that_is_gone_is_replaced_soon_unless_its_job_still_runs(two):
    two.now = 100.0
    two.workers("a10-1")
    assert two.steps(2) == Steps()
    two.now += 1.0
    two.poll(_1=RUNS, _2=RUNS)  # its nanny starts another process
    two.now += 10.0
    assert two.steps(2) == Steps()
    two.now += 60.0
    assert two.steps(2) == Steps(n_submit=1)  # but not for ever


def test_a_worker_that_is_gone_is_replaced_before_the_batch_system_may_be_asked(two):
    two.workers("a10-1")
    two.now = 2.6
    assert two.steps(2) == Steps(n_submit=1)
    two.submit("3")
    two.now = 4.0
    two.workers("a10-1", "a10-2")  # it was only its process: what waits is too much
    assert two.steps(2) == Steps()
    two.now = 20.0
    assert two.steps(2) == Steps(cancel=("3",))


def test_a_job_that_the_batch_system_does_not_know_is_over_however_it_ended(two):
    two.submit("3")
    two.now = 5.0
    two.submit("4")  # after the question was asked
    assert two.fleet.answered({"1": RUNS, "2": RUNS}, 4.0)[0].id == "3"
    assert two.fleet.jobs.keys() == {"1", "2", "4"}
    assert two.steps(4) == Steps(n_submit=1)


def test_a_job_that_ends_is_replaced_and_judged_once_its_output_is_there(two):
    two.now = 5.0
    assert two.poll(_1=RUNS, _2=ENDS) == []
    two.workers("a10-1", "a10-2")
    assert two.steps(2) == Steps(n_submit=1)
    assert two.poll(_1=RUNS) == ["2"]


def test_what_waits_goes_before_what_runs_and_the_youngest_first(two):
    two.now = 1.0
    two.submit("3")
    two.now = 2.0
    two.submit("4")
    assert two.steps(3, is_adaptive=False) == Steps(cancel=("4",))
    assert two.steps(1, needed={"a10-1"}, is_adaptive=False).cancel == ("4", "3", "2")


def test_adaptive_gives_back_what_has_been_idle_for_its_time(two):
    assert two.steps(0, needed={"a10-1"}) == Steps()
    two.now = 59.0
    assert two.steps(0, needed={"a10-1"}) == Steps()
    two.now = 61.0
    assert two.steps(0, needed={"a10-1"}) == Steps(cancel=("2",))
    assert two.steps(2) == Steps()  # wanted again: counted from anew
    two.now = 62.0
    assert two.steps(0, needed={"a10-1"}) == Steps()


def test_above_a_maximum_of_all_pools_work_is_given_back_too(two):
    two.submit("3")
    busy = {"a10-1", "a10-2"}
    assert two.fleet.decide(3, busy, True, 0.0, 3) == Steps()
    assert two.fleet.decide(2, busy, True, 0.0, 2) == Steps(cancel=("3",))  # at once
    assert two.fleet.decide(1, busy, True, 0.0, 1) == Steps(cancel=("3", "1"))
    assert two.fleet.decide(0, busy, True, 0.0, 2) == Steps(cancel=("3",))


def test_a_refused_submission_is_tried_again_later_and_later():
    one = Played()
    waits = []
    for _ in range(4):
        one.fleet.refused("sbatch: no", one.now)
        since = one.now
        while one.steps(1) == Steps():
            one.now += 1.0
        waits.append(one.now - since)
    assert waits == [5.0, 10.0, 20.0, 40.0]
    assert one.steps(8) == Steps(n_submit=1)  # first one, as a site may take no more at once
    assert "sbatch: no" in str(one.fleet)
    one.submit("1")
    assert not one.fleet.trouble and one.steps(8) == Steps(n_submit=2)


def test_jobs_that_end_without_a_worker_are_said_after_three_and_block_the_pool():
    one = Played()
    said = []
    for number in range(3):
        one.submit(str(number))
        one.now += 1.0
        assert one.poll() == [str(number)]
        said.append(one.fleet.ended_in_vain("no module named x", one.now))
    assert said == [False, False, True]
    assert "no module named x" in one.fleet.trouble and one.steps(1) == Steps()
    one.now += 6.0
    assert one.steps(1) == Steps(n_submit=1)
    one.submit("3")
    assert one.fleet.trouble  # accepted is not joined
    one.workers("a10-3")
    assert not one.fleet.trouble


def test_a_pool_whose_workers_cannot_be_reached_is_tried_less_and_less():
    one = Played()
    for wait_s in (5.0, 10.0, 20.0):
        one.submit(str(one.now))
        one.fleet.unreachable("a10-1", "tls://10.0.0.9:1", "no answer", one.now)
        one.cancelled(str(one.now))
        one.now += wait_s - 1.0
        assert one.steps(1) == Steps()
        one.now += 1.0
        assert one.steps(1) == Steps(n_submit=1)
    assert "a10-1 cannot be reached at tls://10.0.0.9:1 (no answer)" in str(one.fleet)


def test_why_jobs_wait_is_said_in_the_words_of_the_batch_system():
    one = Played()
    one.submit("1", "2")
    one.now = 1.0
    one.poll(_1=WAITS, _2=WAITS)
    assert str(one.fleet) == "a10: 0 jobs with workers, 2 pending (Priority)"


def test_jobs_that_have_nodes_and_no_worker_yet_are_said():
    one = Played()
    one.submit("1", "2", "3")
    one.now = 1.0
    one.poll(_1=RUNS, _2=WAITS, _3=RUNS)
    one.workers("a10-3")
    assert str(one.fleet) == "a10: 1 jobs with workers, 1 pending (Priority), 1 starting"


def test_what_was_refused_is_forgotten_when_the_user_asks_anew():
    one = Played()
    for _ in range(3):
        one.fleet.refused("no", one.now)
    one.fleet.forgive()
    assert one.steps(4) == Steps(n_submit=4) and not one.fleet.trouble


def test_a_large_submission_that_does_nothing_counts_once():
    one = Played()
    one.submit(*map(str, range(50)))
    one.now = 1.0
    assert len(one.poll()) == 50
    assert not one.fleet.ended_in_vain("no module", one.now)
    assert one.steps(50) == Steps(n_submit=50)


def test_what_jobs_have_waited_for_their_nodes_is_learned():
    one = Played()
    assert one.fleet.offer(0.0).wait_s == 0.0
    one.submit("1", "2", "3")
    one.now = 8.0
    one.poll(_1=RUNS, _2=WAITS, _3=WAITS)
    one.now = 11.0
    one.poll(_1=RUNS, _2=WAITS, _3=WAITS)
    one.workers("a10-1", "a10-2")  # how long it takes to start is no wait
    one.now = 60.0
    one.workers("a10-1", "a10-2", "a10-3")
    assert one.fleet.offer(60.0).wait_s == 11.0  # of 8, 11 and 60


def test_a_node_whose_jobs_cannot_start_is_excluded_for_a_time_and_said_once():
    one = Played()
    output = "+ source profile\nNode n1 cannot be used: its scratch folder '/s': File exists.\nx"
    words = "Node n1 cannot be used: its scratch folder '/s': File exists."
    assert one.fleet.exclude(output, 0.0) == words
    assert one.fleet.exclude("Node is bad", 0.0) == ""
    assert one.fleet.excluded(1.0) == ["n1"]
    assert one.fleet.exclude(output, 500.0) == ""  # known
    assert one.fleet.excluded(1000.0) == ["n1"] and one.fleet.excluded(1101.0) == []
    assert one.fleet.exclude(output, 1102.0) == words


def test_what_is_cancelled_and_still_there_is_cancelled_again(two):
    two.cancelled("2")
    known = {"1", "2"}
    assert two.fleet.to_cancel_again(known, 5.0) == []
    assert two.fleet.to_cancel_again(known, 11.0) == ["2"]
    assert two.fleet.to_cancel_again({"1"}, 11.0) == []


def test_a_job_that_hangs_on_to_its_nodes_is_cancelled(two):
    two.workers("a10-1")
    two.now = 100.0
    two.poll(_1=RUNS, _2=RUNS)
    assert two.steps(2) == Steps(n_submit=1)
    two.submit("3")
    two.now = 121.0
    assert two.steps(2) == Steps(cancel=("2",))


def test_a_pool_is_counted_on_for_what_it_gives(two):
    assert two.fleet.offer(1.0).n_counted == float("inf")
    two.submit("3")
    assert two.fleet.offer(29.0).n_counted == float("inf")
    assert two.fleet.offer(31.0).n_counted == 2
    two.workers("a10-1", "a10-2", "a10-3")
    assert two.fleet.offer(31.0).n_counted == float("inf")
    two.fleet.refused("no", 31.0)
    assert two.fleet.offer(31.0).n_counted == 3


@pytest.mark.parametrize("job", ["3", "3_0", "3.0", "3[0]"])
def test_a_job_whose_submission_seemed_to_fail_belongs_to_the_pool(two, job):
    two.fleet.refused("timed out", two.now)
    two.workers("a10-1", "a10-2", f"a10-{job}-0")
    assert two.fleet.jobs[job].workers == {f"a10-{job}-0"}
    assert two.steps(3) == Steps() and not two.fleet.trouble
    assert job in two.steps(0, is_adaptive=False).cancel
    two.now = 5.0
    assert [one.id for one in two.fleet.answered({"1": RUNS, "2": RUNS}, two.now)] == [job]
    two.workers("a10-1", "a10-2", f"a10-{job}-0")  # the last moments of one that is over
    assert job not in two.fleet.jobs


def test_workers_of_a_pool_whose_name_begins_alike_are_not_its_own(two):
    assert two.fleet.job_of("a10-1") == "1" and two.fleet.job_of("a10-1-0") == "1"
    assert two.fleet.job_of("a10-mine") is None  # a user's own worker
    assert two.fleet.job_of("a10-x-1") is None and two.fleet.job_of("a1-1") is None


@pytest.fixture
def requeued():
    """Two jobs with a worker each, whose system queues them again after an eviction."""
    one = Played(batch="htcondor")
    one.submit("1.0", "1.1")
    one.workers("a10-1.0", "a10-1.1")
    return one


def answer(played, **states):
    """An answer of a system whose ids have a dot."""
    given = {job[1:].replace("_", "."): state for job, state in states.items()}
    return [job.id for job in played.fleet.answered(given, played.now)]


def test_an_evicted_job_waits_again_and_is_not_replaced(requeued):
    requeued.now = 100.0
    requeued.workers("a10-1.0", noticed=["a10-1.1"])
    assert requeued.steps(2) == Steps()
    requeued.workers("a10-1.0")
    requeued.now += 29.0  # the batch system has not been asked since
    assert requeued.steps(2) == Steps()
    assert not answer(requeued, _1_0=RUNS, _1_1=WAITS)
    requeued.workers("a10-1.0")
    requeued.now += 1000.0
    assert requeued.steps(2) == Steps() and requeued.fleet.offer(requeued.now).n_counted == 1
    assert str(requeued.fleet) == "a10: 1 jobs with workers, 1 pending (Priority)"
    requeued.workers("a10-1.0", "a10-1.1-start2")
    assert requeued.steps(2) == Steps() and requeued.fleet.n_waiting() == 0
    assert requeued.fleet.jobs["1.1"].workers == {"a10-1.1-start2"}


def test_a_job_that_is_removed_from_such_a_queue_is_replaced(requeued):
    requeued.now = 100.0
    requeued.workers("a10-1.0")
    assert answer(requeued, _1_0=RUNS) == ["1.1"]
    assert requeued.steps(2) == Steps(n_submit=1)


def test_a_job_that_such_a_system_runs_without_workers_is_replaced_and_ended(requeued):
    requeued.now = 100.0
    requeued.workers("a10-1.0")
    requeued.now += 30.0
    answer(requeued, _1_0=RUNS, _1_1=RUNS)
    assert requeued.steps(2) == Steps()
    requeued.now += 31.0
    assert requeued.steps(2) == Steps(n_submit=1)
    requeued.now += 60.0
    assert "1.1" in requeued.steps(2).cancel
