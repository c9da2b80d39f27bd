"""The clone as a target: what the assets' code works on during a rehearsal."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

from alphapulse_encryption import secrecy
from alphapulse_encryption.catalogue import Catalogue
from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.defs.resources.environment import key_environment
from alphapulse_encryption.defs.resources.target import TargetResource
from alphapulse_encryption.keysources import load_key_ring
from alphapulse_encryption.migration.postgres import scratch
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.rehearsal.clone.clone import server
from alphapulse_encryption.rehearsal.clone.source import is_sample


class RehearsalTarget(TargetResource):
    """A clone, with the environment's keys and the rehearsed part of the catalogue.

    Raises:
        ConfigurationError: a table is not in the catalogue.
    """

    # Name of the database.
    clone: str
    # By their keys; none: all of them.
    tables: list[str]

    @cached_property
    def server(self) -> Database:
        return server()

    @property
    def database(self) -> Database:
        return scratch.inside(self.server, self.clone)

    @property
    def writer(self) -> None:
        """A clone has no roles of its own."""

    @property
    def catalogue(self) -> Catalogue:
        whole = super().catalogue
        tables = [whole.table(name) for name in dict.fromkeys(self.tables)]
        return whole.model_copy(update={"tables": tuple(tables)}) if tables else whole

    @property
    def environment(self) -> Mapping[str, str]:
        """The variables that the key source reads; the sample's own key opens nothing but the sample."""
        return key_environment() if is_sample() else secrecy.with_keys()

    @cached_property
    def key_ring(self) -> KeyRing:
        return load_key_ring(self.environment)
