"""The settings of the policy."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True)
class Rules:
    """What the policy may be told; everything else it learns.

    Attributes
    ----------
    pipeline_s
        Seconds of work assigned to a worker beyond the work that fills its lanes.
    n_load_attempts
        Failed loads of a context, on as many nodes if there are, after which its work fails.
    idle_s
        Seconds unused after which a context is offloaded; None for never.
    """

    pipeline_s: float = 0.05
    n_load_attempts: int = 3
    idle_s: float | None = None

    @classmethod
    def of(cls, settings: object) -> Rules:
        """The rules among `settings`, which have attributes of the same names."""
        return cls(**{field.name: getattr(settings, field.name) for field in fields(cls)})
