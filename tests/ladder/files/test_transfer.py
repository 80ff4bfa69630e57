"""Chunks over real sockets, between threads and between processes."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import signal
import socket
import ssl
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dask_pcm.context.bundles import bundle_of
from dask_pcm.errors import TransferError
from dask_pcm.ladder.files import transfer
from dask_pcm.ladder.files.cache import FileCache
from dask_pcm.ladder.files.transfer import Access, Peer, Server
from tests.support.patience import until

CHUNK = 256 << 10
TOKEN = secrets.token_bytes(32)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "digests"))


@pytest.fixture
def model(tmp_path):
    (tmp_path / "weights.bin").write_bytes(os.urandom(20 * CHUNK + 5))
    return bundle_of(tmp_path / "weights.bin")


@pytest.fixture
def disk(tmp_path):
    return FileCache(tmp_path / "disk")


def fill(disk, bundle, chunks=None):
    (file,) = bundle.files
    data = Path(file.url).read_bytes()
    with disk.filling(file.blob) as filling:
        for chunk in filling.missing if chunks is None else chunks:
            assert filling.write(chunk, data[slice(*file.blob.span(chunk))])


@contextlib.contextmanager
def serving(disk, access=None, **options):
    server = Server(disk, access or Access(TOKEN), "127.0.0.1", **options)
    try:
        yield server
    finally:
        server.close()


def fetch(server, bundle, target, access=None, chunks=None):
    blob = bundle.files[0].blob
    with Peer(server.address, access or Access(TOKEN)) as peer, target.filling(blob) as filling:
        for chunk, data in peer.chunks(blob, filling.missing if chunks is None else chunks):
            assert data is not None and filling.write(chunk, data)


def test_a_blob_from_peer_to_peer(disk, model, tmp_path):
    fill(disk, model)
    target = FileCache(tmp_path / "target")
    with serving(disk) as server:
        fetch(server, model, target)
    with target.using(model) as path:
        assert Path(path).read_bytes() == Path(model.files[0].url).read_bytes()


@pytest.mark.parametrize("has_tls", [False, True])
def test_chunks_that_are_larger_than_what_sockets_buffer(disk, tmp_path, has_tls):
    with (tmp_path / "large").open("wb") as file:
        file.truncate(300 << 20)
        file.seek(150 << 20)
        file.write(os.urandom(20 << 20))
    bundle, access = bundle_of(tmp_path / "large"), tls() if has_tls else Access(TOKEN)
    fill(disk, bundle)
    blob, target = bundle.files[0].blob, FileCache(tmp_path / "target")
    with serving(disk, access) as server:
        fetch(server, bundle, target, access, chunks=range(28, 40))
        with target.filling(blob) as filling:
            assert filling.have >= set(range(28, 40))


def test_what_is_still_being_staged_is_served_as_far_as_it_is_there(disk, model):
    (file,) = model.files
    data = Path(file.url).read_bytes()
    with serving(disk) as server, Peer(server.address, Access(TOKEN)) as peer:
        assert dict(peer.chunks(file.blob, [0, 1])) == {0: None, 1: None}
        with disk.filling(file.blob) as filling:
            filling.write(3, data[slice(*file.blob.span(3))])
            found = {i: got and bytes(got) for i, got in peer.chunks(file.blob, [2, 3, 4])}
            assert found == {2: None, 3: data[slice(*file.blob.span(3))], 4: None}
            for chunk in filling.missing:
                filling.write(chunk, data[slice(*file.blob.span(chunk))])
        last = file.blob.n_chunks - 1
        ((_, got),) = peer.chunks(file.blob, [last])
        assert bytes(got) == data[last * file.blob.chunk_bytes :]


def test_resumed_from_another_peer(disk, model, tmp_path):
    fill(disk, model)
    target, third = FileCache(tmp_path / "target"), FileCache(tmp_path / "third")
    fill(third, model)
    with serving(disk) as server:
        fetch(server, model, target, chunks=range(5))
    with serving(third) as server:
        fetch(server, model, target)
    assert target.has(model.files[0].blob)


def test_without_the_token_nothing_is_served_or_taken(disk, model):
    fill(disk, model)
    with serving(disk) as server:
        with pytest.raises(TransferError, match=r"peer at 127\.0\.0\.1:\d+ failed: the connection"):
            Peer(server.address, Access(b"another")).__enter__()
        with socket.create_connection(server.address) as stranger:
            stranger.recv(1000)
            stranger.sendall(b"x" * 64)
            assert stranger.recv(1) == b""
    liar = socket.create_server(("127.0.0.1", 0))

    def lie():
        connection, _ = liar.accept()
        connection.sendall(b"n" * 32)
        connection.recv(64)
        connection.sendall(b"p" * 32)

    threading.Thread(target=lie, daemon=True).start()
    with pytest.raises(TransferError, match="does not know the cluster's token"):
        Peer(liar.getsockname(), Access(TOKEN)).__enter__()
    liar.close()
    assert TOKEN.hex() not in repr(Access(TOKEN)) and repr(TOKEN) not in repr(Access(TOKEN))


def tls():
    from distributed import Security

    security = Security.temporary()
    return Access(
        TOKEN,
        security.get_listen_args("scheduler")["ssl_context"],
        security.get_connection_args("worker")["ssl_context"],
    )


def test_with_the_certificates_of_the_cluster(disk, model, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "TIMEOUT_S", 1.0)
    access, target = tls(), FileCache(tmp_path / "target")
    fill(disk, model)
    with serving(disk, access) as server:
        fetch(server, model, target, access)
        assert target.has(model.files[0].blob)
        with pytest.raises(TransferError):  # in the clear
            Peer(server.address, Access(TOKEN)).__enter__()
        other = tls()
        with pytest.raises(TransferError, match=r"certificate|SSL|ALERT|closed"):
            Peer(server.address, other).__enter__().chunks(model.files[0].blob, [0]).__next__()
    assert isinstance(access.listens, ssl.SSLContext)


@pytest.mark.parametrize("has_tls", [False, True])
def test_connections_that_say_nothing_shut_nobody_out(disk, model, tmp_path, has_tls):
    access, target = tls() if has_tls else Access(TOKEN), FileCache(tmp_path / "target")
    fill(disk, model)
    with serving(disk, access) as server, contextlib.ExitStack() as stack:
        for _ in range(transfer._MAX_CONNECTIONS + 10):
            stack.enter_context(socket.create_connection(server.address, 60))
        fetch(server, model, target, access)
        assert len(server._connections) <= transfer._MAX_CONNECTIONS
    assert target.has(model.files[0].blob)


def test_more_than_a_chunk_is_not_served(disk, model):
    fill(disk, model)
    blob = dataclasses.replace(model.files[0].blob, chunk_bytes=17 << 20, n_bytes=17 << 20)
    refused = pytest.raises(TransferError, match="closed")
    with serving(disk) as server, Peer(server.address, Access(TOKEN)) as peer, refused:
        next(peer.chunks(blob, [0]))


def test_a_flipped_bit_is_not_taken(disk, model, tmp_path):
    fill(disk, model)
    place = disk.root / "blobs" / model.files[0].blob.digest
    place.chmod(0o600)
    with place.open("r+b") as file:
        file.seek(CHUNK + 7)
        byte = file.read(1)[0]
        file.seek(CHUNK + 7)
        file.write(bytes([byte ^ 16]))
    target, blob = FileCache(tmp_path / "target"), model.files[0].blob
    with (
        serving(disk) as server,
        Peer(server.address, Access(TOKEN)) as peer,
        target.filling(blob) as filling,
    ):
        got = peer.chunks(blob, filling.missing)
        wrong = [chunk for chunk, data in got if not filling.write(chunk, data)]
    damaged = (CHUNK + 7) // blob.chunk_bytes
    assert wrong == [damaged] and not target.has(blob)


SERVES = """
import sys, time
from dask_pcm.ladder.files.cache import FileCache
from dask_pcm.ladder.files.transfer import Access, Server
class Slow(FileCache):
    def opened(self, digest, chunk):
        time.sleep(0.05)
        return super().opened(digest, chunk)
server = Server(Slow(sys.argv[1]), Access(bytes.fromhex(sys.stdin.readline())), "127.0.0.1")
print(server.address[1], flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_peer_that_is_killed_or_hangs_in_the_midst(disk, model, tmp_path, how, monkeypatch):
    monkeypatch.setattr(transfer, "TIMEOUT_S", 1.0)
    fill(disk, model)
    command = [sys.executable, "-c", SERVES, str(disk.root)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    target, blob, taken = FileCache(tmp_path / "target"), model.files[0].blob, []
    with subprocess.Popen(command, **pipes) as process:
        try:
            process.stdin.write(TOKEN.hex() + "\n")
            process.stdin.flush()
            address = ("127.0.0.1", int(process.stdout.readline()))
            with (
                target.filling(blob) as filling,
                Peer(address, Access(TOKEN)) as peer,
                pytest.raises(TransferError, match=r"The peer at 127\."),
            ):
                for chunk, data in peer.chunks(blob, filling.missing):
                    assert filling.write(chunk, data)
                    taken.append(chunk)
                    if len(taken) == 5:
                        process.send_signal(how)
        finally:
            process.kill()
    with target.filling(blob) as filling:
        assert taken and filling.missing == [i for i in range(blob.n_chunks) if i not in taken]


def test_ports(disk):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(TransferError, match=f"None of the ports {port} to {port} is free"):
            Server(disk, Access(TOKEN), "127.0.0.1", [port])
        with serving(disk, ports=range(port, port + 20)) as server:
            assert port < server.address[1] < port + 20


def test_closed_it_leaves_no_threads(disk, model):
    fill(disk, model)
    before = threading.active_count()
    server = Server(disk, Access(TOKEN), "127.0.0.1")
    peer = Peer(server.address, Access(TOKEN)).__enter__()
    next(peer.chunks(model.files[0].blob, [0]))
    server.close()
    with pytest.raises(TransferError):
        for _ in range(3):
            next(peer.chunks(model.files[0].blob, [1]))
    until(lambda: threading.active_count() <= before, 10)


def test_it_goes_on_accepting_after_an_error(disk, model, monkeypatch):
    monkeypatch.setattr(transfer, "_PAUSE_S", 0.01)
    fill(disk, model)
    with serving(disk) as server:
        accept, errors = server._listening.accept, [OSError(24, "Too many open files")] * 2

        class Failing:
            def accept(self):
                if errors:
                    raise errors.pop()
                return accept()

            def __getattr__(self, name):
                return getattr(server_socket, name)

        server_socket, server._listening = server._listening, Failing()
        with Peer(server.address, Access(TOKEN)) as peer:  # wakes the thread from the old one
            pass
        with Peer(server.address, Access(TOKEN)) as peer:
            assert next(peer.chunks(model.files[0].blob, [0]))[1] is not None
    assert not errors
