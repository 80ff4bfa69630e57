"""The output of another job, stashed and put back, wherever a run is killed."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from dask_pcm.errors import FencedError
from dask_pcm.ledger.inventory import Counts, take_inventory
from dask_pcm.ledger.layout import MANIFEST
from dask_pcm.ledger.log import read_lines
from dask_pcm.ledger.output import Output
from dask_pcm.ledger.parts import range_name
from dask_pcm.ledger.stash import drop_stash, stash, unstash
from dask_pcm.ledger.storage.folder import Folder
from dask_pcm.ledger.takeover import fence_others
from tests.support.outputs import NAME, NOTE, TABLE, at_work


class TestStash:
    @pytest.mark.parametrize("has_new", [False, True])
    def test_it_is_put_back_unless_the_new_job_has_a_result(self, output, has_new):
        self.leave_old(output)
        newer = output.as_run("newer")
        with at_work(newer):
            stash(newer)
            assert not newer.parts() and not newer.storage.exists(MANIFEST)
            self.begin_new(newer)
            if has_new:
                newer.commit(range_name(5, 7), [TABLE], lambda: NOTE)
            unstash(newer)
            with pytest.raises(FencedError):
                newer.commit(range_name(7, 9), [TABLE], lambda: NOTE)
        self.check(output, has_new)

    @pytest.mark.parametrize("step", ["while it is moved", "before the manifest", "after it"])
    def test_killed_before_anything_new_it_is_put_back_by_the_next(self, output, step):
        self.leave_old(output)
        killed = output.as_run("killed")
        with at_work(killed) as newer:
            if step == "while it is moved":
                newer.storage.move(MANIFEST, f"{newer.run_dir}/aside/{MANIFEST}")
            else:
                stash(newer)
            if step == "after it":
                self.begin_new(newer)
            fence_others(output.as_run("next"))
        self.check(output, has_new=False)

    @pytest.mark.parametrize("n_steps", range(14))
    def test_killed_anywhere_the_next_run_finds_all_of_the_old_job(
        self, tmp_path, monkeypatch, n_steps
    ):
        """While it stashes, begins, ends without a result, and unstashes."""
        output = Output(Folder(str(tmp_path / "out"), "first"))
        with at_work(output):
            self.leave_old(output)
            output.commit(range_name(2, 4), [TABLE], lambda: NOTE)
            output.write_json("_pcm/report.json", {"job": "old"})
        steps = iter(range(n_steps))

        class KilledError(BaseException):
            pass

        def counted(step):
            def run(self, *args):
                if next(steps, None) is None:
                    raise KilledError
                step(self, *args)

            return run

        killed = output.as_run("killed")
        with (
            contextlib.suppress(KilledError),
            monkeypatch.context() as patched,
            at_work(killed),
        ):
            patched.setattr(Folder, "move", counted(Folder.move))
            patched.setattr(Folder, "remove", counted(Folder.remove))
            stash(killed)
            self.begin_new(killed)
            unstash(killed)
        for place in Path(output.path, "_pcm").glob("old-*"):  # as a kill leaves it
            if (place / "driver.json").exists():
                place.rename(Path(output.path, "_pcm", "run-killed"))
        fence_others(output.as_run("next"), include_alive=False)
        assert output.read_json(MANIFEST) == {"job": "old"}
        assert list(output.parts()) == [NAME, range_name(2, 4)]
        assert output.read_json("_pcm/report.json") == {"job": "old"}
        assert take_inventory(output) == {NAME: Counts(2, 0), range_name(2, 4): Counts(2, 0)}
        assert {p.name for p in Path(output.path, "_pcm").iterdir()} == {
            "journal",
            "lock",
            "log",
            "manifest.json",
            "report.json",
        }

    def leave_old(self, output):
        output.commit(NAME, [TABLE], lambda: NOTE)
        output.write_json(MANIFEST, {"job": "old"})

    def begin_new(self, newer):
        newer.write_json(MANIFEST, {"job": "new"})
        newer.commit(range_name(0, 0), [TABLE.slice(0, 0)], lambda: {"rows": 0, "failed": 0})

    def check(self, output, has_new):
        assert output.read_json(MANIFEST) == {"job": "new" if has_new else "old"}
        expected = [range_name(0, 0), range_name(5, 7)] if has_new else [NAME]
        assert list(output.parts()) == expected
        assert {line["commit"] for line in read_lines(output)} == set(expected)

    def test_a_run_without_a_stash_keeps_what_it_has(self, output):
        stash(output)
        output.write_json(MANIFEST, {"job": "first"})
        unstash(output)
        assert output.storage.exists(MANIFEST)

    def test_a_dropped_stash_is_not_put_back(self, output):
        self.leave_old(output)
        stash(output)
        drop_stash(output)
        unstash(output)
        assert not output.parts()
