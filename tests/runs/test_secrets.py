"""Passwords and signatures of URLs: in no manifest, report, message, log or repr of ours."""

from __future__ import annotations

import http.server
import logging
import threading
from pathlib import Path

import dask
import pandas as pd
import pytest
from distributed import Client, LocalCluster

import dask_pcm as pcm
from dask_pcm.errors import InputError, LoadError, PCMError, redacted, shown_cause

SECRETS = ("SIGNATURE1", "SIGNATURE2", "PASSWORD")


@pytest.fixture
def site(tmp_path):
    """A web server that wants signatures; its address, and what it denies."""
    root = tmp_path / "www"
    root.mkdir()

    class Handler(http.server.BaseHTTPRequestHandler):
        denied: frozenset[str] = frozenset()

        def log_message(self, *args):
            pass

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            name = self.path.partition("?")[0].strip("/")
            if name in self.denied or "SIGNATURE" not in self.path or not (root / name).is_file():
                self.send_error(403)
                return
            data = (root / name).read_bytes()
            start, stop = 0, len(data)
            if found := self.headers.get("Range"):
                first, last = found.removeprefix("bytes=").split("-")
                start, stop = int(first), min(int(last or stop) + 1, stop)
            self.send_response(206 if found else 200)
            self.send_header("Content-Length", str(stop - start))
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("ETag", '"1"')
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data[start:stop])

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.root, server.handler = root, Handler
    server.url = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def client(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "digests"))
    options = {"processes": False, "dashboard_address": None, "silence_logs": False}
    with (
        dask.config.set({"pcm.ladder.disk.path": str(tmp_path / "disk")}),
        LocalCluster(n_workers=1, threads_per_worker=1, **options) as cluster,
        Client(cluster) as client,
    ):
        pcm.install(client)
        yield client


def load(path):
    return Path(path).name


def double(frame, model):
    return pd.DataFrame({"id": frame["id"], "model": model})


def job(url, context):
    meta = {"id": "i8", "model": "str"}
    return pcm.map_partitions(double, pcm.read_parquet(url), context=context, meta=meta)


def is_clean(text):
    return not any(secret in text for secret in SECRETS)


def assert_clean_below(folder):
    for path in folder.rglob("*"):
        assert is_clean(path.name)
        if path.is_file():
            assert is_clean(path.read_bytes().decode("latin-1")), path


def test_a_new_signature_is_the_same_job_and_stands_nowhere(site, client, tmp_path, caplog):
    caplog.set_level(logging.DEBUG, "dask_pcm")
    pd.DataFrame({"id": range(9)}).to_parquet(site.root / "claims.parquet")
    (site.root / "weights.txt").write_text("weights")
    for signature in SECRETS[:2]:
        weights = f"{site.url}/weights.txt?sig={signature}"
        context = pcm.Context(load, weights, files=[weights])
        frame = job(f"{site.url}/claims.parquet?X-Sig={signature}&a=b", context)
        assert is_clean(repr(frame) + repr(context.ref) + repr(context.ref.bundles))
        assert is_clean(repr(list(frame.dask.values())))
        run = pcm.write_parquet(frame, tmp_path / "out", progress=False)
        assert run.report.rows_resumed == (9 if signature == SECRETS[1] else 0)
        assert is_clean(repr(run))
    assert set(pcm.read_parquet(tmp_path / "out").compute()["model"]) == {"weights.txt"}
    assert_clean_below(tmp_path / "out")
    assert is_clean(caplog.text)


def test_files_that_are_denied_are_named_without_their_signature(site, client, tmp_path, caplog):
    pd.DataFrame({"id": range(9)}).to_parquet(tmp_path / "claims.parquet")
    (site.root / "weights.txt").write_text("weights")
    weights = f"{site.url}/weights.txt?sig=SIGNATURE1"
    context = pcm.Context(load, weights, files=[weights])
    site.handler.denied = frozenset({"weights.txt"})
    with pytest.raises(LoadError, match=r"/weights\.txt'.*cannot be read") as refused:
        pcm.write_parquet(
            job(tmp_path / "claims.parquet", context), tmp_path / "out", progress=False
        )
    assert is_clean(str(refused.value))
    assert_clean_below(tmp_path / "out")
    ours = [record.getMessage() for record in caplog.records if "dask_pcm" in record.name]
    assert is_clean("".join(ours))


def test_passwords_in_urls_stand_in_no_message(client, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    url = "http://me:PASSWORD@127.0.0.1:9/none?sig=SIGNATURE1"
    pd.DataFrame({"id": range(2)}).to_parquet(tmp_path / "claims.parquet")
    frame = job(tmp_path / "claims.parquet", pcm.Context(load, "x"))
    attempts = [
        lambda: pcm.read_parquet(url),
        lambda: pcm.Context(load, url, files=[url]),
        lambda: pcm.write_parquet(frame, "ftp://me:PASSWORD@127.0.0.1:9/out", progress=False),
    ]
    for attempt in attempts:
        with pytest.raises(PCMError, match=r"127\.0\.0\.1:9/") as refused:
            attempt()
        assert is_clean(str(refused.value))
    assert "127.0.0.1:9/none" in caplog.text and is_clean(caplog.text)


def test_what_is_a_secret_in_a_url():
    assert redacted("'https://token@host/a?x=1', s3://b/a?.parquet") == (
        "'https://host/a', s3://b/a?.parquet"
    )
    assert redacted("simplecache::sftp://me@host/a") == "simplecache::sftp://me@host/a"
    assert (
        redacted("zip://a.csv::https://me:p@ss@host/x.zip?s=1") == "zip://a.csv::https://host/x.zip"
    )
    assert (
        redacted("http://me:p/w@host/x, http://host:80/a@b") == "http://host/x, http://host:80/a@b"
    )
    assert (
        redacted("at http://h/a?TOKENOFMINE, https://h/a#SECRETS") == "at http://h/a, https://h/a"
    )
    assert redacted("https://h/part-?.parquet") == "https://h/part-?.parquet"
    assert str(InputError("at https://h/a?b=c")) == "at https://h/a"


def test_a_cause_that_shows_a_secret_is_left_out():
    harmless, telling = OSError("no"), OSError("no http://me:secret@h/a")
    assert shown_cause(harmless) is harmless and shown_cause(telling) is None
    harmless.__context__ = telling
    assert shown_cause(harmless) is None
