"""Links, FIFOs and files of other users in an output are not followed, opened or moved."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow as pa
import pytest

import dask_pcm as pcm
from dask_pcm.errors import OutputError
from dask_pcm.ledger.inventory import take_inventory
from dask_pcm.ledger.log import note_start
from dask_pcm.ledger.output import Output
from dask_pcm.ledger.parts import range_name
from dask_pcm.ledger.stash import drop_stash, stash
from dask_pcm.ledger.storage.folder import Folder
from dask_pcm.ledger.storage.objects import Objects
from dask_pcm.ledger.storage.tree import Tree
from dask_pcm.ledger.takeover import fence_others

NAME = range_name(0, 2)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user")
NOBODY = 65534


@pytest.fixture
def out(tmp_path):
    """An output with a part, and no run at work."""
    output = Output(Folder(str(tmp_path / "out"), "first"))
    with begun(output):
        output.write_json("_pcm/manifest.json", {"format": 2, "identity": {}})
        output.commit(NAME, [pa.table({"x": [1, 2]})], lambda: {"rows": 2, "failed": 0})
    return tmp_path / "out"


@contextlib.contextmanager
def begun(output):
    with output.storage.fence.takeover_lock():
        fence_others(output)
        with output.storage.fence.open_run({}):
            yield output


def go_on(out):
    """What a run does with an output before anything else, and what a look at it does."""
    with begun(Output(Folder(str(out), "next"))) as output:
        take_inventory(output)
        note_start(output, NAME, 2)
        stash(output)
        drop_stash(output)


def puts_fifo(path):
    os.mkfifo(path)


def puts_socket(path):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def puts_link(path):
    treasure = path.parents[len(path.parents) - 2] / "nowhere"
    os.symlink(treasure, path)


def puts_device(path):
    try:
        os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("devices cannot be made here")


@pytest.mark.parametrize("put", [puts_fifo, puts_socket, puts_link, puts_device])
@pytest.mark.parametrize(
    "name",
    ["lock", "manifest.json", "report.json", "log/x.jsonl", "journal/x", "run-x/alive", "old-x/a"],
)
def test_what_is_no_file_is_named_and_never_opened(out, monkeypatch, name, put):
    path = out / "_pcm" / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    monkeypatch.chdir(path.parent)  # names of sockets are short
    put(Path(path.name) if put is puts_socket else path)
    with pytest.raises(OutputError, match=rf"'_pcm/{name}' in .* where a file was expected"):
        go_on(out)
    assert os.path.lexists(path)


@pytest.mark.parametrize(
    "name", ["manifest.json", "report.json", "run-x/alive", "run-x/status.json"]
)
def test_a_look_does_not_wait_for_a_fifo(out, name):
    path = out / "_pcm" / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    os.mkfifo(path)

    def look():
        with contextlib.suppress(OutputError):
            run = pcm.attach(out)
            assert run.progress.done == 2 and run.report is not None and run.driver == ""

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    looking.join(30)
    assert not looking.is_alive()


def test_a_part_that_is_a_link_or_a_fifo_is_named(out, tmp_path):
    part = out / NAME
    part.rename(tmp_path / "elsewhere.parquet")
    part.symlink_to(tmp_path / "elsewhere.parquet")
    with pytest.raises(OutputError, match=rf"'{NAME}' in .* is a link, where a file"):
        go_on(out)
    part.unlink()
    os.mkfifo(part)
    with pytest.raises(OutputError, match=rf"'{NAME}' in .* is a FIFO, where a file"):
        go_on(out)


@pytest.mark.parametrize(
    "name", ["_pcm", "_pcm/log", "_pcm/journal", "_pcm/log/zz", "_pcm/old-x/aside/.loot"]
)
def test_a_linked_folder_is_not_entered(out, tmp_path, name):
    """Nothing of what it leads to is read, moved or removed."""
    home = tmp_path / "home"
    (home / "inside").mkdir(parents=True)
    (home / "inside" / "key").write_text("precious")
    path = out / name
    if path.exists():
        path.rename(tmp_path / "away")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(home)
    with pytest.raises(OutputError, match=rf"'{name}' in .* is a link|files of another program"):
        go_on(out)
    with contextlib.suppress(OutputError, FileNotFoundError):
        Folder(str(out), "next").remove(name)
    assert (home / "inside" / "key").read_text() == "precious"


def test_a_file_that_a_lock_leads_to_keeps_what_it_has(out, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (out / "_pcm" / "lock").unlink()
    (out / "_pcm" / "lock").symlink_to(victim)
    with pytest.raises(OutputError, match=r"'_pcm/lock' in .* is a link.*remove it"):
        go_on(out)
    assert victim.read_text() == "precious"


def test_the_output_itself_may_be_a_link(out, tmp_path):
    (tmp_path / "link").symlink_to(out)
    go_on(tmp_path / "link")


@needs_root
class TestOwners:
    @pytest.mark.parametrize("name", ["", "log", "manifest.json", "log/x.jsonl"])
    def test_what_belongs_to_another_user_is_refused_and_can_be_read(self, out, name):
        path = out / "_pcm" / name
        if not path.exists():
            path.write_text("{}")
        os.chown(path, NOBODY, NOBODY)
        shown = f"_pcm/{name}".rstrip("/")
        with pytest.raises(OutputError, match=rf"'{shown}' in .*uid {NOBODY}.*runs as.*chown"):
            go_on(out)
        assert pcm.attach(out).progress.done == 2

    def test_a_worker_of_another_user_trusts_the_driver_of_the_run(self, out):
        """And folders of root."""
        for path in [out, *out.rglob("*")]:
            os.chown(path, NOBODY, NOBODY)
        with pytest.raises(OutputError, match="belongs to"):
            Folder(str(out), "here").read("_pcm/manifest.json")
        assert Folder(str(out), "here", owner=NOBODY).read("_pcm/manifest.json")

    def test_root_is_trusted_by_others(self, out):
        subprocess.run(["chmod", "-R", "a+rwX", str(out)], check=True)
        code = (
            "import os; from dask_pcm.ledger.storage.folder import Folder;"
            "os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534);"
            f"Folder({str(out)!r}, 'other').fence.takeover_lock().__enter__(); print('begun')"
        )
        for path in out.parents:
            if path.stat().st_mode & 0o005 != 0o005:
                path.chmod(path.stat().st_mode | 0o005)
            if path.name.startswith("pytest-of"):
                break
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout == "begun\n", done.stderr

    def test_where_all_files_are_shown_as_anothers_they_are_ours(self, out):
        """As on a filesystem without owners, or that maps them."""
        from dask_pcm.ledger.storage import tree

        os.chown(out / "_pcm" / "log", NOBODY, NOBODY)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(tree, "_uid_in", lambda root: NOBODY)
            go_on(out)


class TestLockFolder:
    @pytest.fixture
    def output(self, tmp_path):
        return Objects.at(f"local://{tmp_path}/store/out", str(tmp_path / "locks"))

    @pytest.mark.parametrize("is_link", [True, False])
    def test_a_lock_that_another_user_has_put_there(self, output, tmp_path, is_link):
        victim = tmp_path / "victim"
        victim.write_text("precious")
        lock = Path(output.locks, output.lock_files._path_of("run"))
        lock.parent.mkdir()
        lock.symlink_to(victim) if is_link else os.mkfifo(lock)
        with (
            pytest.raises(OutputError, match="where a file was expected"),
            output.fence.takeover_lock(),
        ):
            pass
        assert victim.read_text() == "precious"

    def test_a_folder_that_another_user_has_put_there(self, output, tmp_path):
        place = Path(output.locks, output.lock_files._path_of("run")).parent
        place.symlink_to(tmp_path)
        with pytest.raises(OutputError, match="is a link"), output.fence.takeover_lock():
            pass
        assert not list(tmp_path.glob("*.lock"))

    @needs_root
    def test_a_folder_of_another_user(self, output):
        place = Path(output.locks, output.lock_files._path_of("run")).parent
        place.mkdir()
        os.chown(place, NOBODY, NOBODY)
        with pytest.raises(OutputError, match=f"uid {NOBODY}"), output.fence.takeover_lock():
            pass


def test_names_are_walked_and_made(tmp_path):
    tree = Tree(str(tmp_path))
    tree.make_folder("a/b")
    with tree.creator("a/b/c") as file:
        file.write(b"1")
    tree.link("a/b/c", "d")
    tree.rename("a/b/c", "a/e")
    with pytest.raises(FileExistsError):
        tree.link("a/e", "d")
    assert sorted(name for name, _ in tree.entries()) == ["a", "d"]
    assert tree.exists("d") and not tree.exists("a/b/c") and not tree.exists("x/y")
    tree.remove("a"), tree.remove("a"), tree.remove("x/y")
    assert [name for name, _ in tree.entries()] == ["d"]
    with pytest.raises(OutputError, match=r"'d' in .* is a file, where a folder was expected"):
        tree.make_folder("d/e")
