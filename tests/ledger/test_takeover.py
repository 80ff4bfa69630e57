"""Fencing of other runs, in a folder and in an object store."""

from __future__ import annotations

import pytest

from dask_pcm.errors import FencedError
from dask_pcm.ledger.layout import MANIFEST
from dask_pcm.ledger.log import note_start
from dask_pcm.ledger.parts import range_name
from dask_pcm.ledger.takeover import fence_others, other_runs, read_requests
from tests.support.outputs import NAME, NOTE, TABLE, at_work


class TestFence:
    def test_a_run_that_was_replaced_can_write_nothing(self, output):
        newer = output.as_run("newer")
        with at_work(newer):
            fence_others(newer)
            with pytest.raises(FencedError, match="replaced by a newer one"):
                output.commit(NAME, [TABLE], lambda: NOTE)
            with pytest.raises(FencedError):
                output.write_json(MANIFEST, {})
            with pytest.raises(FencedError):
                note_start(output, NAME, 2)
            assert not newer.parts() and newer.read_json(MANIFEST) is None
            assert newer.commit(NAME, [TABLE], lambda: NOTE)

    def test_a_run_that_has_ended_can_write_nothing(self, output):
        ended = output.as_run("ended")
        with at_work(ended):
            assert ended.commit(NAME, [TABLE], lambda: NOTE)
        with pytest.raises(FencedError):
            ended.commit(range_name(2, 4), [TABLE], lambda: NOTE)
        assert list(output.parts()) == [NAME]

    def test_a_writer_is_known_to_other_runs(self, output):
        assert other_runs(output) == []
        with at_work(output.as_run("second"), pid=7):
            (seen,) = other_runs(output)
            assert (seen.run, seen.is_alive, seen.says["pid"]) == ("second", True, 7)
        assert other_runs(output) == []

    def test_requests_are_read(self, output):
        assert read_requests(output) == frozenset()
        asking = output.as_run("asking").as_run(output.run)
        asking.storage.write(f"{asking.run_dir}/pause", b"")
        assert read_requests(output) == {"pause"}
        asking.storage.remove(f"{asking.run_dir}/pause")
        assert read_requests(output) == frozenset()
