"""Weights read from safetensors files straight into place."""

from __future__ import annotations

import json
import os

import psutil
import pytest
import torch
from safetensors.torch import save_file

from dask_pcm.inference.checkpoint import Checkpoint

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32)
DTYPES += (torch.int16, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.fixture
def files(tmp_path):
    """Two files: one of every type, the other larger than a chunk."""
    small = {str(d): torch.arange(24).reshape(2, 3, 4).to(d) for d in DTYPES}
    save_file({**small, "empty": torch.empty(0, 4)}, tmp_path / "small.safetensors", {"a": "b"})
    large = {"weight": torch.randn(5_000_000), "bias": torch.randn(7)}
    save_file(large, tmp_path / "large.safetensors")
    return {**small, "empty": torch.empty(0, 4), **large}, sorted(tmp_path.iterdir())


def test_tensors_are_what_was_saved(files):
    saved, paths = files
    with Checkpoint(paths) as checkpoint:
        assert checkpoint.tensors.keys() == saved.keys()
        for name, tensor in saved.items():
            found = checkpoint.tensors[name]
            assert found.dtype == tensor.dtype and found.shape == tensor.shape
            assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8))


def test_a_module_is_placed_off_the_files_with_its_ties(files):
    saved, paths = files
    module = torch.nn.Module()
    with Checkpoint(paths) as checkpoint:
        found = checkpoint.tensors
        module.weight = torch.nn.Parameter(found["weight"])
        module.same = module.weight
        module.alike = torch.nn.Parameter(found["weight"])
        module.converted = torch.nn.Parameter(found["bias"].double())
        module.register_buffer("part", found["weight"][10:20])
        module.register_buffer("strided", found["torch.float32"].transpose(0, 2))
        module.register_buffer("empty", found["empty"])
        identities = {name: id(tensor) for name, tensor in module.named_parameters()}
        checkpoint.place(module, "cpu")
    for path in paths:
        os.truncate(path, 0)  # whoever still used a file's memory would be killed
    assert torch.equal(module.weight, saved["weight"])
    assert module.same is module.weight
    assert module.alike.data_ptr() == module.weight.data_ptr()
    assert torch.equal(module.converted, saved["bias"].double())
    assert torch.equal(module.part, saved["weight"][10:20])
    assert torch.equal(module.strided, saved["torch.float32"].transpose(0, 2))
    assert identities == {name: id(tensor) for name, tensor in module.named_parameters()}
    assert module.weight.untyped_storage().resizable()


@pytest.mark.parametrize("n_bytes", [0, 5, 100, 1_000_000])
def test_a_file_that_is_cut_off_is_named(files, n_bytes):
    _, paths = files
    os.truncate(paths[0], n_bytes)
    with pytest.raises(ValueError, match=r"large\.safetensors"):
        Checkpoint(paths)


def test_a_type_that_is_not_known_is_named(tmp_path):
    header = json.dumps({"it": {"dtype": "F4", "shape": [1], "data_offsets": [0, 1]}}).encode()
    path = tmp_path / "new.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"x")
    with pytest.raises(ValueError, match="F4"):
        Checkpoint([path])
    assert str(path) not in [file.path for file in psutil.Process().open_files()]
