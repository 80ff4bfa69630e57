"""Outputs in a folder: links, locks, full disks."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dask_pcm.errors import FencedError, OutputError
from dask_pcm.ledger.inventory import take_inventory
from dask_pcm.ledger.layout import LOG
from dask_pcm.ledger.log import note_start, read_lines
from dask_pcm.ledger.output import Output
from dask_pcm.ledger.storage import commit, fence
from dask_pcm.ledger.storage.folder import Folder
from dask_pcm.ledger.storage.tree import Tree
from dask_pcm.ledger.takeover import fence_others, other_runs
from dask_pcm.ledger.unit_journals import begin_journal, journal_names
from tests.support.outputs import NAME, NOTE, OTHER, TABLE, at_work, values


class TestFolder:
    @pytest.fixture
    def output(self, tmp_path):
        with at_work(Output(Folder(str(tmp_path / "out"), "first"))) as output:
            yield output

    def test_a_run_that_is_replaced_between_write_and_link(self, output, monkeypatch):
        def fence_first(tree, temporary, final):
            fence_others(output.as_run("newer"))
            return link(tree, temporary, final)

        link = commit.link_new
        monkeypatch.setattr(commit, "link_new", fence_first)
        with pytest.raises(FencedError):
            output.commit(NAME, [TABLE], lambda: NOTE)
        assert not output.parts()

    @pytest.mark.parametrize("step", ["creator", "link"])
    @pytest.mark.parametrize("what", ["journal", "log"])
    def test_no_file_is_created_once_the_run_is_replaced(self, output, monkeypatch, step, what):
        """However long the filesystem takes between a look at the fence and the creation."""
        newer, call = output.as_run("newer"), getattr(Tree, step)

        def slow(tree, *names):
            if f"/{what}/" in "/".join(names) or step == "creator":
                fence_others(newer)
            return call(tree, *names)

        monkeypatch.setattr(Tree, step, slow)
        with pytest.raises(FencedError, match="replaced by a newer one"):
            if what == "journal":
                begin_journal(output, NAME, {})
            else:
                note_start(output, NAME, 2)
        assert not journal_names(newer) and not newer.storage.entries(LOG)
        assert not [
            name for name in newer.storage.entries("_pcm") if name.startswith(("run-", "old-"))
        ]

    def test_replaced_between_rename_and_sync_of_the_folder(self, output, monkeypatch):
        def fence_first(tree, name=""):
            if name == output.run_dir:
                fence_others(output.as_run("newer"))
            sync(tree, name)

        sync = Tree.sync_folder
        monkeypatch.setattr(Tree, "sync_folder", fence_first)
        with pytest.raises(FencedError, match="was replaced by a newer one"):
            output.write_json(f"{output.run_dir}/status.json", {})

    @pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP])
    def test_without_hard_links_a_part_is_still_whole_and_kept(self, output, monkeypatch, code):
        assert output.commit_method == "hard links"

        def no_links(*args, **options):
            raise OSError(code, "no links here")

        monkeypatch.setattr(os, "link", no_links)
        assert output.commit(NAME, [TABLE], lambda: NOTE)
        assert not output.commit(NAME, [OTHER], lambda: NOTE)
        assert values(output) == [1, 2]
        assert "no hard links" in output.commit_method

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
    def test_a_full_disk_leaves_nothing_behind(self, output, monkeypatch, code):
        def full(*args):
            raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", full)
            with pytest.raises(OutputError, match=r"no room left .*\. Free some space, and rerun"):
                output.commit(NAME, [TABLE], lambda: NOTE)
        assert not output.parts()
        assert {p.name for p in Path(output.path, output.run_dir).iterdir()} == {
            "alive",
            "driver.json",
        }
        assert output.commit(NAME, [TABLE], lambda: NOTE)

    def test_what_dead_attempts_left_is_removed(self, tmp_path, output):
        Path(output.path, output.run_dir, "part.half").write_text("torn")
        Path(output.path, "_pcm", "new-dead").mkdir()  # killed as it began
        newer = output.as_run("newer")
        with at_work(newer):
            fence_others(newer)
            assert {p.name for p in Path(output.path, "_pcm").iterdir()} == {
                "journal",
                "lock",
                "log",
                "run-newer",
            }
        left = {p.name for p in Path(output.path, "_pcm").iterdir()}
        assert left == {"journal", "lock", "log"}

    def test_a_run_whose_process_died_is_not_at_work(self, output):
        place = Path(output.path, "_pcm", "run-dead")
        place.mkdir()
        (place / "alive").write_text("")
        (place / "driver.json").write_text('{"pid": 1}')
        (seen,) = other_runs(output)
        assert not seen.is_alive

    def test_of_a_run_on_another_host_the_status_counts_too(self, output):
        place = Path(output.path, "_pcm", "run-there")
        place.mkdir()
        (place / "alive").write_text("")  # whose lock does not reach us
        (place / "driver.json").write_text('{"host": "there"}')
        assert [writer.is_alive for writer in other_runs(output)] == [False]
        (place / "status.json").write_text("{}")
        assert [writer.is_alive for writer in other_runs(output)] == [True]
        old = time.time() - 2 * fence.LOCKLESS_SILENT_S
        os.utime(place / "status.json", (old, old))
        assert [writer.is_alive for writer in other_runs(output)] == [False]

    def test_without_locks_a_silent_run_is_not_at_work(self, output, monkeypatch):
        def no_locks(*args):
            raise OSError(errno.ENOLCK, "no locks here")

        with at_work(output.as_run("second")) as second:
            monkeypatch.setattr(fence.fcntl, "flock", no_locks)
            assert [writer.is_alive for writer in other_runs(output)] == [False]
            second.write_json(f"{second.run_dir}/status.json", {})
            assert [writer.is_alive for writer in other_runs(output)] == [True]
            old = time.time() - 2 * fence.LOCKLESS_SILENT_S
            os.utime(Path(output.path, second.run_dir, "status.json"), (old, old))
            assert [writer.is_alive for writer in other_runs(output)] == [False]

    def test_an_unwritable_output_says_so(self, tmp_path):
        (tmp_path / "file").write_text("")
        with (
            pytest.raises(OutputError, match="Cannot write to the output folder"),
            at_work(Output(Folder(str(tmp_path / "file"), "run"))),
        ):
            pass

    @pytest.mark.parametrize(
        "note", [b"5", b"{", b"\xff", b'{"rows": "2"}', b'{"rows": 3, "failed": 0}', b"[" * 99_999]
    )
    def test_a_part_whose_note_is_damaged_is_named(self, output, note):
        sink = pa.BufferOutputStream()
        pq.write_table(TABLE.replace_schema_metadata({"dask_pcm": note}), sink)
        output.storage.write(NAME, sink.getvalue().to_pybytes())
        with pytest.raises(OutputError, match=f"The part '{NAME}' in .* cannot be read"):
            take_inventory(output)

    def test_a_line_that_is_written_in_part_is_written_to_its_end(self, output, monkeypatch):
        write = os.write
        monkeypatch.setattr(os, "write", lambda file, data: write(file, data[: len(data) // 2 + 1]))
        note_start(output, NAME, 2)
        assert list(read_lines(output)) == [{"run": output.run, "start": NAME, "rows": 2}]

    def test_a_line_after_a_torn_one_is_whole(self, output):
        note_start(output, NAME, 2)
        with next(Path(output.path, LOG).iterdir()).open("a") as file:
            file.write('{"run": "torn')
        note_start(output, NAME, 2)
        assert list(read_lines(output)) == [{"run": output.run, "start": NAME, "rows": 2}] * 2

    def test_a_disk_that_is_full_while_a_line_is_written(self, output, monkeypatch):
        def full(file, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(OutputError, match="no room left"):
            note_start(output, NAME, 2)

    def test_a_line_is_synced_with_the_part_that_it_tells_of(self, output, monkeypatch):
        """And before the part is there; of the start of a unit none is."""
        done = []
        fdatasync, link = os.fdatasync, os.link
        monkeypatch.setattr(os, "fdatasync", lambda fd: (done.append("sync"), fdatasync(fd)))
        monkeypatch.setattr(os, "link", lambda *a, **k: (done.append("link"), link(*a, **k)))
        note_start(output, NAME, 2)
        assert "sync" not in done
        done.clear()
        output.commit(NAME, [TABLE], lambda: NOTE)
        assert done == ["sync", "link"]

    def test_starts_are_noted_line_by_line(self, output):
        note_start(output, NAME, 2)
        note_start(output, NAME, 2)
        with next(Path(output.path, LOG).iterdir()).open("a") as file:
            file.write('{"run": "torn')
        assert list(read_lines(output)) == [{"run": output.run, "start": NAME, "rows": 2}] * 2
