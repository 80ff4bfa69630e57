"""What every output must do, in a folder and in an object store."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import json
import multiprocessing
import os
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dask_pcm.errors import FencedError, OutputError
from dask_pcm.ledger.inventory import Counts, take_inventory
from dask_pcm.ledger.layout import LOG, MANIFEST
from dask_pcm.ledger.log import note_called, note_start, read_lines
from dask_pcm.ledger.output import Output
from dask_pcm.ledger.parts import parse_name, partition_name, range_name, write_part
from dask_pcm.ledger.stash import drop_stash, stash, unstash
from dask_pcm.ledger.storage import commit, fence, lock_objects
from dask_pcm.ledger.storage.folder import Folder
from dask_pcm.ledger.storage.objects import Objects
from dask_pcm.ledger.storage.tree import Tree
from dask_pcm.ledger.takeover import fence_others, other_runs, read_requests
from dask_pcm.ledger.unit_journals import begin_journal, journal_names
from dask_pcm.runs.progress.report import rows_recomputed
from tests.support.patience import patient

TABLE = pa.table({"x": [1, 2]})
OTHER = pa.table({"x": [9]})
NAME = range_name(0, 2)
NOTE = {"rows": 2, "failed": 0}
COMMIT_LINE = {"run": "r", "commit": NAME, "rows": 2, "failed": 0, "bytes": 9, "stamp": "1"}
#: JSON of another kind, types of another kind, keys that a flipped bit has renamed, and no JSON.
DAMAGED_LINES = [
    b"5",
    b"null",
    b"\xff\xfe{}",
    b"\0" * 64,
    b'{"run": "first", "commit',
    b"[" * 100_000,
    b"9" * 5_000,
    b'{"rwn": "first", "start": "part-000000000000-000000000002.parquet", "rows": 2}',
    b'{"run": "first", "start": 5, "rows": 1}',
    b'{"run": "first", "started": "part-000000000000-000000000002.parquet"}',
    b'{"run": "first", "called": [[2, 0]], "journal": null}',
    b'{"run": "first", "called": [[0, 1e400]], "journal": 3}',
    *(
        json.dumps({**COMMIT_LINE, key: value}).encode()
        for key, value in [("rows", -1), ("failed", True), ("bytes", 1.5), ("stamp", None)]
    ),
    *(
        json.dumps({k: v for k, v in COMMIT_LINE.items() if k != key}).encode()
        for key in ("run", "rows", "failed", "bytes", "stamp")
    ),
]


@pytest.fixture(params=["folder", "conditional put", "lock files", "files by URL"])
def output(request, tmp_path):
    """An output at which a run is at work."""
    if request.param == "folder":
        made = Output(Folder(str(tmp_path / "out"), "first"))
    elif request.param == "files by URL":  # as over SFTP: names are those of files
        url = f"local://{tmp_path}/store/out"
        made = Output(Objects.at(url, str(tmp_path / "locks"))).as_run("first")
    else:
        bucket = request.getfixturevalue("bucket")
        locks = str(tmp_path / "locks") if request.param == "lock files" else None
        made = Output(Objects.at(f"{bucket}/out", locks)).as_run("first")
    with at_work(made):
        yield made


@contextlib.contextmanager
def at_work(output: Output, **says):
    with contextlib.ExitStack() as stack:
        with output.storage.fence.takeover_lock():
            stack.enter_context(output.storage.fence.open_run({"host": "here", **says}))
        yield output


def values(output, name=NAME):
    return output.read_table(name)["x"].to_pylist()


def test_names_sort_in_input_order_and_parse():
    ranges = [(0, 32), (32, 1_000), (1_000, 10**9), (10**9, 10**12)]
    names = [range_name(*pair) for pair in ranges]
    assert sorted(names) == names
    assert [parse_name(name) for name in names] == ranges
    assert parse_name(partition_name(7)) == 7
    assert parse_name("part-1.parquet") is None


class TestParts:
    def test_a_part_is_written_once(self, output):
        assert output.commit(NAME, [TABLE], lambda: NOTE)
        assert not output.commit(NAME, [OTHER], lambda: {"rows": 1, "failed": 0})
        assert values(output) == [1, 2]
        assert output.read_note(NAME).items() >= {**NOTE, "unit": NAME}.items()
        assert list(output.parts()) == [NAME]

    def test_a_part_is_replaced_as_a_whole(self, output):
        output.commit(NAME, [TABLE], lambda: NOTE)
        assert output.commit(NAME, [OTHER], lambda: {"rows": 1, "failed": 1}, replaces=True)
        assert values(output) == [9]
        assert take_inventory(output) == {NAME: Counts(1, 1)}

    def test_of_many_writers_one_is_first(self, output):
        spawn = multiprocessing.get_context("spawn")
        ready, results = spawn.Event(), spawn.Queue()
        writers = [
            spawn.Process(target=_commit, args=(output, i, ready, results)) for i in range(4)
        ]
        for writer in writers:
            writer.start()
        for _ in writers:
            assert results.get(timeout=patient(60)) == "here"
        ready.set()
        won = [results.get(timeout=patient(30)) for _ in writers]
        for writer in writers:
            writer.join(30)
        assert [kept for _, kept in won].count(True) == 1
        assert values(output) == [i for i, kept in won if kept]

    def test_several_tables_are_row_groups_of_one_part(self, output):
        output.commit(NAME, iter([TABLE, TABLE]), lambda: {"rows": 4, "failed": 0})
        assert values(output) == [1, 2, 1, 2]

    def test_strangers_are_seen(self, output):
        output.storage.write("thesis.txt", b"years of work")
        if isinstance(output.storage, Folder):  # what mkfs makes
            os.mkdir(os.path.join(output.path, "lost+found"))
        assert output.foreign_files() == ["thesis.txt"]


def _commit(output, value, ready, results):
    results.put("here")
    ready.wait()
    table = pa.table({"x": [value]})
    results.put((value, output.commit(NAME, [table], lambda: {"rows": 1, "failed": 0})))


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

    def test_who_is_at_work_is_known_to_others(self, output):
        assert other_runs(output) == []
        with at_work(output.as_run("second"), pid=7):
            (seen,) = other_runs(output)
            assert (seen.run, seen.is_alive, seen.says["pid"]) == ("second", True, 7)
        assert other_runs(output) == []

    def test_wishes(self, output):
        assert read_requests(output) == frozenset()
        asking = output.as_run("asking").as_run(output.run)
        asking.storage.write(f"{asking.run_dir}/pause", b"")
        assert read_requests(output) == {"pause"}
        asking.storage.remove(f"{asking.run_dir}/pause")
        assert read_requests(output) == frozenset()


class TestSettingAside:
    @pytest.mark.parametrize("has_new", [False, True])
    def test_it_is_put_back_unless_something_new_is_there(self, output, has_new):
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
        """While it sets aside, begins, finds that nothing comes of it, and puts back."""
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

    def test_a_run_that_set_nothing_aside_keeps_what_it_has(self, output):
        stash(output)
        output.write_json(MANIFEST, {"job": "first"})
        unstash(output)
        assert output.storage.exists(MANIFEST)

    def test_dropped_it_is_gone(self, output):
        self.leave_old(output)
        stash(output)
        drop_stash(output)
        unstash(output)
        assert not output.parts()


class TestStock:
    def test_what_was_committed_is_counted(self, output):
        output.commit(NAME, [TABLE], lambda: {"rows": 2, "failed": 1})
        output.commit(range_name(2, 3), [OTHER], lambda: {"rows": 1, "failed": 0})
        assert take_inventory(output) == {NAME: Counts(2, 1), range_name(2, 3): Counts(1, 0)}

    def test_a_part_that_nobody_noted_has_its_own_note(self, output):
        output.commit(NAME, [TABLE], lambda: {"rows": 2, "failed": 1})
        output.storage.remove(LOG)
        assert take_inventory(output) == {NAME: Counts(2, 1)}

    def test_a_part_that_is_gone_is_told_of(self, output, caplog):
        output.commit(NAME, [TABLE], lambda: NOTE)
        output.storage.remove(NAME)
        assert take_inventory(output) == {}
        assert f"committed are gone, such as {NAME}" in caplog.text

    def test_a_part_that_was_edited_is_refused(self, output):
        """Also where the note was kept and the size is the same."""
        output.commit(NAME, [TABLE], lambda: NOTE)
        read = output.read_table(NAME)
        edited = read.set_column(0, "x", pa.array([1, 3]))
        sink = pa.BufferOutputStream()
        pq.write_table(edited.replace_schema_metadata(read.schema.metadata), sink)
        output.storage.write(NAME, sink.getvalue().to_pybytes())
        with pytest.raises(OutputError, match=rf"The part '{NAME}' in .* was changed since"):
            take_inventory(output)

    def test_a_copy_of_a_part_is_refused_under_any_other_name(self, output):
        output.commit(NAME, [TABLE], lambda: NOTE)
        with output.storage.reader(NAME) as file:
            content = file.read()
        for name in (range_name(2, 4), partition_name(7), range_name(0, 3)):
            output.storage.write(name, content)
            with pytest.raises(OutputError, match=rf"'{name}' in .* committed as '{NAME}'.*Remove"):
                take_inventory(output)
            output.storage.remove(name)
        assert take_inventory(output) == {NAME: Counts(2, 0)}

    def test_a_copy_in_the_place_of_a_part_is_refused(self, output):
        """Also where its size is that of the part that was there."""
        other = range_name(2, 4)
        for name in (NAME, other):
            output.commit(name, [TABLE], lambda: NOTE)
        with output.storage.reader(NAME) as file:
            output.storage.write(other, file.read())
        with pytest.raises(OutputError, match=f"'{other}' in .* was committed as '{NAME}'"):
            take_inventory(output)

    def test_a_part_written_twice_is_ours_when_its_last_line_is_lost(self, output):
        """Whatever lost it: a full disk, a lost node, a flipped bit."""
        output.commit(NAME, [TABLE], lambda: {"rows": 2, "failed": 1})
        lines = list(read_lines(output))
        output.commit(NAME, [OTHER], lambda: {"rows": 1, "failed": 0}, replaces=True)
        for name in output.storage.entries(LOG):
            output.storage.remove(f"{LOG}/{name}")
        for line in lines:
            output.storage.log.append(line)
        assert take_inventory(output) == {NAME: Counts(1, 0)}

    def test_damaged_lines_are_left_out(self, output, caplog):
        output.commit(NAME, [TABLE], lambda: NOTE)
        whole = list(read_lines(output))
        for number, text in enumerate(DAMAGED_LINES):
            output.storage.write(f"{LOG}/damaged-{number}", text)
        assert take_inventory(output) == {NAME: Counts(2, 0)}
        assert f"{len(DAMAGED_LINES)} damaged lines in the log" in caplog.text
        assert sorted(map(str, read_lines(output))) == sorted(map(str, whole))
        assert rows_recomputed(read_lines(output), "first", lambda name: 0) == 0

    def test_a_part_of_another_output_is_refused(self, output):
        output.commit(NAME, [TABLE], lambda: {**NOTE, "begun": "elsewhere"})
        if output.storage.allows_late_commits:
            assert take_inventory(output) == {}
        else:
            with pytest.raises(OutputError, match="is of another output"):
                take_inventory(output)

    def test_a_replaced_part_whose_run_died_right_after_is_ours(self, output, monkeypatch):
        output.commit(NAME, [TABLE], lambda: NOTE)

        def dies(*args):
            raise KeyboardInterrupt

        target, name = (
            (Tree, "sync_folder") if isinstance(output.storage, Folder) else (commit, "stamp_of")
        )
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(target, name, dies)
            output.commit(NAME, [OTHER], lambda: {"rows": 1, "failed": 0}, replaces=True)
        assert take_inventory(output) == {NAME: Counts(1, 0)}

    def test_parts_with_rows_in_common(self, output):
        output.commit(range_name(0, 4), [TABLE, TABLE], lambda: {"rows": 4, "failed": 0})
        output.commit(range_name(3, 5), [TABLE], lambda: NOTE)
        if isinstance(output.storage, Folder):
            with pytest.raises(OutputError, match=r"part-0+3-0+5.* have rows in common"):
                take_inventory(output)
        else:  # one of a run that was shut out may arrive late
            assert take_inventory(output) == {range_name(0, 4): Counts(4, 0)}
            assert list(output.parts()) == [range_name(0, 4)]

    def test_a_part_of_somebody_elses_is_refused(self, output):
        sink = pa.BufferOutputStream()
        pq.write_table(TABLE, sink)
        output.storage.write(NAME, sink.getvalue().to_pybytes())
        with pytest.raises(OutputError, match="was not written by dask_pcm"):
            take_inventory(output)

    def test_a_torn_part_is_named(self, output):
        output.storage.write(NAME, b"PAR1 torn")
        with pytest.raises(OutputError, match=rf"part '{NAME}' .* cannot be read"):
            take_inventory(output)


def test_a_copy_of_an_output_is_the_same_output(tmp_path):
    import shutil

    first = Output(Folder(str(tmp_path / "first"), "run"))
    with at_work(first):
        first.commit(NAME, [TABLE], lambda: NOTE)
    shutil.copytree(first.path, tmp_path / "copy", copy_function=shutil.copy)  # at another time
    os.utime(tmp_path / "copy" / NAME, ns=(1, 1))
    assert take_inventory(Output(Folder(str(tmp_path / "copy"), "run"))) == {NAME: Counts(2, 0)}


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
            with pytest.raises(OutputError, match=r"no room left .*\. Make room, and run the same"):
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
        assert [owner.is_alive for owner in other_runs(output)] == [False]
        (place / "status.json").write_text("{}")
        assert [owner.is_alive for owner in other_runs(output)] == [True]
        old = time.time() - 2 * fence.LOCKLESS_SILENT_S
        os.utime(place / "status.json", (old, old))
        assert [owner.is_alive for owner in other_runs(output)] == [False]

    def test_without_locks_a_silent_run_is_not_at_work(self, output, monkeypatch):
        def no_locks(*args):
            raise OSError(errno.ENOLCK, "no locks here")

        with at_work(output.as_run("second")) as second:
            monkeypatch.setattr(fence.fcntl, "flock", no_locks)
            assert [owner.is_alive for owner in other_runs(output)] == [False]
            second.write_json(f"{second.run_dir}/status.json", {})
            assert [owner.is_alive for owner in other_runs(output)] == [True]
            old = time.time() - 2 * fence.LOCKLESS_SILENT_S
            os.utime(Path(output.path, second.run_dir, "status.json"), (old, old))
            assert [owner.is_alive for owner in other_runs(output)] == [False]

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


class TestObjects:
    def test_which_way_is_used_is_said(self, bucket, tmp_path):
        assert Output(Objects.at(f"{bucket}/out", None)).commit_method == "conditional put"
        with_locks = Output(Objects.at(f"{bucket}/out", str(tmp_path / "locks")))
        assert with_locks.commit_method == f"lock files in {tmp_path / 'locks'}"

    def test_a_store_without_conditional_put_needs_a_folder_for_locks(self, bucket, monkeypatch):
        monkeypatch.setattr(Objects, "create", lambda self, name, data: True)
        with pytest.raises(OutputError, match=r"only if there is none yet.*lock_folder"):
            Objects.at(f"{bucket}/out", None)
        with pytest.raises(OutputError, match="lock_folder"):
            Objects.at("memory://out", None)

    def test_a_store_that_cannot_be_written(self, tmp_path):
        with pytest.raises(OutputError, match="Cannot write to the output 'local:///proc/out'"):
            Objects.at("local:///proc/out", str(tmp_path))

    def test_a_store_that_cannot_be_reached(self):
        with pytest.raises(OutputError, match=r"Cannot write to the output 's3://no-such-bucket"):
            Objects.at(f"s3://no-such-bucket-{uuid.uuid4().hex}/out", None)

    def test_a_run_that_says_nothing_is_not_at_work(self, bucket, monkeypatch):
        output = Output(Objects.at(f"{bucket}/out", None))
        with at_work(output.as_run("second")):
            assert [owner.is_alive for owner in other_runs(output)] == [True]
            monkeypatch.setattr(fence, "SILENT_S", -1.0)
            assert [owner.is_alive for owner in other_runs(output)] == [False]

    def test_a_lock_whose_holder_died_is_taken_over(self, bucket, tmp_path, monkeypatch):
        output = Output(Objects.at(f"{bucket}/out", str(tmp_path)))
        with at_work(output):
            lock = Path(output.storage.locks, output.storage.lock_files._path_of(NAME))
            lock.write_text("")
            os.utime(lock, (1, 1))
            assert output.commit(NAME, [TABLE], lambda: NOTE)
        assert not list(tmp_path.glob("*/*part*"))

    def test_of_many_who_find_a_dead_holders_lock_one_at_a_time_goes_on(self, bucket, monkeypatch):
        """However they come to stand between looking, creating and removing."""
        monkeypatch.setattr(lock_objects, "SILENT_S", 2.0)
        monkeypatch.setattr(lock_objects, "POLL_S", 0.001)
        output = Output(Objects.at(f"{bucket}/out", None))
        output.storage.create("_pcm/lock-000000007", b"dead")
        inside, seen = [], []

        def take(number):
            for _ in range(3):
                with output.as_run(f"run {number}").storage.fence.takeover_lock():
                    inside.append(number)
                    seen.append(len(inside))
                    time.sleep(0.01)
                    inside.remove(number)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(take, range(4)))
        assert seen == [1] * 12
        assert [name for name in output.storage.entries("_pcm") if "lock" in name] == [
            "lock-000000019"
        ]

    @pytest.mark.parametrize("has_locks", [False, True])
    def test_a_part_that_arrives_from_before_it_was_begun_anew(self, bucket, tmp_path, has_locks):
        """Whatever of an overwritten job is still on its way, under whatever name."""
        output = Output(Objects.at(f"{bucket}/out", str(tmp_path) if has_locks else None))
        old, new = (
            dataclasses.replace(output.as_run(name), generation=name) for name in ("old", "new")
        )
        late = [NAME, range_name(2, 3)]
        with at_work(old):
            for name in late:
                assert old.commit(name, [OTHER], lambda: {"rows": 1, "failed": 0, "begun": "old"})
        note = {**NOTE, "begun": "new"}
        with at_work(new):
            assert new.commit(NAME, [TABLE], lambda: note)  # though a part is there
            assert not new.commit(NAME, [TABLE], lambda: note)
            assert values(new) == [1, 2]
            assert take_inventory(new) == {NAME: Counts(2, 0)}
            assert list(new.parts()) == [NAME]
            late_bytes = io.BytesIO()
            write_part(late_bytes, NAME, [OTHER], lambda: {"rows": 1, "failed": 0, "begun": "old"})
            new.storage.fs.pipe_file(
                new.storage.url(NAME), late_bytes.getvalue()
            )  # in the place of ours
            assert take_inventory(new) == {} and not new.parts()

    def test_names_of_objects_are_no_longer_than_stores_allow(self, bucket):
        output = Output(Objects.at(f"{bucket}/{'deep/' * 20}out", None))
        rest = [(2 * n, 2 * n + 1) for n in range(300)]
        with at_work(output):
            note_called(output, rest, "a journal", output.run)
            assert output.commit(NAME, [TABLE], lambda: {**NOTE, "begun": "b" * 500})
            assert take_inventory(dataclasses.replace(output, generation="b" * 500)) == {
                NAME: Counts(2, 0)
            }
            (line,) = (line for line in read_lines(output) if "called" in line)
            assert line["called"] == [list(pair) for pair in rest]
            names = [f"{output.path}/{LOG}/{name}" for name in output.storage.entries(LOG)]
        assert max(len(name.partition("//")[2]) for name in names) <= 1024

    def test_large_parts_are_put_conditionally_too(self, bucket):
        output = Output(Objects.at(f"{bucket}/out", None))
        big = pa.table({"x": [os.urandom(1 << 20) for _ in range(110)]})
        with at_work(output):
            assert output.commit(NAME, [big], lambda: {"rows": 110, "failed": 0})
            assert not output.commit(NAME, [big], lambda: {"rows": 110, "failed": 0})


def test_rows_recomputed_compares_ranges_and_not_names():
    def starts(*rows):
        return [{"run": run, "start": range_name(a, b), "rows": b - a} for run, a, b in rows]

    def again(*rows):
        return rows_recomputed(starts(*rows), "now", lambda name: 7)

    assert again(("now", 0, 10), ("now", 10, 20)) == 0
    assert again(("now", 0, 10), ("now", 0, 10)) == 10
    assert again(("before", 0, 15), ("now", 10, 20)) == 5
    assert again(("before", 0, 9), ("before", 0, 9), ("now", 9, 20)) == 0
    whole = [{"run": run, "start": partition_name(3), "rows": None} for run in ("before", "now")]
    assert rows_recomputed(whole, "now", lambda name: 7) == 7
    assert rows_recomputed(whole[1:], "now", lambda name: 7) == 0
    assert rows_recomputed(whole[1:] * 2, "now", lambda name: 7) == 7
    assert rows_recomputed([{"run": "now", "commit": NAME}], "now", lambda name: 7) == 0


def test_json_that_is_torn_is_named(tmp_path):
    with at_work(Output(Folder(str(tmp_path), "run"))) as output:
        output.storage.write(MANIFEST, json.dumps({"a": 1}).encode()[:4])
        with pytest.raises(OutputError, match=r"'_pcm/manifest\.json' in .* is damaged"):
            output.read_json(MANIFEST)
