"""The database a run migrates, its catalogue and its keys, found anew in each run and never in its config."""

from __future__ import annotations

from functools import cached_property

import dagster as dg

from alphapulse_encryption import settings
from alphapulse_encryption.catalogue import Catalogue, load_catalogue
from alphapulse_encryption.crypto.envelope import EnvelopeFormat, get_format
from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.defs.resources.environment import (
    key_environment,
    target_database,
    uses_sample,
    writer_database,
)
from alphapulse_encryption.keysources import load_key_ring
from alphapulse_encryption.migration.bookkeeping.keys import check_key
from alphapulse_encryption.migration.gates.approvals import TwoPersonRule
from alphapulse_encryption.migration.postgres.database import Actor, Database
from alphapulse_encryption.migration.target import Target


def default_rule() -> TwoPersonRule:
    """The two-person rule where the settings have none: the sample is for one person to walk through."""
    return "off" if uses_sample() else "roles"


class TargetResource(dg.ConfigurableResource):  # type: ignore[type-arg]
    """The target database with its catalogue and keys. Has no configuration: the environment decides."""

    @property
    def database(self) -> Database:
        return target_database()

    @property
    def writer(self) -> Database | None:
        """The database, as the log-in of the data path."""
        return writer_database()

    @property
    def catalogue(self) -> Catalogue:
        return load_catalogue(settings.TargetVariables().catalogue_path)

    @property
    def batch_ranges(self) -> int:
        return settings.TargetVariables().batch_ranges

    @cached_property
    def key_ring(self) -> KeyRing:
        """The key ring, read once per run: deriving a key takes milliseconds."""
        return load_key_ring(key_environment())

    def refuse_another_key(self) -> None:
        """For steps that use no key themselves, and change a database that only the right one may change."""
        with self.database.session("check the master key") as connection:
            check_key(connection, self.key_ring)

    def by(self, actor: Actor) -> Target:
        """What the engine works on, for this actor."""
        return Target(self.database, self.catalogue, self.cipher, self.key_ring, actor, self.writer)

    @cached_property
    def cipher(self) -> EnvelopeFormat:
        return get_format(self.catalogue.format, self.key_ring)
