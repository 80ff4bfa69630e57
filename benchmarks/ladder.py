"""The ladder: contexts staged by many hosts at once, and how fast bytes move."""

from __future__ import annotations

import asyncio
import http.server
import multiprocessing
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import dask
from distributed import Client

import dask_pcm as pcm
from benchmarks import rungs
from benchmarks.table import Rows, median, parser
from dask_pcm.context.bundles import bundle_of
from dask_pcm.ladder.files.cache import FileCache
from dask_pcm.ladder.files.transfer import Access, Peer, Server
from dask_pcm.scheduling.broadcast import Broadcast, Copy

MIB = 1 << 20
N_HOSTS, HOST_MBIT, STORE_MBIT, CONTEXT_MIB = 8, 80, 40, 20


# -- hosts in network namespaces -----------------------------------------------------------------


class Store(http.server.BaseHTTPRequestHandler):
    """Files of the working folder by ranges of bytes; notes how many it has sent."""

    protocol_version = "HTTP/1.1"
    sent = Path("sent")

    def do_HEAD(self) -> None:
        self._answer(None)

    def do_GET(self) -> None:
        self._answer(self.headers.get("Range", "bytes=0-").removeprefix("bytes="))

    def _answer(self, span: str | None) -> None:
        data = Path(self.path.strip("/")).read_bytes()
        first, _, last = (span or "0-").partition("-")
        part = data[int(first) : int(last) + 1 if last else len(data)]
        self.send_response(200 if span is None else 206)
        self.send_header("Content-Length", str(len(data) if span is None else len(part)))
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", str(len(data)))
        self.end_headers()
        if span is not None:
            self.wfile.write(part)
            with self.sent.open("a") as file:
                file.write(f"{len(part)}\n")

    def log_message(self, *args: object) -> None: ...


def shell(*command: object) -> None:
    subprocess.run([str(word) for word in command], check=True, capture_output=True)


@contextmanager
def hosts(n_hosts: int) -> Iterator[None]:
    """Namespaces pcm1… and pcmstore on a bridge, each with a link of the same rate."""
    bridge = "pcmbr"
    names = [*(f"pcm{number}" for number in range(1, n_hosts + 1)), "pcmstore"]
    with ExitStack() as stack:
        shell("ip", "link", "add", bridge, "type", "bridge")
        stack.callback(shell, "ip", "link", "del", bridge)
        shell("ip", "addr", "add", "10.77.0.254/24", "dev", bridge)
        shell("ip", "link", "set", bridge, "up")
        for number, name in enumerate(names, 1):
            rate = f"{STORE_MBIT if name == 'pcmstore' else HOST_MBIT}mbit"
            link = f"v{name}"
            shell("ip", "netns", "add", name)
            stack.callback(shell, "ip", "netns", "del", name)
            shell("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
            shell("ip", "link", "set", link, "master", bridge, "up")
            shell("ip", "-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "eth0")
            shell("ip", "-n", name, "link", "set", "eth0", "up")
            shell("ip", "-n", name, "link", "set", "lo", "up")
            limit = ["root", "tbf", "rate", rate, "burst", "64kb", "latency", "200ms"]
            shell("tc", "-n", name, "qdisc", "add", "dev", "eth0", *limit)
            shell("tc", "qdisc", "add", "dev", link, *limit)
        yield


@contextmanager
def running(*command: object, **env: str) -> Iterator[subprocess.Popen[bytes]]:
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    words = [str(word) for word in command]
    process = subprocess.Popen(words, env={**os.environ, **env}, **quiet)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def staged_at(path: str) -> float:
    return time.time()


def when(model: Any) -> float:
    with pcm.acquire(model) as at:
        return float(at)


def inside(name: str) -> list[str]:
    return ["ip", "netns", "exec", name, sys.executable]


def broadcast(rows: Rows, scratch: Path) -> None:
    """One host alone, then eight at once; every host has a disk of its own."""
    files = scratch / "files"
    files.mkdir()
    for name in ("alone", "all"):
        (files / name).write_bytes(os.urandom(CONTEXT_MIB * MIB))
    store_ip = f"10.77.0.{N_HOSTS + 1}"
    with ExitStack() as stack:
        stack.enter_context(hosts(N_HOSTS))
        stack.enter_context(
            running(*inside("pcmstore"), "-m", "benchmarks.ladder", "--store", files)
        )
        scheduler = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--no-dashboard"]
        stack.enter_context(running(*scheduler, "--host=10.77.0.254", "--port=18786"))
        worker = ["-m", "distributed.cli.dask_worker", "tcp://10.77.0.254:18786", "--nthreads=1"]
        worker += ["--no-nanny", "--no-dashboard", "--memory-limit=0"]
        for number in range(1, N_HOSTS + 1):
            name = f"pcm{number}"
            options = [f"--host=10.77.0.{number}", f"--name={name}"]
            stack.enter_context(running(*inside(name), *worker, *options, PCM_HOST=name))
        client = stack.enter_context(Client("tcp://10.77.0.254:18786", timeout=60))
        client.wait_for_workers(N_HOSTS, timeout=120)
        with dask.config.set({"pcm.ladder.disk.path": f"{scratch}/$PCM_HOST"}):
            pcm.install(client)
        addresses = sorted(client.scheduler_info(n_workers=-1)["workers"])
        warm = pcm.Context(time.time)
        client.gather([client.submit(when, warm, workers=[a], pure=False) for a in addresses])

        def seconds(name: str, chosen: list[str]) -> list[float]:
            url = f"http://{store_ip}:8000/{name}"
            context = pcm.Context(staged_at, url, files=[url])
            before = time.time()
            jobs = [client.submit(when, context, workers=[a], pure=False) for a in chosen]
            return sorted(at - before for at in client.gather(jobs))

        (alone,) = seconds("alone", addresses[:1])
        n_before = sent(files)
        together = seconds("all", addresses)
        # What the benchmark itself has read of it, to digest it, is not counted.
        n_read = sent(files) - n_before - CONTEXT_MIB * MIB
    rows.add(
        f"one host alone, {CONTEXT_MIB} MiB from a store at {STORE_MBIT} Mbit/s: seconds", alone
    )
    rows.add(
        f"{N_HOSTS} hosts at {HOST_MBIT} Mbit/s at once: the last one staged, over one alone",
        together[-1] / alone,
        "<= 1.5",
    )
    rows.add(
        "… bytes read from the store, over the file's size", n_read / (CONTEXT_MIB * MIB), "<= 1.2"
    )


def sent(folder: Path) -> int:
    return sum(map(int, (folder / "sent").read_text().split()))


# -- bytes between two processes -----------------------------------------------------------------

SIZE = 1 << 30


def serve_raw(path: str, port: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port.put(listening.getsockname()[1])
        while True:
            connection, _ = listening.accept()
            with connection, open(path, "rb") as file:
                connection.sendfile(file)


def serve_chunks(root: str, token: bytes, port: Any) -> None:
    server = Server(FileCache(root), Access(token), "127.0.0.1")
    port.put(server.address[1])
    threading.Event().wait()


def loopback(rows: Rows, scratch: Path) -> None:
    """1 GB from process to process, verified and written, against sendfile to a file."""
    path = scratch / "large"
    with path.open("wb") as file:
        for _ in range(SIZE >> 24):
            file.write(os.urandom(1 << 24))
    bundle = bundle_of(path)
    (source,) = bundle.files
    holder, token = FileCache(scratch / "holder"), os.urandom(32)
    with holder.filling(source.blob) as filling:
        assert filling is not None
        data = path.read_bytes()
        for chunk in filling.missing:
            filling.write(chunk, data[slice(*source.blob.span(chunk))])
        del data
    spawn = multiprocessing.get_context("spawn")
    ports = [spawn.Queue(), spawn.Queue()]
    servers = [
        spawn.Process(target=serve_raw, args=(str(path), ports[0]), daemon=True),
        spawn.Process(target=serve_chunks, args=(str(holder.root), token, ports[1]), daemon=True),
    ]
    for server in servers:
        server.start()
    raw_port, port = (queue.get(timeout=60) for queue in ports)

    def raw(number: int) -> float:
        start = time.perf_counter()
        target, buffer = scratch / f"raw-{number}", memoryview(bytearray(4 << 20))
        with (
            socket.create_connection(("127.0.0.1", raw_port)) as stream,
            target.open("wb", buffering=0) as file,
        ):
            while n_received := stream.recv_into(buffer):
                file.write(buffer[:n_received])
        seconds = time.perf_counter() - start
        assert target.stat().st_size == SIZE
        target.unlink()
        return seconds

    def ours(number: int) -> float:
        disk = FileCache(scratch / f"target-{number}")
        start = time.perf_counter()
        with disk.filling(source.blob) as filling:
            assert filling is not None
            shares = [filling.missing[at::2] for at in range(2)]

            def take(share: list[int]) -> None:
                with Peer(("127.0.0.1", port), Access(token)) as peer:
                    for chunk, data in peer.chunks(source.blob, share):
                        assert data is not None and filling.write(chunk, data)

            threads = [threading.Thread(target=take, args=(share,)) for share in shares]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        seconds = time.perf_counter() - start
        assert disk.evict(source.blob.digest)
        return seconds

    ratios: list[float] = []
    taken: list[float] = []
    lags: list[float] = []
    try:
        for number in range(5):
            expected = raw(number)
            lags += lag_while(lambda: taken.append(ours(len(taken))))
            ratios.append(expected / taken[-1])
    finally:
        for server in servers:
            server.kill()
    rows.add(
        "1 GB between two processes, over the rate of a raw sendfile", median(ratios), ">= 0.8"
    )
    p99 = statistics.quantiles(lags, n=100)[98] * 1e3
    rows.add("… lag of the receiver's event loop meanwhile, p99, ms", p99, "<= 20")


def lag_while(act: Callable[[], object]) -> list[float]:
    """How late an event loop comes round while `act` runs on a thread."""
    lags: list[float] = []

    async def watch() -> None:
        acting = asyncio.ensure_future(asyncio.to_thread(act))
        while not acting.done():
            start = time.perf_counter()
            await asyncio.sleep(0.005)
            lags.append(time.perf_counter() - start - 0.005)
        await acting

    asyncio.run(watch())
    return lags


# -- forty workers, played -----------------------------------------------------------------------

#: Of the papers' log: a manager sends a model of 3.43 GB in 9.0 s.
MODEL_BYTES, MODEL_S, N_WORKERS = 3_426_155_384, 9.0, 40


def played(plan: Broadcast, n_chunks: int, link_s: float) -> list[float]:
    """When each of forty workers is staged: links shared by the copies on them, both ways.

    `link_s` are the seconds that a chunk takes a link that it has for itself.
    """
    for number in range(N_WORKERS):
        plan.want(f"w{number}", "model", n_chunks)
    left: dict[Copy, float] = {}
    n_got = {f"w{number}": 0 for number in range(N_WORKERS)}
    staged: list[float] = []
    now = 0.0
    while len(staged) < N_WORKERS:
        left.update((copy, 1.0) for copy in plan.plan(now))
        n_out: dict[str, int] = {}
        n_in: dict[str, int] = {}
        for copy in left:
            n_out[copy.source] = n_out.get(copy.source, 0) + 1
            n_in[copy.worker] = n_in.get(copy.worker, 0) + 1
        rates = {c: 1 / (link_s * max(n_out[c.source], n_in[c.worker])) for c in left}
        step = min(left[copy] / rates[copy] for copy in left)
        now += step
        for copy in list(left):
            left[copy] -= step * rates[copy]
            if left[copy] <= 1e-9:
                del left[copy]
                plan.copied(copy)
                n_got[copy.worker] += 1
                if n_got[copy.worker] == n_chunks:
                    staged.append(now)
    return staged


def forty(rows: Rows) -> None:
    """The plan against one manager that sends to each in turn."""
    n_chunks = -(-MODEL_BYTES // (16 * MIB))
    staged = played(Broadcast(), n_chunks, MODEL_S / n_chunks)
    in_turn = [MODEL_S * (number + 1) for number in range(N_WORKERS)]
    print("seconds until each worker is staged (played), planned and one after another:")
    for number in (1, 5, 10, 20, 30, 40):
        print(f"  {number:2d}: {staged[number - 1]:6.1f} {in_turn[number - 1]:6.1f}")
    rows.add(
        "forty workers at once, played: median time to staged, over one after another",
        median(staged) / median(in_turn),
        "<= 0.5",
    )
    rows.add("… the last one, over one copy alone", staged[-1] / MODEL_S)


def main() -> None:
    arguments = parser(__doc__)
    names = ["hosts", "loopback", "forty", "restart", "weights", "alternating", "stream"]
    arguments.add_argument("--only", choices=names)
    arguments.add_argument("--device", default="cpu", help="for weights and alternating")
    arguments.add_argument("--gib", type=int, default=2, help="size of the checkpoint")
    arguments.add_argument("--store", help="serve the files of a folder (used by itself)")
    given = arguments.parse_args()
    if given.store:
        os.chdir(given.store)
        http.server.ThreadingHTTPServer(("", 8000), Store).serve_forever()
    rows = Rows()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["XDG_CACHE_HOME"] = f"{scratch}/digests"
        if given.only in (None, "forty"):
            forty(rows)
        # In memory: the rate of a disk varies too much just after gigabytes were written.
        with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
            if given.only in (None, "loopback"):
                loopback(rows, Path(memory))
            if given.only in (None, "weights"):
                rungs.weights(rows, Path(memory), given.device, given.gib)
        if given.only in (None, "alternating"):
            rungs.alternating(rows, given.device)
        if given.only in (None, "restart"):
            rungs.restart(rows, Path(scratch, "model"))
        if given.only in (None, "stream"):
            rungs.stream(rows)
        if given.only in (None, "hosts"):
            if os.geteuid() == 0 and shutil.which("ip") and shutil.which("tc"):
                broadcast(rows, Path(scratch))
            else:
                print("Network namespaces need root, ip and tc: the hosts are left out.")
    rows.write(given.json)


if __name__ == "__main__":
    main()
