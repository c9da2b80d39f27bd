"""Dagster's own storage: `DAGSTER_POSTGRES_URL`, or the embedded PostgreSQL where that is unset.

`dagster.yaml` names the class. Every process of Dagster builds it anew from that name, so the address is
looked up in each of them and is written down nowhere.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Self

import sqlalchemy
import tenacity
from dagster import BetaWarning, Field
from dagster_postgres import DagsterPostgresStorage
from sqlalchemy.exc import ArgumentError, OperationalError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from alphapulse_encryption import settings
from alphapulse_encryption.defs.dagster_private import ConfigurableClassData
from alphapulse_encryption.errors import ConfigurationError
from alphapulse_encryption.migration.postgres.unreachable import reason
from alphapulse_encryption.sample.postgres import DAGSTER_DATABASE, embedded_url


class AlphaPulseStorage(DagsterPostgresStorage):
    """Runs, events and schedules in PostgreSQL, with a fallback that `dagster.yaml` cannot express.

    A few sessions are kept for the next statement. Dagster opens one for every statement, hundreds in a short run,
    which costs the server more than the statements do. One that is kept is tried before it is used: it may be dead.
    What columns its tables have is kept, too.
    """

    def __init__(
        self,
        postgres_url: str,
        should_autocreate_tables: bool = True,
        inst_data: ConfigurableClassData | None = None,
    ) -> None:
        super().__init__(postgres_url, should_autocreate_tables, inst_data)
        # Whoever opens the instance comes by here. Dagster still marks `python_logs` in dagster.yaml as beta.
        warnings.filterwarnings(
            "ignore", message="Handling yaml-defined logging configuration", category=BetaWarning
        )
        sessions = sqlalchemy.create_engine(
            postgres_url,
            isolation_level="AUTOCOMMIT",
            pool_size=2,
            max_overflow=-1,
            # In seconds: a network may forget one without a word.
            pool_recycle=60,
            pool_pre_ping=True,
            pool_use_lifo=True,
        )
        for storage in (self._run_storage, self._event_log_storage, self._schedule_storage):
            storage._engine = sessions
        # What Dagster asks PostgreSQL's catalogue before every other statement: whether its tables have a column yet.
        for storage, question in (
            (self._run_storage, "has_run_stats_index_cols"),
            (self._run_storage, "has_backfill_id_column"),
            (self._event_log_storage, "has_asset_key_col"),
        ):
            # The method of the object hides the one of its class.
            setattr(storage, question, kept(getattr(storage, question)))
        # The instance that is closed tells the parts, not the whole.
        setattr(self._run_storage, "dispose", sessions.dispose)  # noqa: B010

    @classmethod
    def config_type(cls) -> dict[str, Field]:
        """What `dagster.yaml` may say about it: no address, so that none ends up in an instance reference."""
        return {"should_autocreate_tables": Field(bool, is_required=False, default_value=True)}

    @classmethod
    def from_config_value(
        cls, inst_data: ConfigurableClassData | None, config_value: Mapping[str, Any]
    ) -> Self:
        """Called by Dagster in every process that opens the instance."""
        url = storage_url()
        # Dagster itself would log the driver's message, which quotes host, user and database.
        try:
            connect_once(url)
        except (ArgumentError, ValueError):
            raise ConfigurationError(
                "DAGSTER_POSTGRES_URL is not a usable URL. It looks like "
                "postgresql+psycopg2://user:password@host:5432/database."
            ) from None
        except SQLAlchemyError as error:
            why = reason(str(error))
            raise ConfigurationError(
                f"Dagster's storage cannot be reached ({why.what}). {why.next_for('DAGSTER_POSTGRES_URL')} Where it "
                "is unset, the embedded PostgreSQL is used."
            ) from None
        return cls(url, config_value["should_autocreate_tables"], inst_data)


def kept(ask: Callable[..., bool]) -> Callable[..., bool]:
    """The same question, not asked any more once the answer was yes: a column comes with a newer Dagster, and stays."""
    known: set[tuple[object, ...]] = set()

    def answer(*of: object) -> bool:
        if of not in known and ask(*of):
            known.add(of)
        return of in known

    return answer


def storage_url() -> str:
    """Where Dagster keeps its runs; starts the embedded PostgreSQL if it has to serve them."""
    return settings.Dagster().postgres_url or embedded_url(DAGSTER_DATABASE, driver="postgresql+psycopg2")


@tenacity.retry(
    retry=tenacity.retry_if_exception_type(OperationalError),
    stop=tenacity.stop_after_attempt(4),
    wait=tenacity.wait_exponential(multiplier=0.2, max=2),
    reraise=True,
)
def connect_once(url: str) -> None:
    """Open a session and close it; tries for some seconds."""
    # A server that is just being restarted is back by then.
    sqlalchemy.create_engine(url, poolclass=NullPool, connect_args={"connect_timeout": 10}).connect().close()
