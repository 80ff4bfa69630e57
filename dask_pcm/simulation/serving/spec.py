"""What is simulated of a device that answers requests, and how it is read from YAML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from dask_pcm.simulation.scenario.nodes import (
    Field,
    Reader,
    count,
    listed,
    needed,
    number,
    optional,
    problem,
    record,
    size,
    text,
)

_POSITIVE = number(is_open=True)
#: Requests of a rate that are simulated in seconds.
_MOST_REQUESTS = 10_000


@dataclass(frozen=True, slots=True)
class Link:
    """Where memory off the device is, as fast as its copies are.

    Attributes
    ----------
    bytes_s
        Bytes per second, each way.
    call_s
        Seconds that a copy takes to begin.
    """

    bytes_s: float
    call_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Burst:
    """Short requests that come at once.

    Attributes
    ----------
    at_s
        When.
    n_requests
        How many.
    prompt, output
        Their tokens: least and most.
    """

    at_s: float
    n_requests: int
    prompt: tuple[int, int]
    output: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Serving:
    """A device and the requests to it.

    Attributes
    ----------
    memory_bytes, token_bytes
        What the device has for keys and values, and what these take for each token.
    step_s, token_s
        A step of the model takes the first, and for each token of it the second as well.
    step_tokens
        Tokens of a step at most.
    slice_tokens
        See ``TimeSlices``.
    host, lent
        Memory of the host, and lent memory of another device.
    prompt, output
        Tokens of a request: least and most.
    seconds
        How long requests come.
    rates
        Requests per second, of which each is simulated.
    burst
        Short requests upon these; None for none.
    long_tokens
        A prompt that exceeds the device's memory, for ``long_prompt_rate``.
    """

    name: str
    title: str
    memory_bytes: int
    token_bytes: int
    step_s: float
    token_s: float
    step_tokens: int
    slice_tokens: int
    host: Link
    lent: Link
    prompt: tuple[int, int]
    output: tuple[int, int]
    seconds: float
    rates: tuple[float, ...]
    burst: Burst | None
    long_tokens: int


def _range(node: yaml.Node) -> tuple[int, int]:
    found = listed(count())(node)
    if len(found) != 2 or found[0] > found[1]:
        raise problem(node, "two numbers of tokens are expected, the least and the most")
    return found[0], found[1]


def _link(node: yaml.Node) -> Link:
    fields = {"bandwidth": needed(size), "call_s": Field(number(), 0.0)}
    found = record(fields, "a link")(node)
    return Link(found["bandwidth"], found["call_s"])


def _burst(node: yaml.Node) -> Burst:
    fields = {
        "at_s": needed(number()),
        "requests": needed(count()),
        "prompt": needed(_range),
        "output": needed(_range),
    }
    found = record(fields, "a burst")(node)
    return Burst(found["at_s"], found["requests"], found["prompt"], found["output"])


def _rates(node: yaml.Node) -> tuple[float, ...]:
    found = listed(_POSITIVE)(node)
    if not found:
        raise problem(node, "at least one rate is expected")
    return found


def read_serving(root: yaml.Node, name: str) -> Serving:
    """Read the scenario of a serving device; raises ``Problems``."""
    links: Reader[Any] = record({"host": needed(_link), "lent": needed(_link)}, "links")
    device: Reader[Any] = record(
        {
            "memory": needed(size),
            "token_bytes": needed(size),
            "step_s": needed(_POSITIVE),
            "token_s": needed(number()),
            "step_tokens": Field(count(), 8192),
            "slice_tokens": Field(count(), 16),
        },
        "a serving device",
    )
    requests: Reader[Any] = record(
        {
            "prompt": needed(_range),
            "output": needed(_range),
            "seconds": needed(_POSITIVE),
            "rates": needed(_rates),
            "burst": Field(optional(_burst), None),
            "long_tokens": needed(count()),
        },
        "requests",
    )
    fields = {
        "title": Field(text, name),
        "serving": needed(device),
        "links": needed(links),
        "requests": needed(requests),
    }
    found = record(fields, "a scenario of serving")(root)
    one, asked = found["serving"], found["requests"]
    burst = asked["burst"]
    longest = asked["prompt"][1] + asked["output"][1]
    if burst is not None:
        longest = max(longest, burst.prompt[1] + burst.output[1])
    if longest * one["token_bytes"] > one["memory"]:
        raise problem(root, f"a request of {longest} tokens exceeds the memory of the device")
    n_requests = max(asked["rates"]) * asked["seconds"] + (0 if burst is None else burst.n_requests)
    if n_requests > _MOST_REQUESTS:
        raise problem(
            root,
            f"{n_requests:,.0f} requests at the highest rate; no more than {_MOST_REQUESTS:,} are"
            " simulated",
        )
    return Serving(
        name,
        found["title"],
        one["memory"],
        one["token_bytes"],
        one["step_s"],
        one["token_s"],
        one["step_tokens"],
        one["slice_tokens"],
        found["links"]["host"],
        found["links"]["lent"],
        asked["prompt"],
        asked["output"],
        asked["seconds"],
        tuple(asked["rates"]),
        asked["burst"],
        asked["long_tokens"],
    )


def is_serving(root: yaml.Node) -> bool:
    """Whether a scenario is of a serving device."""
    pairs: Sequence[Any] = root.value if isinstance(root, yaml.MappingNode) else []
    return any(key.value == "serving" for key, _ in pairs)
