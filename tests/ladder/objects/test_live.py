"""Objects that leave the device and come back."""

from __future__ import annotations

import functools
import gc
import logging
import threading
import weakref

import numpy as np
import pytest
import torch

from dask_pcm.context.context import Recipe
from dask_pcm.ladder.objects.host import ContextImages, Host
from dask_pcm.ladder.objects.images import Image, NoRoomError
from dask_pcm.ladder.objects.live import Live, frozen
from tests.ladder.objects.test_images import keeper, model
from tests.ladder.objects.test_tensors import Tied

PLAIN = Recipe(model, (), {})


def live_of(value, recipe=PLAIN, has_image=True):
    apart = frozen(value, recipe, "a model")
    images = ContextImages(Host(keeper()), "it")
    if has_image:
        images.host.put("it", "a model", apart)
    live = Live(value, recipe, apart, images)
    live.apart = None  # as once it is kept
    return live


def identities_of(value):
    named = {name: id(tensor) for name, tensor in value.state_dict(keep_vars=True).items()}
    return {**named, "": id(value)}


@pytest.mark.parametrize("has_image", [True, False])
def test_down_and_up_again_it_is_the_same_object_to_the_bit(has_image):
    live = live_of(Tied(), has_image=has_image)  # held by nobody else, as in a worker
    before = {name: tensor.clone() for name, tensor in live.value.state_dict().items()}
    identities = identities_of(live.value)
    strides = {name: tensor.stride() for name, tensor in live.value.state_dict().items()}
    for _ in range(3):
        assert live.offload()
        assert live.n_bytes == 0
        assert not any(t.untyped_storage().nbytes() for t in live.value.state_dict().values())
        live.restore()
        assert identities_of(live.value) == identities
        assert {n: t.stride() for n, t in live.value.state_dict().items()} == strides
        assert all(torch.equal(t, before[n]) for n, t in live.value.state_dict().items())
        assert live.value.other.weight is live.value.one.weight is live.value.kept


def test_what_a_task_has_changed_stays_changed():
    live = live_of(model())
    kept = live._lower.host.find("it")
    with torch.no_grad():
        live.value[0].weight[3, 3] = 42.0
    for _ in range(2):
        assert live.offload()
        live.restore()
        assert live.value[1].weight[3, 3] == 42.0
    found, _ = kept.thaw(is_mapped=True)  # what the next process finds is as it was loaded
    assert found[0].weight[3, 3] != 42.0


def one_of(host, name):
    value = model()
    return Live(value, PLAIN, frozen(value, PLAIN, "a model"), ContextImages(host, name))


def test_what_finds_no_room_on_the_host_stays_on_the_device():
    size = Image.write(frozen(model(), PLAIN, "a model")).n_bytes
    host = Host(keeper(int(1.5 * size)))
    first, second = one_of(host, "a"), one_of(host, "b")
    first.apart = second.apart = None
    assert first.offload()
    with pytest.raises(NoRoomError, match=r"host\.budget"):
        second.offload()
    assert second.value[0].weight.any()
    first.restore()  # its copy makes room now
    assert second.offload() and not second.n_bytes
    with pytest.raises(NoRoomError):
        first.offload()
    second.leave()  # given up
    assert first.offload()


def test_what_has_no_room_is_not_written_first(monkeypatch):
    """Written and then refused, it could have ended the job for its memory."""
    live = one_of(Host(keeper(1 << 10)), "it")
    live.apart = None
    monkeypatch.setattr("dask_pcm.ladder.objects.tensors.write", lambda *args: 1 / 0)
    with pytest.raises(NoRoomError):
        live.offload()


def test_mapped_it_has_been_there_all_the_time():
    live = Live.of_image(Image.write(frozen(model(), PLAIN, "a model")), PLAIN, is_mapped=True)
    value = live.value
    with torch.no_grad():
        value[0].weight[3, 3] = 42.0
    assert live.offload()
    live.restore()
    assert live.value is value and value[1].weight[3, 3] == 42.0


def test_of_a_device_it_is_not_mapped(monkeypatch):
    """Found again where tensors on the CPU would be mapped, it still leaves its device."""
    image = Image.write(frozen(model(), PLAIN, "a model"))
    monkeypatch.setattr(Image, "is_on_device", True)
    live = Live.of_image(image, PLAIN, is_mapped=True)
    assert live.mapped_bytes == 0
    assert live.offload() and live.n_bytes == 0
    live.restore()
    assert live.value[0].weight.any()


def test_what_cannot_be_pickled_goes_by_its_modules():
    class Engine:
        def __init__(self):
            self.lock, self.model = threading.Lock(), model()

    live = live_of(Engine())
    rows = torch.randn(2, 256)
    with torch.no_grad():
        before = live.value.model(rows)
    assert live.n_bytes > 0
    assert live.offload() and live.n_bytes == 0
    live.restore()
    assert torch.equal(live.value.model(rows), before)


def test_what_has_no_tensors_has_no_way_down():
    assert not live_of(object()).offload()
    assert not live_of({"text": "text"}).offload()


def test_hooks_move_what_is_theirs():
    said = []
    value = model()
    recipe = Recipe(model, (), {}, offload=said.append, restore=lambda v: (said.append(v), v)[1])
    live = live_of(value, recipe)
    assert live.offload() and live.value is value
    live.restore()
    assert said == [value, value]


def test_a_storage_that_cannot_be_emptied_stays_where_it_is():
    def half():
        value = model()
        value.table = torch.from_numpy(torch.arange(10).numpy())
        value[0].bias.detach().numpy()  # from now on neither can that one
        return value

    live = live_of(half())
    assert live.offload()
    assert live.value.table.tolist() == list(range(10))
    assert not live.value[0].weight.untyped_storage().nbytes()
    live.restore()
    assert live.value[0].weight.any() and live.value[0].bias.any()


def test_memory_that_processes_share_stays_where_it_is():
    live = live_of(model().share_memory())
    assert not live.offload()
    assert live.value[0].weight.any()


def test_where_there_is_no_memory_for_it_everything_is_as_before(monkeypatch):
    live = live_of(model())
    assert live.offload()

    def refuse(*args):
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr("dask_pcm.ladder.objects.tensors.read", refuse)
        with pytest.raises(MemoryError):
            live.restore()
    assert live.n_bytes == 0
    live.restore()
    assert live.value[0].weight.any()


def test_what_outlives_the_process_and_what_does_not(caplog):
    wanted = Recipe(model, (), {}, reattach=True)
    with caplog.at_level(logging.INFO):
        apart = frozen({"lock": threading.Lock()}, wanted, "an engine")
    assert apart.skeleton is None and "'an engine' cannot be kept" in caplog.text
    assert Host(keeper()).put("a", "an engine", apart) is None
    closes = Recipe(model, (), {}, close=print)
    assert frozen(model(), closes, "an engine").skeleton is None


class Lossy:
    """Picklable, but not as it was."""

    def __init__(self):
        self.model, self.add_bos = model(), True

    def __getstate__(self):
        return {"model": self.model}


def test_what_pickle_might_not_do_justice_to_is_left_alone_unless_asked_for():
    assert frozen(Lossy(), PLAIN, "mine").skeleton is None
    assert frozen([model(), Lossy()], PLAIN, "mine").skeleton is None
    assert frozen(Lossy(), Recipe(Lossy, (), {}, reattach=True), "mine").skeleton is not None
    for plain in (model(), {"a": model(), "b": [torch.ones(3), None, "text"]}):
        assert frozen(plain, PLAIN, "plain").skeleton is not None
        assert frozen(plain, Recipe(model, (), {}, reattach=False), "plain").skeleton is None


@pytest.mark.parametrize(
    "taken",
    [
        lambda value: value[0].weight.detach()[:3],
        lambda value: value[0].weight[3],
        lambda value: value[0].weight,
        lambda value: value[0].weight.detach().numpy(),
        lambda value: value[1],
        lambda value: value,
    ],
    ids=["a part", "a row", "a parameter", "an array", "a module", "the object"],
)
@pytest.mark.parametrize("is_picklable", [True, False])
def test_what_somebody_else_has_a_part_of_is_not_emptied(taken, is_picklable):
    recipe = Recipe(model, (), {}, reattach=is_picklable)
    live = Live(value := model(), recipe, frozen(value, recipe, "a model"))
    del value
    with torch.no_grad():
        result = taken(live.value)
        expected = [tensor.clone() for tensor in tensors_of(result)]
    assert not live.offload()
    assert all(map(torch.equal, tensors_of(result), expected))
    is_array = isinstance(result, np.ndarray)  # a storage that had one cannot be emptied
    del result
    gc.disable()  # nor does anything wait for it
    try:
        assert live.offload()
        assert bool(live.n_bytes) is is_array
    finally:
        gc.enable()


def tensors_of(result):
    if isinstance(result, torch.nn.Module):
        return list(result.state_dict().values())
    return [torch.as_tensor(result)]


def test_what_a_cache_holds_as_well_is_not_emptied():
    """It was there when the object came."""

    @functools.cache
    def base():
        return model()

    live = live_of(torch.nn.Sequential(base(), model()))
    assert not live.offload()
    assert base()[0].weight.any()


def test_dropped_its_memory_is_free_at_once():
    live = live_of(model())
    module, weight = weakref.ref(live.value), weakref.ref(live.value[0].weight)
    gc.disable()
    try:
        del live
        assert module() is None and weight() is None
    finally:
        gc.enable()


def test_whether_a_task_has_changed_it_is_told():
    live = live_of(model())
    assert live.is_unchanged
    with torch.no_grad():
        live.value[0].weight.add_(1)
    assert not live.is_unchanged


def test_hooks_may_free_what_they_move():
    value = model()
    recipe = Recipe(
        model, (), {}, offload=lambda m: m.to("meta"), restore=lambda m: m.to_empty(device="cpu")
    )
    live = live_of(value, recipe)
    size, alive = live.n_bytes, weakref.ref(value[0].weight.untyped_storage())
    assert live.offload()
    assert alive() is None and live.n_bytes == size
