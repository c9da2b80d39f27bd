"""The application's load while a stage is at work: who runs meanwhile, and what of it was measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.rehearsal.clone.target import RehearsalTarget
from alphapulse_encryption.rehearsal.config import RehearsalConfig
from alphapulse_encryption.rehearsal.measures import Latency, Traffic, added
from alphapulse_encryption.rehearsal.traffic.traffic import traffic

# Seeds of one rehearsal are apart from those of the next one's.
_MOST_DEPLOYMENTS, _MOST_SALTS = 10, 1_000_000


@dataclass
class Load:
    """What was measured, in the order of the deployments.

    Args:
        traffic: of each deployment that had some.
        salt: another one for each attempt at each stage: with the same choices, a later one would insert values that an
            earlier one has inserted already.
    """

    traffic: list[Traffic] = field(default_factory=list)
    salt: int = 0


def has_traffic(config: RehearsalConfig) -> bool:
    """Whether anybody asks for anything during the rehearsal."""
    return config.traffic.rate > 0


@contextmanager
def under_load(
    load: Load, clone: Database, target: RehearsalTarget, phases: Sequence[str], config: RehearsalConfig
) -> Iterator[None]:
    """The application in these phases, for the length of the block.

    Args:
        load: where the measurements go when the block ends well.
        phases: side by side; none: nobody asks for anything.

    Raises:
        MigrationError: the traffic does not work, or the block failed.
    """
    seed = config.traffic.seed * _MOST_SALTS + load.salt * _MOST_DEPLOYMENTS + len(load.traffic)
    requests = config.traffic.model_copy(update={"seed": seed})
    with traffic(clone.conninfo, target.catalogue, phases, requests, target.environment) as running:
        yield
    measured = running.measured()
    if measured is not None:
        load.traffic.append(measured)


def together(parts: Sequence[Traffic]) -> Traffic | None:
    """The traffic of a stage with several deployments.

    Requests, errors and lock waits add up. Percentiles of samples that are gone cannot be put together: the worst
    deployment's stands for the stage's.
    """
    if len(parts) < 2:
        return parts[0] if parts else None
    kinds: dict[tuple[str, str], list[Latency]] = {}
    for latency in (latency for part in parts for latency in part.by_kind):
        kinds.setdefault((latency.kind, latency.way), []).append(latency)
    return Traffic(
        phases=tuple(dict.fromkeys(phase for part in parts for phase in part.phases)),
        overall=_worst([part.overall for part in parts]),
        by_kind=tuple(_worst(latencies) for latencies in kinds.values()),
        moments=tuple(moment for part in parts for moment in part.moments),
        lock_waits=added(part.lock_waits for part in parts),
        longest_lock_wait=max(part.longest_lock_wait for part in parts),
        error_kinds=added(part.error_kinds for part in parts),
        retried=sum(part.retried for part in parts),
        left_out=tuple(dict.fromkeys(note for part in parts for note in part.left_out)),
    )


def _worst(parts: Sequence[Latency]) -> Latency:
    counted, timed = ("requests", "errors", "wrong_answers"), ("p50", "p95", "p99", "longest")
    figures = {name: sum(getattr(part, name) for part in parts) for name in counted}
    figures |= {name: max(getattr(part, name) for part in parts) for name in timed}
    return parts[0].model_copy(update=figures)
