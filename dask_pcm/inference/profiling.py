"""How a context's rate and memory grow with what it has to do at a time, on this device.

For language models, requests that are answered at the same time, as in Vijaya Kumar, Antichi and
Singh, "Aqua: Network-Accelerated Memory Offloading for LLMs in Scale-Up GPU Domains" (ASPLOS 2025):
99 % of first tokens come within 1 s, and of the others within 100 ms of the one before. The best
number is the smallest with 95 % of the highest rate at which that is so; the rest is noise. For a
function of other contexts, rows of a batch.
"""

from __future__ import annotations

import logging
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pandas as pd
import psutil

from dask_pcm.config import Config
from dask_pcm.context.context import Context
from dask_pcm.errors import PromptError
from dask_pcm.inference.engine.rows import Generated, RowError
from dask_pcm.inference.engine.serving import Serving
from dask_pcm.inference.engine.timeslice import Kind, Owner
from dask_pcm.inference.language_model import LanguageModel
from dask_pcm.ladder.objects.tensors import device_bytes, is_out_of_memory
from dask_pcm.ladder.store import Store

logger = logging.getLogger(__name__)

#: Limits of the best number of requests, in seconds.
FIRST_S, BETWEEN_S = 1.0, 0.1
#: Numbers are doubled until the rate has not grown by this for as many of them.
_GAIN, _N_FLAT = 1.05, 2
#: Of the highest rate, the share that the knee has.
_KNEE = 0.95
_MOST = 256
#: Batches of each size, at least, of which the median counts, and seconds of them in all; and
#: requests for each place.
_N_REPEATS, _LEAST_S, _N_ROUNDS = 3, 0.02, 2
_LOOK_S = 0.002


@dataclass(frozen=True, slots=True)
class Point:
    """What was measured with some requests at a time, or with batches of some rows.

    Attributes
    ----------
    n
        Requests at a time, or rows of a batch.
    rate
        Requests, or rows, per second.
    n_bytes
        Memory at its peak: of the device, with the weights; on a CPU what the process took beside
        what it had before.
    needed_bytes
        What rows took beside the memory of the engine.
    first_s, between_s
        Of 99 % of requests at most, until the first token, and between two; None for functions.
    """

    n: int
    rate: float
    n_bytes: int
    needed_bytes: int = 0
    first_s: float | None = None
    between_s: float | None = None

    @property
    def is_prompt(self) -> bool:
        """Whether it keeps the limits of requests; functions have none."""
        if self.first_s is None or self.between_s is None:
            return True
        return self.first_s <= FIRST_S and self.between_s <= BETWEEN_S


@dataclass(frozen=True, slots=True)
class Profile:
    """What was measured of a context.

    Attributes
    ----------
    name
        Of the context.
    unit
        What is counted: "requests" or "rows".
    device
        Where.
    points
        By the number at a time.
    size_bytes
        What it takes on the device when nothing is computed.
    budget_bytes
        What contexts may take there; None if there is no limit.
    """

    name: str
    unit: str
    device: str
    points: tuple[Point, ...]
    size_bytes: int
    budget_bytes: int | None

    @property
    def knee(self) -> Point:
        """The smallest number that has 95 % of the highest rate."""
        return _knee(self.points)

    @property
    def best(self) -> Point | None:
        """The knee of those within the limits of requests; None if even one exceeds them."""
        prompt = [point for point in self.points if point.is_prompt]
        return _knee(prompt) if prompt else None

    @property
    def spare_bytes(self) -> int | None:
        """What it leaves of the device at its best, to lend; negative if it needs more.

        None without a limit.
        """
        point = self.best or self.points[0]
        if self.budget_bytes is None:
            return None
        return self.budget_bytes - max(self.size_bytes, point.n_bytes) - point.needed_bytes


def _knee(points: Sequence[Point]) -> Point:
    most = max(point.rate for point in points)
    return next(point for point in points if point.rate >= _KNEE * most)


def profile(
    context: Context,
    func: Callable[..., Any] | None = None,
    frame: pd.DataFrame | None = None,
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 64,
    on_point: Callable[[Point], None] = lambda point: None,
) -> Profile:
    """Load a context in this process, and measure it.

    Parameters
    ----------
    context
        An ``LLM``, or any other context with `func` and `frame`.
    func
        What computes a batch: ``func(frame, value)``, as for ``map_partitions``. The first batch
        for which it has no memory is the last.
    frame
        Rows for it; the largest batch has all of them.
    prompt_tokens, new_tokens
        Of each request to a language model; its tokens are drawn at random.
    on_point
        Told each point as it is measured.

    Raises
    ------
    LoadError
        If the context cannot be loaded.
    PromptError
        If it is no language model that an engine computes, and there is no function or no row; or
        if the requests are longer than the model takes.

    Examples
    --------
    >>> from dask_pcm.factcheck import demo_model
    >>> found = profile(demo_model(), prompt_tokens=8, new_tokens=4)
    >>> found.unit, found.points[0].n, found.knee.rate > 0
    ('requests', 1, True)
    """
    config = Config.read()

    def limit_bytes() -> int | None:
        own_bytes = None if config.is_cpu_only else device_bytes(config.n_devices)
        return config.device_budget_bytes or own_bytes

    store = Store(budget=limit_bytes, is_mapped=False, is_cpu_only=config.is_cpu_only)
    try:
        with store.acquire([context.ref]) as (value,):
            attendant = store.attendant(context.ref.digest)
            size_bytes = store.size_bytes(context.ref.digest)
            if func is not None:
                served = value if attendant is None else getattr(attendant, "live", value)
                sweep, unit = _batches(func, frame, served), "rows"
            else:
                sweep, unit = _requests(value, attendant, prompt_tokens, new_tokens), "requests"
            points = tuple(_until_flat(sweep, on_point))
            return Profile(
                context.ref.name, unit, _device_of(value), points, size_bytes, limit_bytes()
            )
    finally:
        store.close()


def _until_flat(sweep: Iterator[Point], on_point: Callable[[Point], None]) -> Iterator[Point]:
    """Points, until the rate grows no more."""
    most, n_flat = 0.0, 0
    for point in sweep:
        on_point(point)
        yield point
        n_flat = 0 if point.rate > _GAIN * most else n_flat + 1
        most = max(most, point.rate)
        if n_flat >= _N_FLAT:
            return


def _batches(func: Callable[..., Any], frame: pd.DataFrame | None, value: Any) -> Iterator[Point]:
    """Batches of 1, 2, 4 … rows, and of all."""
    if frame is None or not len(frame):
        raise PromptError("A function is measured on rows: pass a frame that has some.")
    sizes = [1 << k for k in range(len(frame).bit_length()) if 1 << k < len(frame)]
    try:
        found = func(frame.iloc[:1], value)  # what is made at the first call
    except Exception as error:
        if is_out_of_memory(error):
            raise PromptError(f"There is no memory for one row: {error}") from error
        raise
    if not isinstance(found, pd.DataFrame):
        raise PromptError(
            f"The function returned {type(found).__name__} for the first row; expected a DataFrame"
            " of results, as from a function for map_partitions."
        )
    for n in (*sizes, len(frame)):
        batch = frame.iloc[:n]
        seconds: list[float] = []
        try:
            with _peak() as peak:
                until = time.perf_counter() + _LEAST_S
                while len(seconds) < _N_REPEATS or time.perf_counter() < until:
                    begun = time.perf_counter()
                    func(batch, value)
                    seconds.append(time.perf_counter() - begun)
        except Exception as error:
            if n == 1 or not is_out_of_memory(error):
                error.add_note(f"This was a batch of {n} rows.")
                raise
            logger.warning("There is no memory for %s rows at a time: %s", n, error)
            return
        yield Point(n, n / max(statistics.median(seconds), 1e-9), peak())


def _requests(live: Any, attendant: Any, n_prompt: int, n_new: int) -> Iterator[Point]:
    """1, 2, 4 … requests at a time; as soon as one is answered, the next one comes."""
    if not isinstance(live, LanguageModel) or not isinstance(attendant, Serving):
        raise PromptError(
            f"A {type(live).__name__} is measured by a function of it: pass func and a frame"
            " (--function and --input)."
        )
    if not live.padded.is_causal:
        raise PromptError(
            "An encoder is measured by a function of it: pass func and a frame (--function and"
            " --input)."
        )
    if live.max_tokens is not None and n_prompt + n_new > live.max_tokens:
        raise PromptError(
            f"{n_prompt} + {n_new} tokens are more than the model takes, {live.max_tokens}."
        )
    rng = random.Random(0)
    _play(attendant, live, rng, 1, 1, n_prompt, n_new)  # what is made at the first forward
    n = 1
    while n <= _MOST:
        with _peak() as peak:
            found, needed_bytes = _play(attendant, live, rng, n, _N_ROUNDS * n, n_prompt, n_new)
        seconds = max(one.tokens_at[-1] for one in found) - min(one.begun for one in found)
        firsts = [one.tokens_at[0] - one.begun for one in found]
        gaps = [
            b - a for one in found for a, b in zip(one.tokens_at, one.tokens_at[1:], strict=False)
        ]
        between_s = _p99(gaps) if gaps else 0.0
        yield Point(n, len(found) / seconds, peak(), needed_bytes, _p99(firsts), between_s)
        n *= 2


class _Timed:
    """When a request was made and had its tokens."""

    def __init__(self) -> None:
        self.begun = time.perf_counter()
        self.tokens_at: list[float] = []

    def note(self, _: int) -> None:
        self.tokens_at.append(time.perf_counter())


def _play(
    serving: Serving,
    live: LanguageModel,
    rng: random.Random,
    n_open: int,
    n_all: int,
    n_prompt: int,
    n_new: int,
) -> tuple[list[_Timed], int]:
    """Answer requests, some at a time; and the most bytes that they took beside the engine's."""
    places, found, needed = threading.Semaphore(n_open), [], [0]
    futures = []
    for _ in range(n_all):
        while not places.acquire(timeout=_LOOK_S):
            needed.append(serving.needed_bytes())
        tokens = [rng.randrange(live.padded.n_embeddings) for _ in range(n_prompt)]
        found.append(_Timed())
        row = Generated(
            tokens,
            lambda _: None,
            n_prompt=n_prompt,
            n_max=n_new,
            owner=Owner(Kind.QUESTION, "profile"),
            on_token=found[-1].note,
        )
        futures.append(serving.ask(row))
        futures[-1].add_done_callback(lambda _: places.release())
    for future in futures:
        (answer,) = future.result()
        if isinstance(answer, RowError):
            raise PromptError(f"A request could not be answered: {answer}")
    return found, max(needed)


@contextmanager
def _peak() -> Iterator[Callable[[], int]]:
    """Yields what tells the memory that the block has taken at its peak; call it afterwards."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        yield lambda: int(torch.cuda.max_memory_allocated())
        return
    process, is_over = psutil.Process(), threading.Event()
    begun = process.memory_info().rss
    seen = [0]

    def look() -> None:
        while not is_over.wait(_LOOK_S):
            seen.append(process.memory_info().rss - begun)

    thread = threading.Thread(target=look, name="pcm-peak", daemon=True)
    thread.start()
    try:
        yield lambda: max(seen)
    finally:
        is_over.set()
        thread.join()


def _p99(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]


def _device_of(value: Any) -> str:
    facts = getattr(value, "facts", None)
    if isinstance(facts, dict) and "device" in facts:
        return str(facts["device"])
    torch = sys.modules.get("torch")
    is_cuda = torch is not None and torch.cuda.is_available()
    return str(torch.cuda.get_device_name()) if torch is not None and is_cuda else "cpu"
