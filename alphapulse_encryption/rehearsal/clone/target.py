"""The clone as a target: what the assets' code works on during a rehearsal."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property

from pydantic import Field

from alphapulse_encryption.catalogue import Catalogue
from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.defs.resources.environment import key_environment
from alphapulse_encryption.defs.resources.target import TargetResource
from alphapulse_encryption.keysources import load_key_ring
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.rehearsal.clone.clone import Server, server
from alphapulse_encryption.rehearsal.clone.source import is_sample


class RehearsalTarget(TargetResource):
    """A clone, with the environment's keys and the rehearsed part of the catalogue.

    Args:
        clone: name of the database.
        tables: keys of the rehearsed tables; none: all of them.
    """

    clone: str
    tables: list[str] = Field(default=[])

    @cached_property
    def server(self) -> Server:
        """Where it is."""
        return server()

    @property
    def database(self) -> Database:
        return self.server.clone(self.clone)

    @property
    def catalogue(self) -> Catalogue:
        return rehearsed(super().catalogue, self.tables)

    @property
    def environment(self) -> Mapping[str, str]:
        """The variables that the key source reads; the sample's own key opens nothing but the sample."""
        return key_environment() if is_sample() else os.environ

    @cached_property
    def key_ring(self) -> KeyRing:
        """The key ring, read once by each stage."""
        return load_key_ring(self.environment)


def rehearsed(catalogue: Catalogue, tables: list[str]) -> Catalogue:
    """The part of a catalogue that is rehearsed.

    Raises:
        ConfigurationError: a table is not in it.
    """
    if not tables:
        return catalogue
    entries = tuple(catalogue.table(name) for name in dict.fromkeys(tables))
    return catalogue.model_copy(update={"tables": entries})
