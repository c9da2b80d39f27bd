"""What a step did, told once: the run's log, the metadata in the UI and the command line show the same."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Generic, TypeVar

import dagster as dg

from alphapulse_encryption.catalogue import Catalogue
from alphapulse_encryption.defs.resources.reporting import MetadataEntry, actor
from alphapulse_encryption.defs.resources.target import TargetResource
from alphapulse_encryption.migration.postgres.database import Actor, Database
from alphapulse_encryption.migration.target import Target

NOTHING = "nothing to do"
# In the metadata: what the command line prints, what it says comes next, and which tables a run has changed.
REPORT, NEXT, TABLES_CHANGED = "report", "next", "tables_changed"


@dataclass(frozen=True)
class Effect:
    """What a step did, to one table or to all.

    Args:
        outcome: in a few words; empty for what only looks.
        entries: of the metadata: counts and names.
        then: what to know or to do next.
    """

    outcome: str = NOTHING
    lines: Sequence[str] = ()
    entries: Mapping[str, MetadataEntry] = field(default_factory=dict)
    then: str = ""

    @property
    def changed(self) -> bool:
        return self.outcome not in ("", NOTHING)

    def metadata(self) -> dict[str, MetadataEntry]:
        """For the UI, and for the command that launched the run."""
        told: dict[str, MetadataEntry] = {
            "outcome": self.outcome,
            REPORT: list(self.lines),
            NEXT: self.then,
        }
        return {**self.entries, **{name: value for name, value in told.items() if value}}


class NoConfig(dg.Config):
    """Nothing to choose."""


Config = TypeVar("Config")


@dataclass(frozen=True)
class On(Generic[Config]):
    """What a step works on in a run of Dagster's: the run, how it was configured, and the target."""

    context: dg.AssetExecutionContext | dg.OpExecutionContext
    config: Config
    resource: TargetResource

    @cached_property
    def actor(self) -> Actor:
        return actor(self.context)

    @cached_property
    def target(self) -> Target:
        """With the keys, which are read now."""
        return self.resource.by(self.actor)

    @property
    def database(self) -> Database:
        return self.resource.database

    @property
    def catalogue(self) -> Catalogue:
        return self.resource.catalogue

    def log(self, line: str) -> None:
        self.context.log.info(line)

    def tell(self, effect: Effect) -> None:
        for line in effect.lines:
            self.log(line)
        if effect.then:
            self.log(effect.then)
