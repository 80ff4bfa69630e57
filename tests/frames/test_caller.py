"""What a task has in flight, and what becomes of it when the task ends early."""

from __future__ import annotations

from concurrent.futures import CancelledError, Future

import pandas as pd
import pytest

from dask_pcm.context.sealed import Sealed
from dask_pcm.factcheck import demo_model
from dask_pcm.frames.call import Call
from dask_pcm.frames.caller import Caller
from dask_pcm.inference.calls import Generate
from dask_pcm.inference.prompts import Template
from dask_pcm.ladder.store import of_process
from dask_pcm.plugins.worker.stats import TaskStats

META = pd.DataFrame(
    {"id": pd.Series(dtype="i8"), "text": pd.Series(dtype="str"), "error": pd.Series(dtype="str")}
)
ROWS = pd.DataFrame({"id": range(8), "claim": [f"The moon is {k}" for k in range(8)]})


class Watching:
    def waits(self): ...

    def calls(self, start, stop, n_rows): ...


def call_of(func):
    return Call(func, None, (), {}, batch_rows=4, meta=META, is_enforced=False)


class Never:
    """A function that is served, and whose results do not come."""

    is_served = True

    def __init__(self):
        self.begun = []

    def submit(self, frame, context):
        self.begun.append(Future())
        return self.begun[-1]


def test_cancelling_a_batch_cancels_what_the_function_has_begun():
    func = Never()
    found = call_of(func).submit(ROWS, [None])
    assert not func.begun[0].cancelled() and found.cancel()
    assert func.begun[0].cancelled()
    with pytest.raises(CancelledError):
        found.result()


def test_rows_of_a_task_that_ends_early_leave_the_engine():
    llm, store = demo_model(), of_process()
    func = Generate(
        template=Template("Claim: {claim}"),
        truncate_column=None,
        kept=("id",),
        batch_tokens=2048,
        max_tokens=400,
    )
    caller = Caller(Sealed.of(call_of(func), "a call"), [llm.ref], TaskStats())
    try:
        begun = [caller.submit(ROWS.iloc[at : at + 4], Watching()) for at in (0, 4)]
        serving = store.attendant(llm.ref.digest)
        assert not any(one.future.done() for one in begun)
        assert serving.hungry() == serving.n_rows - 8
        caller.close(None, None, None)
        assert all(one.future.cancelled() for one in begun)
        assert serving.hungry() == serving.n_rows  # at once, not when they would have ended
    finally:
        store.release(llm.ref.digest)
