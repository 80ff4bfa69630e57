"""A device answers requests, step by step: first come first served, or in fair time slices.

The slices are those of the engine (``inference/engine/timeslice.py``). Each step computes a token
of each request that has its keys and values on the device, and what it has time for of prompts.
What a step moves between the device and other memory is added to it, as if nothing overlapped.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from dask_pcm.inference.engine.timeslice import Kind, Owner, TimeSlices
from dask_pcm.simulation.serving.spec import Link, Serving

#: Arrival order with admission control; slices with pages in the host's memory, or in lent memory.
FIRST_COME, HOST, LENT = "first-come", "slices-host", "slices-lent"
POLICIES = (FIRST_COME, HOST, LENT)
_OWNER = Owner(Kind.QUESTION, "requests")


@dataclass(slots=True, eq=False)
class Request:
    """A request; see ``timeslice.Turns`` for what says whose turn it is.

    Attributes
    ----------
    at_s
        When it comes.
    n_prompt, n_output
        Its tokens.
    n_done
        Tokens of which the keys and values are computed, and of these those that have a copy off
        the device.
    is_here
        Whether they are on the device.
    first_s, end_s
        When it had its first token and its last one.
    """

    at_s: float
    n_prompt: int
    n_output: int
    began_at: int
    is_of_burst: bool = False
    owner: Owner = _OWNER
    n_turns: int = 0
    waits_since: int = 0
    n_done: int = 0
    n_copied: int = 0
    is_here: bool = False
    first_s: float | None = None
    end_s: float | None = None

    @property
    def n_all(self) -> int:
        return self.n_prompt + self.n_output

    def n_next(self, left: int) -> int:
        """Tokens that a step computes of it, of as many that the step has left."""
        return min(max(1, self.n_prompt - self.n_done), left)


@dataclass(frozen=True, slots=True)
class Played:
    """A number of requests per second under a policy.

    Attributes
    ----------
    requests
        All, in the order in which they came.
    end_s
        When the last one was answered.
    moved_s
        Seconds that copies took.
    """

    policy: str
    rate: float
    requests: tuple[Request, ...]
    end_s: float
    moved_s: float

    def first_s(self, share: float, of_burst: bool = False) -> float:
        """Seconds to the first token within which a share of requests had it; nan for none."""
        waits = sorted(
            one.first_s - one.at_s
            for one in self.requests
            if one.first_s is not None and (one.is_of_burst or not of_burst)
        )
        return waits[min(len(waits) - 1, int(share * len(waits)))] if waits else math.nan

    @property
    def tokens_s(self) -> float:
        """Tokens that were generated per second."""
        return sum(one.n_output for one in self.requests) / self.end_s if self.end_s else 0.0


def arrivals(spec: Serving, rate: float, seed: int = 0) -> list[Request]:
    """Requests that come at random, and those of the burst."""
    rng, at_s, found = random.Random(seed), 0.0, []
    while (at_s := at_s + rng.expovariate(rate)) < spec.seconds:
        found.append((at_s, rng.randint(*spec.prompt), rng.randint(*spec.output), False))
    if spec.burst is not None:
        found += [
            (
                spec.burst.at_s,
                rng.randint(*spec.burst.prompt),
                rng.randint(*spec.burst.output),
                True,
            )
            for _ in range(spec.burst.n_requests)
        ]
    return [
        Request(at_s, n_prompt, n_output, k, is_of_burst)
        for k, (at_s, n_prompt, n_output, is_of_burst) in enumerate(sorted(found))
    ]


def play(spec: Serving, policy: str, rate: float, seed: int = 0) -> Played:
    """Answer all requests; the same seed has the same ones come for each policy."""
    requests = arrivals(spec, rate, seed)
    link = spec.lent if policy == LENT else spec.host
    device = _Device(spec, link, policy == FIRST_COME)
    coming = deque(requests)
    while coming or device.open:
        if not device.open:
            device.now = max(device.now, coming[0].at_s)
        while coming and coming[0].at_s <= device.now:
            device.add(coming.popleft())
        device.step()
    return Played(policy, rate, tuple(requests), device.now, device.moved_s)


@dataclass(slots=True)
class _Device:
    """Requests that are not answered, and the time.

    Attributes
    ----------
    moved_s
        Seconds that copies took so far.
    """

    spec: Serving
    link: Link
    is_in_order: bool
    now: float = 0.0
    moved_s: float = 0.0
    open: list[Request] = field(default_factory=list)
    n_steps: int = 0
    slices: TimeSlices = field(init=False)

    def __post_init__(self) -> None:
        self.slices = TimeSlices(self.spec.slice_tokens)

    @property
    def room(self) -> int:
        """Tokens for whose keys and values the device has memory."""
        return self.spec.memory_bytes // self.spec.token_bytes

    def add(self, request: Request) -> None:
        self.slices.begin(request.owner)
        request.waits_since = self.n_steps
        self.open.append(request)

    def step(self) -> None:
        """Compute a step, and tell requests of their tokens."""
        self.n_steps += 1
        chosen = list(self._in_order() if self.is_in_order else self._in_turn())
        moved_s = 0.0 if self.is_in_order else self._move(chosen)
        n_tokens = sum(n for _, n in chosen)
        self.now += self.spec.step_s + self.spec.token_s * n_tokens + moved_s
        self.moved_s += moved_s
        for one, n in chosen:
            self._note(one, n)
        self.open = [one for one in self.open if one.end_s is None]

    def _note(self, one: Request, n: int) -> None:
        one.n_done += n
        one.n_turns += 1
        one.waits_since = self.slices.served_at(one, self.n_steps)
        self.slices.charge(one.owner, 0, n)
        if one.n_done >= one.n_prompt and one.first_s is None:
            one.first_s = self.now
        if one.n_done >= one.n_all - 1:  # the last token is not computed with
            one.end_s = self.now
            self.slices.end(one.owner)

    def _in_order(self) -> Iterator[tuple[Request, int]]:
        """Those that have all the memory that they may need, in the order in which they came."""
        room, left = self.room, self.spec.step_tokens
        for one in self.open:
            room -= one.n_all
            if room < 0 or left <= 0:
                return
            n = one.n_next(left)
            left -= n
            yield one, n

    def _in_turn(self) -> Iterator[tuple[Request, int]]:
        """Those whose turn it is, as far as there is memory."""
        room, left = self.room, self.spec.step_tokens
        for one in sorted(self.open, key=lambda one: self.slices.turn(one, self.n_steps)):
            n = one.n_next(left)
            if left <= 0:
                return
            if one.n_done + n <= room:
                room, left = room - one.n_done - n, left - n
                yield one, n

    def _move(self, chosen: Sequence[tuple[Request, int]]) -> float:
        """Bring those that are chosen to the device, and others away as far as needed; seconds.

        What has a copy already is not copied again.
        """
        chosen_ids = {id(one) for one, _ in chosen}
        room = self.room - sum(one.n_done + n for one, n in chosen)
        others = [one for one in self.open if one.is_here and id(one) not in chosen_ids]
        n_tokens = n_calls = 0
        for one in sorted(others, key=lambda one: self.slices.turn(one, self.n_steps)):
            if one.n_done <= room:
                room -= one.n_done
                continue
            n_tokens, n_calls = n_tokens + one.n_done - one.n_copied, n_calls + 1
            one.is_here, one.n_copied = False, one.n_done
        for one, _ in chosen:
            if not one.is_here and one.n_done:
                n_tokens, n_calls = n_tokens + one.n_done, n_calls + 1
            one.is_here = True
        return n_tokens * self.spec.token_bytes / self.link.bytes_s + n_calls * self.link.call_s


def long_prompt_rate(spec: Serving, link: Link) -> float:
    """Tokens per second after a prompt of which the device holds a part: the rest is streamed.

    Each token reads all keys and values once. Those that are elsewhere come over the link, layer by
    layer, while the device computes.
    """
    rest = max(0, spec.long_tokens * spec.token_bytes - spec.memory_bytes)
    return 1.0 / max(spec.step_s + spec.token_s, rest / link.bytes_s + link.call_s)
