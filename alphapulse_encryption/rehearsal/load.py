"""The application's load while a stage is at work: who runs meanwhile, and what of it was measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from alphapulse_encryption.rehearsal.clone.target import RehearsalTarget
from alphapulse_encryption.rehearsal.measures import Latency, Traffic, added
from alphapulse_encryption.rehearsal.traffic.traffic import TrafficConfig, traffic

# Seeds of one rehearsal are apart from those of the next one's.
_MOST_DEPLOYMENTS, _MOST_SALTS = 10, 1_000_000


class Load:
    """The application's load of one stage.

    Args:
        salt: another one for each attempt at each stage: with the same choices, a later one would insert values that an
            earlier one has inserted already.
    """

    def __init__(self, target: RehearsalTarget, config: TrafficConfig, salt: int) -> None:
        self._target = target
        self._config = config
        self._seed = config.seed * _MOST_SALTS + salt * _MOST_DEPLOYMENTS
        self._measured: list[Traffic] = []

    @contextmanager
    def under(self, phases: Sequence[str]) -> Iterator[None]:
        """The application in these phases side by side, for the length of the block; none: nobody asks for anything.

        Raises:
            MigrationError: the traffic does not work, or the block failed.
        """
        requests = self._config.model_copy(update={"seed": self._seed + len(self._measured)})
        target = self._target
        with traffic(
            target.database.conninfo, target.catalogue, phases, requests, target.environment
        ) as running:
            yield
        if running.measured is not None:
            self._measured.append(running.measured)

    def measured(self) -> Traffic | None:
        """The traffic of all deployments.

        Requests, errors and lock waits add up. Percentiles of samples that are gone cannot be put together: the worst
        deployment's stands for the stage's.
        """
        parts = self._measured
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
