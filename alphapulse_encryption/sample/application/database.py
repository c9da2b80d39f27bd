"""The application's sessions."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

from sqlalchemy import Engine, create_engine, make_url, text
from sqlalchemy.orm import Session

from alphapulse_encryption import settings
from alphapulse_encryption.orm import check_phases
from alphapulse_encryption.sample.key import read_sample_key
from alphapulse_encryption.sample.postgres import SAMPLE_DATABASE, embedded_url

_MASTER_KEY = "ALPHAPULSE_ENCRYPTION_MASTER_KEY"


class TextSession(Session):
    """A session that also takes SQL as a plain string, as SQLAlchemy 1 did and the guide's scripts do."""

    def execute(self, statement: Any, *arguments: Any, **options: Any) -> Any:
        if isinstance(statement, str):
            statement = text(statement)
        return super().execute(statement, *arguments, **options)


@cache
def get_engine() -> Engine:
    """The engine of this process, on `ALPHAPULSE_DATABASE_URL` or the embedded sample database.

    Raises:
        ConfigurationError: the phase of this instance is not one that the database is ready for.
    """
    url = settings.TargetVariables().database_url
    if url is None:
        # The sample's own key, for the sample alone.
        key = read_sample_key()
        if key is not None:
            os.environ.setdefault(_MASTER_KEY, key)
        url = embedded_url(SAMPLE_DATABASE)
    engine = create_engine(
        make_url(url).set(drivername="postgresql+psycopg"),
        # Values never show up in errors.
        hide_parameters=True,
        pool_pre_ping=True,
    )
    check_phases(engine)
    return engine


def get_db_session() -> TextSession:
    """A new session; close it, or use it in a `with` block."""
    return TextSession(get_engine())
