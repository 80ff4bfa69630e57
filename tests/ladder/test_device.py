"""What device a process was given, and whether torch can use it: a tree of files stands in for
``/proc``, and a module for torch, where there is no such device."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import dask
import pytest

from dask_pcm import errors
from dask_pcm.context.context import Context
from dask_pcm.factcheck.demo import MODEL_PATH
from dask_pcm.inference import LLM
from dask_pcm.inference.loading import load_model
from dask_pcm.ladder.device import (
    built_for_cpu,
    check_device,
    chosen_device,
    declared_device,
    device_model,
    driver_version,
)
from dask_pcm.ladder.store import Store, of_process
from dask_pcm.tiers import Tier

A100, TITAN = "NVIDIA A100-SXM4-40GB", "NVIDIA TITAN X (Pascal)"
VERSIONS = {
    "closed": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC"
    " 2023\nGCC version:  gcc version 12.2.0 (Debian 12.2.0-14)\n",
    "open": "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.82.07  Release Build"
    "  (dvs-builder@U22-I3-B17)\nGCC version:  gcc version 12.2.0\n",
}
VISIBLE = (
    "CUDA_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "GPU_DEVICE_ORDINAL",
    "ZE_AFFINITY_MASK",
)


@pytest.fixture(autouse=True)
def nothing_is_declared(monkeypatch):
    for name in VISIBLE:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def proc(tmp_path):
    """Make a ``/proc``: a CPU, and a device for each of `models`."""

    def make(*models, excluded=()):
        (tmp_path / "cpuinfo").write_text(
            "processor\t: 0\nmodel name\t: AMD EPYC  7763 64-Core\nflags\t\t: fpu vme\n\n"
            "processor\t: 1\nmodel name\t: another\n"
        )
        for i, model in enumerate(models):
            folder = tmp_path / "driver" / "nvidia" / "gpus" / f"0000:{i:02}:00.0"
            folder.mkdir(parents=True)
            (folder / "information").write_text(
                f"Model: \t\t {model}\nIRQ:   \t\t 13{i}\nGPU UUID: \t GPU-{i}a1b6b58-7fd1\n"
                f"Bus Location: \t 0000:{i:02}:00.0\nDevice Minor: \t {i}\n"
                f"GPU Excluded:\t {'Yes' if i in excluded else 'No'}\n"
            )
        if models:
            (tmp_path / "driver" / "nvidia" / "version").write_text(VERSIONS["closed"])
        return tmp_path

    return make


@pytest.fixture
def torch(monkeypatch):
    """Stands in for torch on a node with a device; its parts can be set to what is wrong."""

    class FakeCuda(SimpleNamespace):
        n_inits = 0

        def init(self):
            self.n_inits += 1
            if self.error is not None:
                raise self.error

    cuda = FakeCuda(
        error=None,
        is_initialized=lambda: False,
        is_available=lambda: True,
        get_device_capability=lambda: (8, 0),
        get_device_name=lambda: f"{A100} as torch says",
        get_arch_list=lambda: ["sm_75", "sm_80", "sm_90", "compute_90"],
    )
    module = type(sys)("torch")
    module.__version__ = "2.13.0+cu130"
    module.version = SimpleNamespace(cuda="13.0", hip=None)
    module.cuda = cuda
    module.nn = SimpleNamespace(Module=type("Module", (), {}))
    module.OutOfMemoryError = type("OutOfMemoryError", (RuntimeError,), {})
    monkeypatch.setitem(sys.modules, "torch", module)
    return module


@pytest.mark.parametrize(
    ("visible", "model"),
    [
        (None, TITAN),
        ("0", TITAN),
        ("1", A100),
        ("1,0", A100),
        (" 1 ", A100),
        ("GPU-1a1b6b58-7fd1", A100),
        ("GPU-1a1b", A100),
        ("MIG-GPU-1a1b6b58-7fd1/3/0", f"{A100} MIG"),
        ("MIG-8d2e-11", f"{TITAN} MIG"),  # which one it is part of, nobody says
        ("7", TITAN),
        ("", "AMD EPYC 7763 64-Core"),
        ("-1", "AMD EPYC 7763 64-Core"),
        ("NoDevFiles", "AMD EPYC 7763 64-Core"),
    ],
)
def test_the_model_of_the_first_device_that_is_visible(proc, monkeypatch, visible, model):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert device_model(proc(TITAN, A100)) == model


def test_the_model_where_no_driver_names_one(proc, torch, tmp_path):
    assert device_model(proc()) == "AMD EPYC 7763 64-Core"  # torch does not use one yet
    torch.cuda.is_initialized = lambda: True
    torch.cuda.get_device_name = lambda: "AMD  Instinct MI300X"
    assert device_model(tmp_path) == "AMD Instinct MI300X"
    assert device_model(tmp_path / "nowhere") == "AMD Instinct MI300X"


def test_the_model_of_this_very_machine_is_known():
    assert device_model().strip()


def test_nothing_is_known(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert device_model(tmp_path) == "cpu"
    assert driver_version(tmp_path) is None
    (tmp_path / "cpuinfo").write_text("processor : 0\nBogoMIPS : 50.00\n")  # some have no name
    assert device_model(tmp_path) == "cpu"


def test_excluded_devices_are_none(proc):
    assert device_model(proc(TITAN, A100, excluded=[0])) == A100


@pytest.mark.parametrize(("kind", "version"), [("closed", "535.129.03"), ("open", "580.82.07")])
def test_the_version_of_the_driver(proc, kind, version):
    there = proc(A100)
    (there / "driver" / "nvidia" / "version").write_text(VERSIONS[kind])
    assert driver_version(there) == version


@pytest.mark.parametrize(
    ("says", "declared"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, "CUDA_VISIBLE_DEVICES=0,1"),
        ({"CUDA_VISIBLE_DEVICES": ""}, None),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, None),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, None),
        ({"ROCR_VISIBLE_DEVICES": "2"}, "ROCR_VISIBLE_DEVICES=2"),
        ({"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "0"}, "HIP_VISIBLE_DEVICES=0"),
        ({"ROCR_VISIBLE_DEVICES": "-1"}, None),
        ({"GPU_DEVICE_ORDINAL": "0"}, "GPU_DEVICE_ORDINAL=0"),
        ({"ZE_AFFINITY_MASK": "0.1"}, "ZE_AFFINITY_MASK=0.1"),
        (  # as Slurm sets them, whatever the device
            dict.fromkeys((*VISIBLE[:2], VISIBLE[3]), "0,1"),
            "CUDA_VISIBLE_DEVICES=0,1, ROCR_VISIBLE_DEVICES=0,1, GPU_DEVICE_ORDINAL=0,1",
        ),
    ],
)
def test_what_declares_a_device(proc, monkeypatch, says, declared):
    there = proc(*([A100] if "CUDA_VISIBLE_DEVICES" in says else []))
    for name, value in says.items():
        monkeypatch.setenv(name, value)
    assert declared_device(there) == declared


def test_devices_of_the_driver_declare_themselves(proc, tmp_path):
    assert declared_device(tmp_path) is None
    assert declared_device(proc(A100, A100)) == f"2 in {tmp_path}/driver/nvidia/gpus: {A100}"


def test_a_device_that_torch_can_use_is_looked_at_once(proc, torch):
    there = proc(A100)
    for _ in range(3):
        check_device(there)
    assert torch.cuda.n_inits == 1


def test_where_none_was_given_torch_is_not_asked(proc, torch, monkeypatch):
    check_device(proc())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    check_device(proc(A100))
    assert torch.cuda.n_inits == 0


def test_where_torch_is_not_imported_it_is_not_asked_for(proc, monkeypatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    check_device(proc(A100))
    assert "torch" not in sys.modules


TOO_OLD = (
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU"
    " driver"
)


def built_for_cpus(torch):
    torch.__version__, torch.version.cuda = "2.13.0+cpu", None


def with_an_old_driver(torch):
    torch.cuda.error = RuntimeError(TOO_OLD)


def without_a_device(torch):
    torch.cuda.is_available = lambda: False


def for_newer_devices(torch):
    torch.cuda.get_device_capability = lambda: (6, 1)
    torch.cuda.get_device_name = lambda: TITAN


ASKS_FOR_CPU = "DASK_PCM__WORKER__ACCELERATOR=cpu"


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (built_for_cpus, ["built for the CPU only", "2.13.0+cpu, built for CPUs"]),
        (with_an_old_driver, [TOO_OLD, "torch 2.13.0+cu130, built for CUDA 13.0"]),
        (without_a_device, ["is_available() is False"]),
        (for_newer_devices, [f"no kernels for {TITAN}, which is sm_61", "built for sm_75, sm_80"]),
    ],
)
def test_what_is_wrong_is_said_with_versions_and_what_to_do(proc, torch, spoil, says):
    spoil(torch)
    there = proc(TITAN)
    for _ in range(2):  # it is looked at again: somebody may have mended it
        with pytest.raises(errors.DeviceUnusableError) as caught:
            check_device(there)
    said = str(caught.value)
    for text in (*says, TITAN, str(there), "NVIDIA driver 535.129.03", ASKS_FOR_CPU):
        assert text in said
    assert isinstance(caught.value, errors.DeviceError)


def test_a_device_without_a_driver(tmp_path, torch, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    torch.cuda.error = RuntimeError("Found no NVIDIA driver on your system.")
    with pytest.raises(errors.DeviceUnusableError, match=r"no NVIDIA driver\. Install"):
        check_device(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["CUDA error: out of memory", "CUDA error: uncorrectable ECC error encountered"],
)
def test_a_full_or_a_lost_device_is_something_else(proc, torch, text):
    torch.cuda.error = RuntimeError(text)
    with pytest.raises(RuntimeError) as caught:
        check_device(proc(A100))
    assert caught.value is torch.cuda.error


@pytest.mark.parametrize(
    ("capability", "built_for", "has_kernels"),
    [
        ((8, 6), ["sm_80"], True),
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_80", "sm_86"], False),
        ((9, 0), ["sm_80", "compute_80"], True),
        ((8, 0), ["compute_90"], False),
        ((9, 0), ["sm_90a"], True),
        ((9, 1), ["sm_90a", "compute_90a"], False),
        ((12, 1), ["sm_120"], True),
        ((12, 0), ["sm_100", "sm_100f"], False),
        ((10, 3), ["sm_100f"], True),
        ((10, 3), ["compute_100f"], True),
        ((12, 0), ["compute_100f"], False),
        ((12, 0), ["gfx90a"], False),
        ((8, 0), [], True),  # nothing is said
    ],
)
def test_which_code_runs_on_which_device(proc, torch, capability, built_for, has_kernels):
    torch.cuda.get_device_capability = lambda: capability
    torch.cuda.get_arch_list = lambda: built_for
    if has_kernels:
        check_device(proc(A100))
    else:
        with pytest.raises(errors.DeviceUnusableError, match="no kernels"):
            check_device(proc(A100))


def test_rocm_is_not_held_against_architectures_of_cuda(tmp_path, torch, monkeypatch):
    monkeypatch.setenv("ROCR_VISIBLE_DEVICES", "0")
    torch.version.cuda, torch.version.hip = None, "6.4"
    torch.cuda.get_arch_list = lambda: ["gfx90a", "gfx942"]
    check_device(tmp_path)


@pytest.mark.parametrize("is_there", [True, False])
def test_other_accelerators_are_asked_for_themselves(tmp_path, torch, monkeypatch, is_there):
    monkeypatch.setenv("ZE_AFFINITY_MASK", "0")
    torch.version.cuda, torch.version.xpu = None, "20250301"
    torch.xpu = SimpleNamespace(is_available=lambda: is_there)
    if is_there:
        check_device(tmp_path)
    else:
        with pytest.raises(errors.DeviceUnusableError, match="built for XPU 20250301"):
            check_device(tmp_path)


# -- what is loaded ------------------------------------------------------------------------------


CLOSED = []


class Built:
    pass


def load():
    return Built()


def close(built):
    CLOSED.append(built)


@pytest.fixture
def changes():
    return []


@pytest.fixture
def store(changes):
    store = Store(changes.append)
    yield store
    store.validate()
    CLOSED.clear()


def test_what_is_meant_for_a_device_does_not_stay_where_there_is_none(
    store, changes, torch, monkeypatch
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    built_for_cpus(torch)
    context = Context(load, close=close, device_memory=10)
    with pytest.raises(errors.LoadError, match=r"(?s)DeviceUnusableError: .*built for CPUs"):
        store.load(context.ref)
    assert len(CLOSED) == 1
    assert store.tier(context.digest) is Tier.FAILED
    last = changes[-1]
    assert (last.tier, last.kind, last.is_sticky) == (Tier.FAILED, "device", False)
    assert "torch 2.13.0+cpu, built for CPUs" in last.error
    # Somebody mends it.
    torch.version.cuda = "13.0"
    assert isinstance(store.load(context.ref), Built)


@pytest.mark.parametrize("name", VISIBLE)
def test_a_worker_that_is_to_use_the_cpu_has_what_is_meant_for_a_device(
    changes, torch, monkeypatch, name
):
    monkeypatch.setenv(name, "0")
    built_for_cpus(torch)
    context = Context(load, device_memory=10)
    with pytest.raises(errors.LoadError, match=rf"(?s){name}=0.*{ASKS_FOR_CPU}"):
        Store().load(context.ref)
    store = Store(changes.append, is_cpu_only=True)
    assert isinstance(store.load(context.ref), Built)
    assert changes[-1].tier is Tier.DEVICE
    with dask.config.set({"pcm.worker.accelerator": "cpu"}):  # outside a cluster
        of_process.cache_clear()
        assert isinstance(of_process().load(context.ref), Built)
    of_process.cache_clear()


def test_what_asks_for_no_memory_of_a_device_stays_anywhere(store, changes, torch, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    built_for_cpus(torch)
    assert isinstance(store.load(Context(load).ref), Built)
    assert changes[-1].tier is Tier.DEVICE


def test_other_errors_keep_their_kind(store, changes):
    with pytest.raises(errors.LoadError):
        store.load(Context(int, "not a number", name="n").ref)
    assert changes[-1].kind == "ValueError"


def test_a_model_is_not_loaded_onto_the_cpu_unasked(monkeypatch):
    """With the torch of this environment: it sees no device, whatever it was built for."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("torch can use the device of this machine")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(
        errors.DeviceUnusableError, match=r"given a device \(CUDA_VISIBLE_DEVICES=0"
    ):
        load_model(str(MODEL_PATH))
    assert load_model(str(MODEL_PATH), device="cpu").facts["device"] == "cpu"
    with built_for_cpu(True):
        assert load_model(str(MODEL_PATH)).facts["device"] == "cpu"
        assert load_model(str(MODEL_PATH), device=None).facts["device"] == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert load_model(str(MODEL_PATH)).facts["device"] == "cpu"


def test_whoever_has_an_accelerator_can_be_told_to_use_the_cpu(torch):
    torch.accelerator = SimpleNamespace(
        is_available=lambda: True, current_accelerator=lambda: SimpleNamespace(type="cuda")
    )
    assert chosen_device() == "cuda"
    with built_for_cpu(True):
        assert chosen_device() == "cpu"
    assert chosen_device() == "cuda"


def test_an_llm_for_the_cpu_takes_nothing_on_a_device():
    assert LLM(MODEL_PATH, device="cpu").device_memory_bytes is None
    assert LLM(MODEL_PATH, device="cpu", device_memory=5).device_memory_bytes == 5
    assert LLM(MODEL_PATH).device_memory_bytes
    assert LLM(MODEL_PATH, device=None).digest == LLM(MODEL_PATH).digest
