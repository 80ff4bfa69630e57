from __future__ import annotations

import os
import pickle
import subprocess
import sys

import fsspec
import pytest

from dask_pcm import Context
from dask_pcm.context import bundles
from dask_pcm.context.bundles import Blob, bundle_of, checked_name, digest_of
from dask_pcm.errors import InputError, RecipeError


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(bundles, "_memory", bundles._Memory())


@pytest.fixture
def n_read(monkeypatch):
    """Paths of files that were digested."""
    read = []
    digested = bundles._digested
    monkeypatch.setattr(
        bundles, "_digested", lambda fs, path, n: read.append(path) or digested(fs, path, n)
    )
    return read


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("n_bytes", "chunk_bytes", "n_chunks"),
    [
        (0, 256 << 10, 0),
        (1, 256 << 10, 1),
        (256 << 10, 256 << 10, 1),
        ((256 << 10) + 1, 256 << 10, 2),
        (64 << 20, 1 << 20, 64),
        ((64 << 20) + 1, (1 << 20) + 1, 64),
    ],
)
def test_chunks_are_a_64th_within_bounds(tmp_path, n_bytes, chunk_bytes, n_chunks):
    data = os.urandom(n_bytes)
    (file,) = bundle_of(write(tmp_path / "a.bin", data)).files
    blob = file.blob
    assert (blob.n_bytes, blob.chunk_bytes, blob.n_chunks) == (n_bytes, chunk_bytes, n_chunks)
    spans = [blob.span(chunk) for chunk in range(n_chunks)]
    assert b"".join(data[start:stop] for start, stop in spans) == data
    assert all(blob.holds(i, data[slice(*span)]) for i, span in enumerate(spans))
    assert not any(
        blob.holds(i, b"x" + data[slice(*span)][1:] + b"y") for i, span in enumerate(spans)
    )


def test_no_chunk_is_larger_than_16_mib(tmp_path):
    with open(tmp_path / "large", "wb") as file:
        file.truncate(3 << 30)
    blob = bundle_of(tmp_path / "large").files[0].blob
    assert blob.chunk_bytes == 16 << 20 and blob.n_chunks == 192


def test_a_folder_counts_by_names_and_content_and_not_by_where_it_lies(tmp_path):
    for place in ("a", "b", "renamed", "changed"):
        write(tmp_path / place / "weights.bin", b"w" * 1000)
        write(tmp_path / place / "sub" / "config.json", b"{}")
        write(tmp_path / place / ".git" / "config", place.encode())
    (tmp_path / "renamed" / "weights.bin").rename(tmp_path / "renamed" / "other.bin")
    write(tmp_path / "changed" / "sub" / "config.json", b"[]")
    a, b, renamed, changed = (
        bundle_of(tmp_path / place) for place in ("a", "b", "renamed", "changed")
    )
    assert a.digest == b.digest and len({a.digest, renamed.digest, changed.digest}) == 3
    assert [file.name for file in a.files] == ["sub/config.json", "weights.bin"]
    assert a.is_folder and a.n_bytes == 1002
    single = bundle_of(tmp_path / "a" / "weights.bin")
    assert not single.is_folder and single.files[0].blob == a.files[1].blob
    only = bundle_of(tmp_path / "a", patterns=["*.bin"])
    assert [file.name for file in only.files] == ["weights.bin"]
    assert pickle.loads(pickle.dumps(a)) == a


def test_each_file_is_read_once_by_whoever(tmp_path, n_read, monkeypatch):
    path = write(tmp_path / "a.bin", os.urandom(600_000))
    first = bundle_of(path)
    assert bundle_of(path) == first and len(n_read) == 1
    monkeypatch.setattr(bundles, "_memory", bundles._Memory())  # another process
    assert bundle_of(path) == first and len(n_read) == 1
    folder = tmp_path / "cache" / "dask_pcm"
    assert folder.stat().st_mode & 0o077 == 0 or (folder / "blobs").stat().st_mode & 0o077 == 0
    os.utime(path, (1, 1))
    assert bundle_of(path).digest == first.digest and len(n_read) == 2
    for note in (folder / "blobs").iterdir():  # damaged: read again
        note.write_text('{"n_bytes": 5}')
    monkeypatch.setattr(bundles, "_memory", bundles._Memory())
    assert bundle_of(path).digest == first.digest and len(n_read) == 3


def test_a_home_that_cannot_be_written_only_costs_time(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert bundle_of(write(tmp_path / "a.bin", b"abc")).n_bytes == 3


def test_by_any_url(tmp_path, bucket):
    write(tmp_path / "model" / "weights.bin", b"w" * 300_000)
    fsspec.filesystem("s3").put(str(tmp_path / "model"), f"{bucket}/model", recursive=True)
    there, here = bundle_of(f"{bucket}/model"), bundle_of(tmp_path / "model")
    assert there.digest == here.digest
    assert there.files[0].url == f"{bucket}/model/weights.bin"


def test_a_link_counts_as_what_it_leads_to(tmp_path):
    write(tmp_path / "blobs" / "abc", b"weights")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights.bin").symlink_to("../blobs/abc")
    (file,) = bundle_of(tmp_path / "model").files
    assert (file.name, file.blob.n_bytes) == ("weights.bin", 7)


def test_a_file_that_changes_meanwhile(tmp_path, monkeypatch):
    path = write(tmp_path / "a.bin", b"abc")
    digested = bundles._digested

    def changing(fs, name, n):
        found = digested(fs, name, n)
        write(path, b"other")
        os.utime(path, (1, 1))
        return found

    monkeypatch.setattr(bundles, "_digested", changing)
    with pytest.raises(InputError, match="was changed while it was read"):
        bundle_of(path)


@pytest.mark.parametrize("name", ["../a", "/a", "a/../../b", "", "a\0b"])
def test_names_that_lead_out_are_refused(name):
    with pytest.raises(InputError, match="leads out of its folder"):
        checked_name(name)


def test_what_is_missing_is_said_where_the_context_is_made(tmp_path):
    with pytest.raises(InputError, match=r"no file at '.*nowhere', which a recipe names"):
        Context(len, str(tmp_path / "nowhere"), files=[tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no file at"):
        Context(len, str(tmp_path / "empty"), files=[tmp_path / "empty"])
    with pytest.raises(InputError, match="cannot be listed: 'nofs://a'"):
        Context(len, "nofs://a", files=["nofs://a"])


def test_files_that_no_argument_names(tmp_path):
    path = write(tmp_path / "a.bin", b"abc")
    with pytest.raises(RecipeError, match=r"it is no argument.*files=\[path\]"):
        Context(len, files=[path])


def test_the_loader_gets_other_paths_wherever_they_stand(tmp_path):
    a, b = write(tmp_path / "a.bin", b"abc"), write(tmp_path / "b.bin", b"def")
    ref = Context(list, [a, (str(b), 1)], files=[a, b]).ref
    from dask_pcm.context.sealed import Sealed

    recipe = Sealed(ref.digest, ref.recipe).open()
    assert str(tmp_path).encode() not in ref.recipe
    places = {bundle.digest: f"at {bundle.files[0].name}" for bundle in ref.bundles}
    assert recipe.build(places) == ["at a.bin", ("at b.bin", 1)]


def test_the_same_content_elsewhere_is_the_same_context(tmp_path):
    paths = [write(tmp_path / place / "a.bin", b"abc") for place in ("one", "other")]
    first, second = (Context(list, str(path), files=[path]) for path in paths)
    assert first == second and first != Context(list, "a.bin")
    write(paths[0], b"abd")
    assert Context(list, str(paths[0]), files=[paths[0]]) != first


def test_digests_are_the_same_in_every_process(tmp_path):
    path = write(tmp_path / "a.bin", b"abc" * 1000)
    code = (
        "import sys; from dask_pcm.context.bundles import bundle_of;"
        " print(bundle_of(sys.argv[1]).digest)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert done.stdout.strip() == bundle_of(path).digest
    assert Blob(0, 1, b"").digest == digest_of(b"0/1/").hex()


def test_what_is_no_file_in_a_folder(tmp_path):
    write(tmp_path / "elsewhere" / "a.bin", b"abc")
    write(tmp_path / "model" / "b.bin", b"abc")
    (tmp_path / "model" / "sub").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"model/sub', in a folder that .* is no file"):
        bundle_of(tmp_path / "model")
    (tmp_path / "model" / "sub").unlink()
    os.mkfifo(tmp_path / "model" / "pipe")
    with pytest.raises(InputError, match="model/pipe'"):
        bundle_of(tmp_path / "model")


def test_where_nothing_tells_whether_it_is_the_same_it_is_read_again(tmp_path):
    fs = fsspec.filesystem("memory")
    fs.pipe("/bundles/a.bin", b"old!")
    first = bundle_of("memory://bundles/a.bin")
    fs.pipe("/bundles/a.bin", b"new!")
    assert bundle_of("memory://bundles/a.bin").digest != first.digest
    path = write(tmp_path / "a.bin", b"old!")
    os.utime(path, (0, 0))  # as reproducible archives have it
    first = bundle_of(path)
    assert bundle_of(path) == first
    write(path, b"new!")
    assert bundle_of(path).digest != first.digest
