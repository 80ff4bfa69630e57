"""Fixtures that every test may use."""

from __future__ import annotations

import contextlib
import importlib
import logging
import multiprocessing
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import dask
import distributed.utils
import numpy as np
import pandas as pd
import pytest
from distributed import Client, LocalCluster, Nanny
from distributed.comm import CommClosedError

import dask_pcm as pcm
from dask_pcm.plugins.scheduler.plugin import GATE
from tests.support import weights
from tests.support.patience import patient

#: What stands in a traceback that went through our code; the repository's folder may be called
#: like the package.
PACKAGE = f"{Path(pcm.__file__).parent}{os.sep}"
#: A nanny's fork server imports torch and transformers, which takes seconds of each cluster; tests
#: that are about it say what it imports. For this process and those that it starts. Not by
#: ``dask.config.refresh``, which empties the configuration first: a running worker that imports
#: this module would close if its heartbeat found no setting.
if "DASK_PCM__WORKER__IMPORTS" not in os.environ:
    os.environ["DASK_PCM__WORKER__IMPORTS"] = "[]"
    dask.config.set({"pcm.worker.imports": []})
#: What a worker of any test imports, which takes longer than most tests.
_PRELOADED = [
    "distributed",
    "dask.dataframe",
    "pandas",
    "pyarrow.parquet",
    "dask_pcm.plugins.worker.plugin",
    "dask_pcm.runs.units.run_unit",
]
METHOD = "distributed.worker.multiprocessing-method"
#: Seconds that a test may take, on a machine with nothing else to do.
_TIMEOUT_S = 120


#: Tests that would begin after this moment, in seconds since the epoch, are skipped, and say so.
_DEADLINE = float(os.environ.get("PCM_TEST_DEADLINE", "inf"))
_LATE = "out of time: not run (PCM_TEST_DEADLINE)"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    if time.time() > _DEADLINE:
        pytest.skip(_LATE)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail where more than a tenth of the tests were not run for lack of time."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    stats = reporter.stats if reporter else {}
    n_late = sum(_LATE in str(report.longrepr) for report in stats.get("skipped", ()))
    # Without a name are the setups and teardowns that went well.
    n_tests = sum(len(reports) for name, reports in stats.items() if name)
    if n_late > n_tests / 10:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items if config.pluginmanager.hasplugin("timeout") else ():
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(patient(_TIMEOUT_S)))


class SwallowedErrors(logging.Handler):
    """Dask logs what a plugin's hook or a handler of ours raises and goes on; here it fails."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.records: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        raised = record.exc_info[1] if record.exc_info else None
        # A connection that is lost while a cluster closes tells of nothing.
        is_swallowed = raised is not None and not isinstance(raised, CommClosedError)
        is_swallowed = is_swallowed and PACKAGE in text
        if is_swallowed or "Plugin failed" in text or ("plugin pcm" in text and "failed" in text):
            self.records.append(text)


@pytest.fixture(autouse=True)
def no_swallowed_errors() -> Iterator[SwallowedErrors]:
    handler = SwallowedErrors()
    loggers = [logging.getLogger(f"distributed{name}") for name in ("", ".scheduler")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    yield handler
    for logger, level in zip(loggers, levels, strict=True):
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert not handler.records, "\n".join(handler.records)


@pytest.fixture(autouse=True)
def default_scheduler_as_before() -> Iterator[None]:
    """A client that loses its cluster leaves itself as Dask's default scheduler."""
    before = dask.config.get("scheduler", None)
    yield
    if dask.config.get("scheduler", None) != before:
        dask.config.set(scheduler=before)


@pytest.fixture(autouse=True, scope="session")
def workers_are_forked() -> Iterator[None]:
    """Nannies fork workers from a server that has imported what they need; see ``spawned``.

    As if it was started by ``spawn``, each worker gets the environment of its nanny's making.
    """
    distributed.utils._forkserver_preload_set = True  # ours is complete
    multiprocessing.get_context("forkserver").set_forkserver_preload(_PRELOADED)
    made = Nanny.__init__

    def init(self: Nanny, *args: Any, env: dict[str, str] | None = None, **options: Any) -> None:
        is_forked = dask.config.get(METHOD) == "forkserver"
        made(self, *args, env={**os.environ, **(env or {})} if is_forked else env, **options)

    with pytest.MonkeyPatch.context() as patched, dask.config.set({METHOD: "forkserver"}):
        patched.setattr(Nanny, "__init__", init)
        yield


@pytest.fixture
def spawned() -> Iterator[None]:
    """As ``spawning``, for a test."""
    with spawning():
        yield


@contextmanager
def spawning() -> Iterator[None]:
    """Nannies start workers as Dask does by default, and no fork server is running.

    With the toolkit they start the next ones from its own server.
    """
    forkserver._forkserver._stop()  # type: ignore[attr-defined] # a test's own: no public way
    with dask.config.set({METHOD: "spawn"}):
        yield
    multiprocessing.get_context("forkserver").set_forkserver_preload(_PRELOADED)


@contextmanager
def validated_cluster(n_workers: int = 2, **options: Any) -> Iterator[LocalCluster]:
    """Worker processes; state machines are validated, and logs looked through at the end."""
    with (
        dask.config.set({"distributed.scheduler.validate": True}),
        LocalCluster(
            n_workers=n_workers,
            threads_per_worker=1,
            dashboard_address=":0",
            validate=True,
            **options,
        ) as cluster,
    ):
        yield cluster
        lines: list[str] = []
        # A worker may be lost just now.
        with contextlib.suppress(OSError), Client(cluster) as client:
            lines = [text for logs in client.get_worker_logs().values() for _, text in logs]
        assert not [text for text in lines if "Error" in text and is_swallowed(text)]


def is_swallowed(text: str) -> bool:
    """Whether a worker tells of an error of ours that nobody else is told of."""
    is_ours = PACKAGE in text or "AssertionError" in text or "plugin pcm" in text
    return is_ours and "Compute Failed" not in text and "CommClosedError" not in text


@pytest.fixture(scope="module")
def shared_cluster() -> Iterator[LocalCluster]:
    """Two worker processes for the tests of a module: for whatever harms none of them.

    Not for the whole session: Dask's own cluster tests look for processes that were left behind.
    """
    with validated_cluster(memory_limit="4GiB") as cluster:
        yield cluster


@pytest.fixture
def client(shared_cluster: LocalCluster) -> Iterator[Client]:
    """A client of the shared cluster, with the toolkit; checks the gate's state afterwards."""
    with Client(shared_cluster) as client:
        pcm.install(client)
        yield client
        shared_cluster.scheduler.plugins[GATE].state.validate()


@pytest.fixture
def own_client() -> Iterator[Client]:
    """A cluster of two worker processes for this test alone."""
    with validated_cluster() as cluster, Client(cluster) as client:
        yield client


@pytest.fixture(scope="session")
def object_store() -> Iterator[str]:
    """An S3 server on loopback, for this process and those that it starts; yields its address."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patched.setenv(name, "testing")
        patched.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(object_store: str) -> str:
    """A new, empty bucket."""
    import s3fs

    name = f"bucket-{uuid.uuid4().hex}"
    s3fs.S3FileSystem().mkdir(name)
    return f"s3://{name}"


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """A real language model, in bfloat16."""
    return weights.smollm2_folder()


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    """A real encoder, in float32."""
    return weights.minilm_folder()


@pytest.fixture
def claims(tmp_path: Path) -> Callable[..., str]:
    """Write Parquet files of rows with ids from 0 on; return the folder."""

    def write(n_files: int = 4, n_rows: int = 50, **options: Any) -> str:
        folder = tmp_path / "claims"
        folder.mkdir()
        for number in range(n_files):
            ids = np.arange(number * n_rows, (number + 1) * n_rows)
            frame = pd.DataFrame({"id": ids, "claim": [f"claim {i}" for i in ids]})
            frame.to_parquet(folder / f"part-{number}.parquet", index=False, **options)
        return str(folder)

    return write


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """Imports a source as a module of the user's, under one name each time anew."""

    def imported(source: str):
        folder = tmp_path / f"own-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        (folder / "own_module.py").write_text(source)
        monkeypatch.syspath_prepend(folder)
        monkeypatch.delitem(sys.modules, "own_module", raising=False)
        return importlib.import_module("own_module")

    return imported


@pytest.fixture
def execute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, Path], list[Any]]:
    """Run the cells in a kernel of this very environment, whatever kernels are elsewhere."""
    kernels = tmp_path / "kernels" / "python3"
    kernels.mkdir(parents=True)
    command = f'["{sys.executable}", "-m", "ipykernel_launcher", "-f", "{{connection_file}}"]'
    spec = f'{{"argv": {command}, "display_name": "Python 3", "language": "python"}}'
    (kernels / "kernel.json").write_text(spec)
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))

    from nbclient import NotebookClient

    def run(notebook: Any, folder: Path) -> list[Any]:
        resources = {"metadata": {"path": folder}}
        NotebookClient(notebook, timeout=round(patient(100)), resources=resources).execute()
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
        assert outputs and not [o for o in outputs if o.output_type == "error"]
        return outputs

    return run
