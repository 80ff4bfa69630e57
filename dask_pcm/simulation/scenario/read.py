"""``read_scenario``: read a user's YAML file, or a scenario shipped with the package."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dask_pcm.errors import ScenarioError
from dask_pcm.simulation.scenario.nodes import (
    Field,
    Problems,
    Reader,
    count,
    flag,
    gathered,
    keys,
    listed,
    mapped,
    needed,
    number,
    one_of,
    optional,
    problem,
    record,
    size,
    text,
)
from dask_pcm.simulation.scenario.scenario import (
    Baselines,
    Broken,
    ByDevice,
    ContextSpec,
    File,
    Overheads,
    Pool,
    RunSpec,
    Scenario,
)
from dask_pcm.simulation.serving.spec import Serving, is_serving, read_serving

_SHIPPED = Path(__file__).parents[1] / "scenarios"
_SECONDS = number()
_POSITIVE = number(is_open=True)

_OVERHEADS = {
    "unit_s": Field(_SECONDS, 0.03),
    "call_s": Field(_SECONDS, 0.0),
    "message_s": Field(_SECONDS, 0.002),
    "decide_every_s": Field(_SECONDS, 0.01),
    "is_journalled": Field(flag, True),
}
_BASELINES = {
    "manager_bandwidth": Field(size, 380_000_000),
    "n_from_each": Field(count(), 3),
    "slow_share": Field(number(most=1.0), 0.0),
    "slow_bandwidth": Field(size, 15_000_000),
    "task_s": Field(_SECONDS, 0.095),
    "dispatches_per_s": Field(_POSITIVE, 164.0),
    "retry_s": Field(_POSITIVE, 15.0),
    "n_retries": Field(count(), 15),
}
_RUN = {
    "rows": needed(count()),
    "batch_rows": Field(count(), 1),
    "task_rows": Field(count(), 100),
    "priority": Field(number(float("-inf")), 0.0),
    "starts_s": Field(_SECONDS, 0.0),
    "is_run": Field(flag, True),
}
_BROKEN = record(
    {"n_workers": needed(count()), "fails_after_s": Field(optional(_SECONDS), None)}, "broken"
)


def shipped() -> list[str]:
    """Names of the scenarios shipped with the package."""
    return sorted(path.stem for path in _SHIPPED.glob("*.yaml"))


def read_scenario(name: str) -> Scenario:
    """Read a scenario of a cluster by the path of a YAML file, or by the name of a shipped one.

    Raises
    ------
    ScenarioError
        With the line and the reason of every mistake in the file.
    """
    found = read_any(name)
    if not isinstance(found, Scenario):
        raise ScenarioError(f"Scenario {name!r} is of a serving device, not of a cluster.")
    return found


def read_any(name: str) -> Scenario | Serving:
    """As ``read_scenario``, or of a device that answers requests: one with ``serving``."""
    path = Path(name)
    if name in shipped():
        path = _SHIPPED / f"{name}.yaml"
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        known = ", ".join(shipped())
        raise ScenarioError(
            f"Scenario {name!r} cannot be read: {error}. Give a YAML file, or one of: {known}."
        ) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        reason = getattr(error, "problem", None) or str(error)
        raise ScenarioError(f"{name}, line {line}: no YAML: {reason}.") from error
    try:
        if root is None:
            raise Problems([(1, "nothing is in it")])
        return read_serving(root, path.stem) if is_serving(root) else _scenario(root, path.stem)
    except Problems as problems:
        lines = (f"{name}, line {line}: {reason}." for line, reason in sorted(problems.found))
        raise ScenarioError("\n".join(lines)) from None


def _scenario(root: yaml.Node, name: str) -> Scenario:
    def anything(node: yaml.Node) -> yaml.Node:
        return node

    sections = record(
        {
            "title": Field(text, name),
            "store_bandwidth": needed(size),
            "devices": needed(mapped(text, optional(size))),
            "contexts": needed(anything),
            "pools": needed(anything),
            "runs": needed(anything),
            "overheads": Field(record(_OVERHEADS, "overheads"), {}),
            "baselines": Field(record(_BASELINES, "baselines"), {}),
            "until_s": Field(_POSITIVE, 1e6),
            "sweep_task_rows": Field(listed(count()), ()),
        },
        "a scenario",
    )(root)
    devices = sections["devices"]
    readers: list[tuple[yaml.Node, Reader[Any]]] = [
        (sections["contexts"], _contexts(devices)),
        (sections["pools"], _pools(devices)),
    ]
    readers.append((sections["runs"], _runs(keys(sections["contexts"]))))
    contexts, pools, runs = gathered(readers)
    overheads = {key: field.default for key, field in _OVERHEADS.items()} | sections["overheads"]
    baselines = {key: field.default for key, field in _BASELINES.items()} | sections["baselines"]
    bandwidths = {
        "manager_bytes_s": baselines.pop("manager_bandwidth"),
        "slow_bytes_s": baselines.pop("slow_bandwidth"),
    }
    return Scenario(
        name,
        sections["title"],
        sections["store_bandwidth"],
        devices,
        contexts,
        pools,
        runs,
        Overheads(**overheads),
        Baselines(**bandwidths, **baselines),
        sections["until_s"],
        sections["sweep_task_rows"],
    )


def _by_device(devices: Mapping[str, Any], read: Reader[float]) -> Reader[ByDevice]:
    """Read one number for all device models, or one per model."""

    def read_each(node: yaml.Node) -> ByDevice:
        if isinstance(node, yaml.ScalarNode):
            return dict.fromkeys(devices, read(node))
        values = mapped(one_of(list(devices), "device"), read)(node)
        if missing := [device for device in devices if device not in values]:
            raise problem(node, f"nothing is said of {', '.join(missing)}")
        return values

    return read_each


def _contexts(devices: Mapping[str, Any]) -> Reader[dict[str, ContextSpec]]:
    seconds = _by_device(devices, _SECONDS)
    nothing = dict.fromkeys(devices, 0.0)
    file = record({"bytes": needed(size), "unpack_s": Field(seconds, nothing)}, "a file")
    read_all = mapped(
        text,
        record(
            {
                "files": Field(listed(file), ()),
                "load_s": needed(seconds),
                "row_s": needed(_by_device(devices, _POSITIVE)),
                "restore_s": Field(_SECONDS, 1.0),
                "device_bytes": Field(size, 0),
            },
            "a context",
        ),
    )

    def read(node: yaml.Node) -> dict[str, ContextSpec]:
        found = {}
        for name, values in read_all(node).items():
            files = tuple(File(f["bytes"], f["unpack_s"]) for f in values.pop("files"))
            found[name] = ContextSpec(name, files, **values)
        return found

    return read


@dataclass(frozen=True, slots=True)
class _Joins:
    at_s: tuple[float, ...] | None
    within_s: tuple[float, float] | None = None


def _joins(node: yaml.Node) -> _Joins:
    """Read join times: one for all workers, a list, or an interval."""
    if isinstance(node, yaml.ScalarNode):
        return _Joins((_SECONDS(node),))
    if isinstance(node, yaml.SequenceNode):
        return _Joins(listed(_SECONDS)(node))
    ends = record({"from": Field(_SECONDS, 0.0), "to": needed(_SECONDS)}, "joins")(node)
    if ends["to"] < ends["from"]:
        raise problem(node, f"joins end at {ends['to']:g}, before they begin")
    return _Joins(None, (ends["from"], ends["to"]))


def _links(node: yaml.Node) -> tuple[tuple[float, float], ...]:
    """Read a bandwidth, or the share of workers with each bandwidth."""
    if isinstance(node, yaml.ScalarNode):
        return ((float(size(node)), 1.0),)
    shares = mapped(size, number(most=1.0))(node)
    if abs(sum(shares.values()) - 1.0) > 1e-9:
        raise problem(node, f"shares must be 1 in all; they are {sum(shares.values()):g}")
    return tuple((float(bytes_s), share) for bytes_s, share in shares.items())


def _pools(devices: Mapping[str, Any]) -> Reader[tuple[Pool, ...]]:
    read_values = record(
        {
            "device": needed(one_of(list(devices), "device")),
            "n_workers": Field(count(), None),
            "joins_s": Field(_joins, _Joins((0.0,))),
            "row_spread": Field(_SECONDS, 0.0),
            "link": needed(_links),
            "life_s": Field(optional(_POSITIVE), None),
            "lost_s": Field(listed(optional(_SECONDS)), ()),
            "walltime_s": Field(optional(_POSITIVE), None),
            "notice_s": Field(optional(_SECONDS), None),
            "rejoins_after_s": Field(optional(_SECONDS), None),
            "broken": Field(_BROKEN, None),
        },
        "a pool",
    )

    def read_pool(node: yaml.Node) -> dict[str, Any]:
        values = read_values(node)
        joins = values.pop("joins_s")
        n_listed = 1 if joins.at_s is None else len(joins.at_s)
        n_workers = values["n_workers"] = values["n_workers"] or n_listed
        if joins.at_s is not None and n_listed not in (1, n_workers):
            raise problem(node, f"{n_workers} workers, but {n_listed} times in joins_s")
        if len(values["lost_s"]) not in (0, n_workers):
            n_lost = len(values["lost_s"])
            raise problem(node, f"{n_workers} workers, but {n_lost} times in lost_s")
        at_s = joins.at_s * n_workers if joins.at_s and n_listed == 1 else joins.at_s
        if values["broken"] is not None:
            values["broken"] = Broken(**values["broken"])
            if values["broken"].n_workers > n_workers:
                raise problem(node, f"more broken workers than the {n_workers} that there are")
        links = values.pop("link")
        return {**values, "link_bytes_s": links, "joins_s": at_s, "joins_within_s": joins.within_s}

    def read(node: yaml.Node) -> tuple[Pool, ...]:
        found = mapped(text, read_pool)(node)
        if not found:
            raise problem(node, "there are no pools")
        return tuple(Pool(name, **values) for name, values in found.items())

    return read


def _runs(contexts: list[str]) -> Reader[tuple[RunSpec, ...]]:
    named = {"contexts": needed(listed(one_of(contexts, "context")))}
    read_run = record({**_RUN, **named}, "a run")

    def read_named(node: yaml.Node) -> dict[str, Any]:
        values = read_run(node)
        if not values["contexts"]:
            raise problem(node, "a run needs a context")
        return values

    def read(node: yaml.Node) -> tuple[RunSpec, ...]:
        found = mapped(text, read_named)(node)
        if not found:
            raise problem(node, "there are no runs")
        return tuple(
            RunSpec(name, n_rows=values.pop("rows"), **values) for name, values in found.items()
        )

    return read
