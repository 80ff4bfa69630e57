"""A run's time at its output: it takes the output over, drives the work, and leaves."""

from __future__ import annotations

import contextlib
import time
import uuid
from dataclasses import dataclass, replace

from dask.utils import key_split
from distributed import Client

from dask_pcm.config import Config
from dask_pcm.errors import BusyError, FencedError, RunCancelledError, redacted
from dask_pcm.ledger.layout import MANIFEST, REPORT
from dask_pcm.ledger.log import read_lines
from dask_pcm.ledger.output import Output
from dask_pcm.ledger.parts import range_name
from dask_pcm.ledger.stash import drop_stash, stash, unstash
from dask_pcm.ledger.takeover import fence_others, other_runs
from dask_pcm.ledger.writer import whoami
from dask_pcm.plugins.install import install, is_installed
from dask_pcm.runs import identity as manifest
from dask_pcm.runs.driver import Driver
from dask_pcm.runs.gate_link import GateLink
from dask_pcm.runs.identity import Manifest
from dask_pcm.runs.lost import cluster_errors_told
from dask_pcm.runs.plan import Plan
from dask_pcm.runs.progress.failure_limit import FailureLimit
from dask_pcm.runs.progress.heartbeat import Heartbeat
from dask_pcm.runs.progress.progress import CANCELLED, FAILED, FINISHED
from dask_pcm.runs.progress.report import rows_recomputed
from dask_pcm.runs.progress.results import Results
from dask_pcm.runs.progress.state import RunState
from dask_pcm.runs.recover import forget
from dask_pcm.runs.resume import Resumed, resume
from dask_pcm.runs.units.schema import PartSchema
from dask_pcm.runs.units.unit import UnitSpec
from dask_pcm.runs.window import Window, unit_key


@dataclass(frozen=True, slots=True)
class Options:
    """What the user wants of a run, besides the job itself; see ``write_parquet``."""

    overwrite: bool
    extend: bool
    retry_failed: bool
    take_over: bool
    limit: FailureLimit


@dataclass(frozen=True, slots=True)
class _Lease:
    """An output that is this run's to write until `resources` are closed."""

    output: Output
    heartbeat: Heartbeat
    provenance: dict[str, object]
    resources: contextlib.ExitStack


class Session:
    """Takes an output over when made, unless it is another job's or another run writes to it.

    Raises
    ------
    BusyError, OutputError
        No part was changed. What dead runs had left may have been put in order.
    """

    def __init__(
        self, client: Client, plan: Plan, output: Output, mine: Manifest, options: Options
    ) -> None:
        self._client = client
        self._plan = plan
        self._options = options
        self._config = Config.read()
        self._schema = PartSchema.of(plan.meta, plan.reader)
        self._start = time.monotonic()
        counted = "parts" if plan.spans is None else "rows"
        self.state = RunState(output.run, plan.n_rows, counted)
        kind = key_split(unit_key(plan, output.run))
        self._link = GateLink(client, output.run, plan.refs, kind)
        self._lease = self._take_over(output, mine)

    def _take_over(self, output: Output, mine: Manifest) -> _Lease:
        self._refuse_if_busy(output)
        if not other_runs(output):  # else what a dead run stashed is put back first
            self._check(output, mine)
        if not is_installed(self._client):
            install(self._client)
        with contextlib.ExitStack() as stack:  # closes all of it where one step fails
            stack.callback(self._link.close)
            # A resumed job may have nothing left to do, so only a new one warms workers already.
            if not output.storage.exists(MANIFEST):
                self._link.refuse_too_large()
                self._warm()
            fence = output.storage.fence
            with fence.takeover_lock():
                fence_others(output, include_alive=False)  # puts back what dead runs stashed
                self._refuse_if_busy(output)  # again: a run may have begun before we had the lock
                found = self._check(output, mine)
                fence_others(output)
                found = self._unless_restarted(output, found)
                stack.enter_context(fence.open_run(_driver(self._client)))
                if found is None:
                    stack.push(lambda kind, error, trace: self._unstash(output, error))
                    stash(output)
                used = self._write_manifest(output, found, mine)
                output = replace(output, generation=used.recorded["begun"])
                heartbeat = stack.enter_context(Heartbeat(output, lambda: self.state.progress))
            return _Lease(output, heartbeat, _provenance(output, mine), stack.pop_all())

    def _warm(self) -> None:
        """Have workers load the contexts now, while the output is still being listed."""
        if self._plan.n_rows:
            gate = self._link.report(float(self._plan.n_partitions), self._plan.n_partitions)
            if gate is not None:
                self.state.note_gate(gate)

    def _refuse_if_busy(self, output: Output) -> None:
        busy = [writer for writer in other_runs(output) if writer.is_alive]
        if busy and not (self._options.overwrite or self._options.take_over):
            raise BusyError(
                f"Another run is at work on {output.path!r}: {busy[0]}. Wait for it with"
                f" pcm.attach({output.path!r}).wait(), look with dask-pcm status, or fence it"
                " with take_over=True (--take-over)."
            )

    def _check(self, output: Output, mine: Manifest) -> Manifest | None:
        return manifest.check(output, mine, self._options.overwrite, self._options.extend)

    def _unless_restarted(self, output: Output, found: Manifest | None) -> Manifest | None:
        """The manifest to resume from, now that every other run is fenced; None to start anew.

        A run that was about to overwrite the output, and committed nothing, has just had its stash
        put back: then this run starts anew, as that one had.
        """
        if found is None or (now := Manifest.read(output)) is None:
            return None
        return found if now.recorded.get("begun") == found.recorded.get("begun") else None

    def _write_manifest(self, output: Output, found: Manifest | None, mine: Manifest) -> Manifest:
        """Write the manifest if the job or its input is new; count rows in the order it records."""
        plan = self._plan
        used = mine if found is None else found
        plan.arrange(list(used.identity.get("input", {})))
        recorded = {
            **used.recorded,
            "connection_file": _connection_file(self._client),
            "total": plan.n_rows,
            "counted": self.state.counted,
            "committed_by": output.commit_method,
            "begun": uuid.uuid4().hex if found is None else used.recorded.get("begun", ""),
        }
        written = Manifest(used.identity, recorded)
        if found is None or recorded != used.recorded or self._options.extend:
            written.write(output)
        return written

    def _unstash(self, output: Output, error: BaseException | None) -> None:
        """Put back what this run was to overwrite, if it failed before its first commit."""
        if error is not None and not self.state.has_committed:
            unstash(output)

    def drive(self, is_shown: bool) -> None:
        """Do the work, write the report, and leave.

        Raises
        ------
        Exception
            See ``Driver.drive`` and ``resume``.
        """
        report = self.state.report
        with self._lease.resources:
            try:
                with cluster_errors_told(self._client, self._lease.output.path):
                    self._run(is_shown)
                drop_stash(self._lease.output)
            except BaseException as error:
                is_meant = isinstance(error, (RunCancelledError, KeyboardInterrupt))
                report.state = CANCELLED if is_meant else FAILED
                report.error = redacted(f"{type(error).__name__}: {error}")
                with contextlib.suppress(Exception):  # the first error is the one to be told
                    self._write_report()
                raise
            report.state = FINISHED
            self._write_report()

    def _run(self, is_shown: bool) -> None:
        output, plan, config = self._lease.output, self._plan, self._config
        resumed = resume(output, plan, self._schema, config.unit_bytes, self._options.retry_failed)
        resumed.count(self.state.report)
        if resumed.cutter.n_rows:
            self._link.refuse_too_large()
        spec = self._unit_spec(resumed)
        # After `resume`: only then is it known that no part is there.
        if not resumed.inventory:
            _commit_empty(output, plan, spec)
        self.state.report.committed_by = output.commit_method
        self.state.begin(plan.n_rows - resumed.cutter.n_rows)
        driver = Driver(
            plan=plan,
            output=output,
            window=Window(self._client, plan, spec, resumed.cutter, config),
            link=self._link,
            state=self.state,
            results=Results(
                self.state,
                self._options.limit,
                output.path,
                resumed.inventory,
                resumed.n_to_retry,
            ),
            heartbeat=self._lease.heartbeat,
            max_bytes=config.unit_bytes,
        )
        with contextlib.closing(plan):  # releases inputs that Dask computed, however it ends
            driver.drive(is_shown)
        if resumed.costs:
            forget(output)
        lines = read_lines(output)
        self.state.report.rows_recomputed = rows_recomputed(lines, output.run, self._n_rows)

    def _unit_spec(self, resumed: Resumed) -> UnitSpec:
        plan, config = self._plan, self._config
        sizes = (config.unit_bytes, plan.batch_rows) if plan.is_splittable else (0, 0)
        return UnitSpec(
            self._lease.output,
            self._schema,
            self._lease.provenance,
            *sizes,
            costs=resumed.costs,
            timeout_s=plan.timeout_s or config.batch_timeout_s,
        )

    def _n_rows(self, part: str) -> int:
        with contextlib.suppress(FileNotFoundError, FencedError):
            return int(self._lease.output.read_note(part)["rows"])
        return 0

    def _write_report(self) -> None:
        report, output = self.state.report, self._lease.output
        report.total_s = time.monotonic() - self._start
        n_rows = report.rows - report.rows_resumed + report.rows_retried
        report.rows_per_s = n_rows / report.total_s
        output.write_json(REPORT, report.as_dict())
        found = Manifest.read(output)
        if found is not None and report.ran_on:
            ran_on = sorted({*found.recorded.get("ran_on", []), *report.ran_on})
            Manifest(found.identity, {**found.recorded, "ran_on": ran_on}).write(output)


def _provenance(output: Output, mine: Manifest) -> dict[str, object]:
    """What every part says of its origin."""
    about = {k: v for k, v in mine.identity.items() if k not in manifest.UNTOLD}
    own = {"format": manifest.FORMAT, "job": mine.token, "begun": output.generation}
    return {**own, **mine.recorded, **about}


def _commit_empty(output: Output, plan: Plan, spec: UnitSpec) -> None:
    """Commit a part without rows: from now on the folder can be read, with the right columns."""
    own = {"run": output.run, "rows": 0, "failed": 0}
    empty = spec.schema.table(plan.meta)
    output.commit(range_name(0, 0), [empty], lambda: {**spec.provenance, **own})


def _driver(client: Client) -> dict[str, object]:
    """What this run says of its driver, and where others find its cluster."""
    address = None if client.scheduler is None else client.scheduler.address
    return {**whoami(), "scheduler": _connection_file(client) or address}


def _connection_file(client: Client) -> str | None:
    """The file with which others find the cluster of a run, if it is one of pools."""
    known = getattr(client, "connection_file", None)
    return known or getattr(client.cluster, "connection_file", None)
