"""The application's load while a stage is at work: who runs meanwhile, and what of it was measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.rehearsal.clone.target import RehearsalTarget
from alphapulse_encryption.rehearsal.config import RehearsalConfig
from alphapulse_encryption.rehearsal.measures import Latency, Moment, Traffic
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
        clone: whom it talks to.
        target: its catalogue and keys.
        phases: side by side; none: nobody asks for anything.
        config: the rehearsal's.

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
    for part in parts:
        for latency in part.by_kind:
            kinds.setdefault((latency.kind, latency.way), []).append(latency)
    moments: list[Moment] = [moment for part in parts for moment in part.moments]
    return Traffic(
        phases=tuple(dict.fromkeys(phase for part in parts for phase in part.phases)),
        overall=_worst([part.overall for part in parts]),
        by_kind=tuple(_worst(latencies) for latencies in kinds.values()),
        moments=tuple(moments),
        lock_waits=_added([part.lock_waits for part in parts]),
        longest_lock_wait=max(part.longest_lock_wait for part in parts),
        error_kinds=_added([part.error_kinds for part in parts]),
        retried=sum(part.retried for part in parts),
        left_out=tuple(dict.fromkeys(note for part in parts for note in part.left_out)),
    )


def _worst(parts: Sequence[Latency]) -> Latency:
    return Latency(
        kind=parts[0].kind,
        way=parts[0].way,
        requests=sum(part.requests for part in parts),
        errors=sum(part.errors for part in parts),
        wrong_answers=sum(part.wrong_answers for part in parts),
        p50=max(part.p50 for part in parts),
        p95=max(part.p95 for part in parts),
        p99=max(part.p99 for part in parts),
        longest=max(part.longest for part in parts),
    )


def _added(parts: Sequence[dict[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for part in parts:
        for name, number in part.items():
            total[name] = total.get(name, 0) + number
    return total
