"""What every step works on, as one argument. What is particular to a step (a table, a range) does not belong here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

from alphapulse_encryption.catalogue import Catalogue
from alphapulse_encryption.crypto.envelope import EnvelopeFormat, get_format
from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.migration.postgres.database import Actor, Database


@dataclass(frozen=True)
class Target:
    """A database, what is sensitive in it, how that is encrypted, and who asks for it.

    Args:
        cipher: the catalogue's envelope format, with these keys.
        keys: of every version that values may have; held against those that the database was begun with.
        actor: whom the audit log names.
        writer: the same database, as the log-in that reads and writes rows alone; None where there is none.
    """

    database: Database
    catalogue: Catalogue
    cipher: EnvelopeFormat = field(repr=False)
    keys: KeyRing = field(repr=False)
    actor: Actor
    writer: Database | None = None

    @classmethod
    def of(cls, database: Database, catalogue: Catalogue, keys: KeyRing, actor: Actor) -> Self:
        """The target with the envelope format that its catalogue names."""
        return cls(database, catalogue, get_format(catalogue.format, keys), keys, actor)

    @property
    def data_path(self) -> Database:
        """As whom rows are read and written, and their progress is kept."""
        return self.writer or self.database
