"""Settings: what they may be, and what is said of the rest."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import fields, replace
from datetime import timedelta

import dask
import pytest
import yaml

from dask_pcm import config as config_module
from dask_pcm.config import Config

WRONG = {
    "gate.pipeline": ["-5s", ".5s", "soon", True, None, [1], float("nan")],
    "gate.tick": [0, "0s", "-1s"],
    "gate.load-attempts": [0, 1.5, "three", True, None],
    "context.idle-timeout": ["never", "-5s", -5, "", "5 lightyears", float("inf")],
    "worker.lanes": [0, "", [2]],
    "worker.threads": [0, "all"],
    "worker.imports": ["torch", 0, [1], [""], {"torch": 1}],
    "worker.device": ["", " ", 5, ["a10"]],
    "worker.accelerator": ["", "gpu", None, True, "CPU"],
    "worker.pool": ["", b"owners"],
    "worker.walltime": [0, "0s", "4 o'clock", True],
    "worker.notice": [0, "soon"],
    "ladder.stage": ["never", None, True],
    "ladder.device.budget": ["lots", "50%", ["4GiB"], True, 0, "0 B", -1, "GB", "1e999"],
    "ladder.host.budget": ["half", -1, False],
    "ladder.disk.path": ["", " ", 5, b"/tmp", ["/tmp"]],
    "ladder.disk.quota": [0, "10 parsecs"],
    "ladder.store.timeout": [0, "0s", None],
    "ladder.transfer.ports": ["9010:9000", -1, 70_000, None, "any"],
    "run.unit-bytes": [0, None],
    "inference.batch-rows": [0],
    "inference.slice-tokens": [0, -1, None, "all"],
    "inference.question-weight": [0, 0.5],
    "inference.recompute": ["", None, True, "sometimes"],
    "inference.host-pages": ["half", -1],
}


@pytest.fixture(autouse=True, scope="module")
def as_shipped():
    """With the fork server's imports that the other tests do without."""
    with pytest.MonkeyPatch.context() as patched:
        patched.delenv("DASK_PCM__WORKER__IMPORTS")
        dask.config.refresh()
        yield
    dask.config.refresh()


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in WRONG.items() for value in values]
)
def test_what_cannot_be_used_is_named_with_what_was_found_and_what_could_be(key, value):
    with dask.config.set({f"pcm.{key}": value}), pytest.raises(ValueError) as caught:
        Config.read()
    said = str(caught.value)
    assert said.startswith(f"pcm.{key} must be ") and said.endswith(f"; found {value!r}.")
    assert len(said) < 150


@pytest.mark.parametrize(
    ("key", "value", "name", "read"),
    [
        ("gate.pipeline", "50 ms", "pipeline_s", 0.05),
        ("gate.pipeline", 0, "pipeline_s", 0.0),
        ("gate.tick", 0.5, "tick_s", 0.5),
        ("gate.tick", "0.5", "tick_s", 0.5),
        ("context.idle-timeout", None, "idle_s", None),
        ("context.idle-timeout", timedelta(minutes=2), "idle_s", 120.0),
        ("worker.imports", None, "imports", ()),
        ("worker.imports", ["torch"], "imports", ("torch",)),
        ("worker.device", "NVIDIA A10", "device", "NVIDIA A10"),
        ("worker.accelerator", "cpu", "is_cpu_only", True),
        ("worker.accelerator", "auto", "is_cpu_only", False),
        ("worker.pool", None, "pool", None),
        ("worker.walltime", "4h", "walltime_s", 14_400.0),
        ("worker.walltime", None, "walltime_s", None),
        ("worker.notice", 120, "notice_s", 120.0),
        ("ladder.device.budget", "4 GiB", "device_budget_bytes", 4 << 30),
        ("ladder.device.budget", ".5GB", "device_budget_bytes", 500_000_000),
        ("ladder.host.budget", 0, "host_budget_bytes", 0),
        ("ladder.disk.path", "/scratch", "disk_path", "/scratch"),
        ("ladder.stage", "always", "is_staged_always", True),
        ("ladder.transfer.ports", "9000:9002", "ports", (9000, 9001, 9002)),
        ("ladder.transfer.ports", 0, "ports", (0,)),
    ],
)
def test_what_can_be_used_is_read(key, value, name, read):
    with dask.config.set({f"pcm.{key}": value}):
        assert getattr(Config.read(), name) == read


def test_each_setting_is_read_and_only_those():
    def keys(found, *path):
        for key, value in found.items():
            yield from (
                keys(value, *path, key) if isinstance(value, dict) else [".".join((*path, key))]
            )

    read = [setting.metadata["key"] for setting in fields(Config)]
    with open(config_module.__file__.replace("config.py", "pcm.yaml")) as file:
        assert sorted(keys(yaml.safe_load(file)["pcm"])) == sorted(read)


def test_what_belongs_to_a_workers_own_job_is_as_it_is_set_there():
    with dask.config.set(
        {"pcm.worker.pool": "of the client", "pcm.worker.notice": "60s", "pcm.worker.lanes": 3}
    ):
        sent = Config.read()
    here = sent.here()  # nothing is said
    assert here == sent
    with dask.config.set(
        {"pcm.worker.pool": "owners", "pcm.worker.lanes": 1, "pcm.worker.accelerator": "cpu"}
    ):
        here = sent.here()
    assert (here.pool, here.notice_s, here.n_lanes, here.is_cpu_only) == ("owners", 60.0, 3, True)


@contextlib.contextmanager
def configured():
    """Dask's configuration, put back afterwards."""
    before = copy.deepcopy(dask.config.config)
    try:
        yield
    finally:
        dask.config.config.clear()
        dask.config.config.update(before)


@pytest.mark.parametrize("key", ["pcm", "pcm.worker", "pcm.ladder.device"])
@pytest.mark.parametrize("value", [{}, None])
def test_what_has_been_reset_is_as_by_default(key, value):
    default = Config.read()
    with configured(), dask.config.set({key: value}):
        assert Config.read() == Config.read().here() == default


def test_a_configuration_that_was_cleared_is_as_by_default():
    default = Config.read()
    with configured():
        dask.config.config.clear()
        assert Config.read() == Config.read().here() == default
        dask.config.set({"pcm.worker.lanes": 5})  # for good, beside nothing else
        assert Config.read() == replace(default, n_lanes=5)
        dask.config.refresh()
        assert Config.read() == default


@pytest.mark.parametrize(("key", "value"), [("pcm", 5), ("pcm.worker", "gpu"), ("pcm.gate", [1])])
def test_a_section_that_is_a_value_is_named(key, value):
    with dask.config.set({key: value}), pytest.raises(ValueError, match="section") as caught:
        Config.read()
    assert str(caught.value) == f"{key} must be a section of settings; found {value!r}."
