"""Objects taken apart and put together; bytes of storages into files and back."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest
import torch

from dask_pcm.ladder.objects.freeze import freeze, modules_of, thaw
from dask_pcm.ladder.objects.tensors import is_same, new_storage, read, write


class Tied(torch.nn.Module):
    """Ties of all kinds: a parameter twice, two views of one storage, a plain attribute."""

    def __init__(self):
        super().__init__()
        self.one = torch.nn.Linear(8, 8)
        self.other = torch.nn.Linear(8, 8)
        self.other.weight = self.one.weight
        flat = torch.arange(10.0, dtype=torch.bfloat16)
        self.register_buffer("head", flat[:4])
        self.register_buffer("tail", flat[4:])
        self.register_buffer("strided", torch.arange(12).reshape(3, 4).t()[1:])
        self.empty = torch.nn.Parameter(torch.empty(0, 3), requires_grad=False)
        self.kept = self.one.weight


def again(value):
    """Taken apart, and put together on copies."""
    apart = freeze(value)
    storages = [storage.clone() for storage in apart.storages]
    return thaw(apart.skeleton, storages, [memoryview(bytearray(b)) for b in apart.buffers])


def test_what_is_put_together_is_the_same_with_all_its_ties():
    scale = 3

    class Local:
        """Known to nobody else."""

        def __init__(self, module):
            self.module, self.times = module, lambda x: x * scale

    before = Local(Tied())
    after = again(before)
    assert after.times(2) == 6
    one, two = before.module.state_dict(), after.module.state_dict()
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name])
        assert (tensor.dtype, tensor.stride()) == (two[name].dtype, two[name].stride())
    module = after.module
    assert module.other.weight is module.one.weight is module.kept
    module.head[0] = 7
    assert module.tail.untyped_storage().data_ptr() == module.head.untyped_storage().data_ptr()
    assert not module.empty.requires_grad and module.one.weight.requires_grad
    assert before.module.head[0] == 0  # on storages of its own


def test_each_storage_once_and_arrays_beside_them():
    array = np.arange(100_000.0)
    apart = freeze({"m": Tied(), "array": array, "same": array, "small": np.arange(3)})
    assert len(apart.storages) == 6  # weight, two biases, head and tail, strided, empty
    assert [b.nbytes for b in apart.buffers] == [800_000]
    assert apart.n_bytes > 800_000
    assert len(apart.skeleton) < 10_000
    after = again({"array": array, "same": array})
    assert after["array"] is after["same"]
    assert np.array_equal(after["array"], array)


def test_what_cannot_be_pickled_or_is_too_much_is_refused(monkeypatch):
    with pytest.raises(TypeError, match="lock"):
        freeze({"lock": threading.Lock()})
    monkeypatch.setattr("dask_pcm.ladder.objects.freeze._MAX_SKELETON_BYTES", 1 << 20)
    with pytest.raises(ValueError, match="neither tensor nor array"):
        freeze([os.urandom(10) for _ in range(200_000)])
    assert freeze([os.urandom(10) for _ in range(2_000)]).n_bytes == 0


def test_storages_of_an_object_that_cannot_be_pickled():
    class Holder:
        def __init__(self):
            self.module, self.lock = Tied(), threading.Lock()

    assert len(modules_of(Holder()).storages) == 6
    assert len(modules_of(Tied()).storages) == 6
    assert len(modules_of([torch.nn.Linear(2, 2), "text"]).storages) == 2
    assert len(modules_of({"deep": [{"down": torch.nn.Linear(2, 2)}]}).storages) == 2
    assert modules_of("text").storages == modules_of(object()).storages == []


@pytest.fixture
def file(tmp_path):
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


def test_bytes_go_out_and_come_back_in_chunks_by_several_threads(file):
    sizes = [0, 1, 100, (16 << 20) - 1, 16 << 20, (40 << 20) + 7]
    before = [torch.randint(256, (n,), dtype=torch.uint8).untyped_storage() for n in sizes]
    starts = [sum(sizes[:i]) + i for i in range(len(sizes))]
    write(file, zip(before, starts, strict=True))
    after = [new_storage(n, "cpu") for n in sizes]
    read(file, zip(after, starts, strict=True))
    for one, two in zip(before, after, strict=True):
        assert bytes(one) == bytes(two) if len(one) < 1000 else torch.equal(*map(flat, (one, two)))
        assert two.resizable()
    placed = list(zip(after, starts, strict=True))
    assert is_same(file, placed)
    flat(after[-1])[33 << 20] ^= 1
    assert not is_same(file, placed)


def flat(storage):
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def test_a_file_that_ends_too_soon_is_an_error(file):
    os.truncate(file, 1000)
    with pytest.raises(OSError, match="too soon"):
        read(file, [(new_storage(2000, "cpu"), 0)])
