"""Code that the application's role leaves in its own tables, and what tells who ran it with more rights."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg

from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.conftest import place_for_servers
from alphapulse_encryption_tests.migration.walk import query

ROLE = "planting_app"
_WHATS = (
    "trigger event domain default check generated index policy view table_check table_default table_index"
)
# Run as a superuser it leaves a file and another superuser; as anybody, a used sequence, which no comparison of rows
# sees.
_PAYLOAD = """
CREATE SEQUENCE public.ran_as_superuser;
DO $d$ DECLARE what text; BEGIN
    FOREACH what IN ARRAY string_to_array('{whats}', ' ') LOOP
        EXECUTE format('CREATE SEQUENCE public.ran_%s', what);
    END LOOP;
END $d$;
CREATE FUNCTION public.payload(what text) RETURNS void LANGUAGE plpgsql VOLATILE AS $f$ BEGIN
    BEGIN
        EXECUTE format('COPY (SELECT 1) TO PROGRAM %L', 'touch {marks}/' || what);
    EXCEPTION WHEN OTHERS THEN NULL; END;
    BEGIN
        EXECUTE format('COPY (SELECT 1) TO %L', '{marks}/file_' || what);
    EXCEPTION WHEN OTHERS THEN NULL; END;
    BEGIN EXECUTE 'CREATE ROLE planted_by_' || what || ' SUPERUSER'; EXCEPTION WHEN OTHERS THEN NULL; END;
    BEGIN EXECUTE 'ALTER ROLE planting_app SUPERUSER'; EXCEPTION WHEN OTHERS THEN NULL; END;
    BEGIN EXECUTE 'GRANT pg_execute_server_program TO planting_app'; EXCEPTION WHEN OTHERS THEN NULL; END;
    BEGIN PERFORM nextval('public.ran_' || what); EXCEPTION WHEN OTHERS THEN NULL; END;
    BEGIN
        PERFORM nextval('public.ran_as_superuser') FROM pg_roles WHERE rolname = session_user AND rolsuper;
    EXCEPTION WHEN OTHERS THEN NULL; END;
END $f$;
-- The server believes what a function says of itself.
CREATE FUNCTION public.truly(what text) RETURNS boolean LANGUAGE plpgsql IMMUTABLE AS
    $f$ BEGIN PERFORM public.payload(what); RETURN true; END $f$;
CREATE FUNCTION public.itself(v text, what text) RETURNS text LANGUAGE plpgsql IMMUTABLE AS
    $f$ BEGIN PERFORM public.payload(what); RETURN v; END $f$;
CREATE FUNCTION public.of_trigger() RETURNS trigger LANGUAGE plpgsql AS
    $f$ BEGIN PERFORM public.payload('trigger'); RETURN NEW; END $f$;
CREATE FUNCTION public.of_event() RETURNS event_trigger LANGUAGE plpgsql AS
    $f$ BEGIN IF current_database() <> '{database}' THEN PERFORM public.payload('event'); END IF; END $f$;
CREATE DOMAIN public.planted_text AS text CHECK (public.truly('domain'));
CREATE TABLE public.planted (
    id int PRIMARY KEY, v text DEFAULT public.itself('x', 'default') CHECK (public.truly('check')),
    d public.planted_text,
    g text GENERATED ALWAYS AS (public.itself(v, 'generated')) STORED);
CREATE INDEX ON public.planted (public.itself(v, 'index'));
CREATE TRIGGER planted BEFORE INSERT ON public.planted FOR EACH ROW EXECUTE FUNCTION public.of_trigger();
CREATE POLICY planted ON public.planted USING (public.truly('policy'));
INSERT INTO public.planted (id, v, d) VALUES (1, 'a', 'b');
CREATE MATERIALIZED VIEW public.planted_view AS SELECT public.itself('x', 'view') AS v;
"""
# On a table of the catalogue: what works on its rows runs these.
_ON_TABLE = """
CREATE TRIGGER aaa_planted BEFORE INSERT OR UPDATE OR DELETE ON {table}
    FOR EACH ROW EXECUTE FUNCTION public.of_trigger();
ALTER TABLE {table} ENABLE ALWAYS TRIGGER aaa_planted;
ALTER TABLE {table} ADD CHECK (public.truly('table_check'));
ALTER TABLE {table} ADD COLUMN planted text DEFAULT public.itself('x', 'table_default');
CREATE INDEX planted_on_table ON {table} (public.itself({column}, 'table_index'));
"""
_RAN = "SELECT sequencename FROM pg_sequences WHERE sequencename LIKE 'ran\\_%' AND last_value IS NOT NULL ORDER BY 1"


@dataclass(frozen=True)
class Planted:
    """What was planted, and what came of it."""

    url: str
    marks: Path

    def harm(self) -> tuple[list[str], list[str]]:
        """The files that its code left, and the roles that it has made or raised."""
        roles = query(
            self.url,
            "SELECT rolname FROM pg_roles WHERE rolname LIKE 'planted\\_by\\_%' OR (rolname = 'planting_app' AND "
            "(rolsuper OR pg_has_role(oid, 'pg_execute_server_program', 'MEMBER')))",
        )
        return sorted(path.name for path in self.marks.iterdir()), [name for (name,) in roles]


def ran(url: str) -> set[str]:
    """Which of it ran there, or ``as_superuser``."""
    return {name.removeprefix("ran_") for (name,) in query(url, _RAN)}


@contextlib.contextmanager
def planted(postgres: EmbeddedPostgres, url: str, table: str, column: str) -> Iterator[Planted]:
    """A database whose application has planted all it can; its superuser calls its function in an event trigger."""
    marks = Path(tempfile.mkdtemp(dir=place_for_servers()))
    # The server runs as another user.
    marks.chmod(0o777)
    database = query(url, "SELECT current_database()")[0][0]
    try:
        query(postgres.url("postgres"), f"CREATE ROLE {ROLE} LOGIN")
        query(url, f"ALTER DATABASE {database} OWNER TO {ROLE}")
        query(url, f"GRANT ALL ON SCHEMA public TO {ROLE}")
        query(url, f"ALTER TABLE {table} OWNER TO {ROLE}")
        with psycopg.connect(url.replace("//postgres@", f"//{ROLE}@", 1), autocommit=True) as app:
            app.execute(_PAYLOAD.format(marks=marks, whats=_WHATS, database=database).encode())
            app.execute(_ON_TABLE.format(table=table, column=column).encode())
            for name in ran(url):
                app.execute(f"ALTER SEQUENCE public.ran_{name} RESTART".encode())
        query(url, "CREATE EVENT TRIGGER planted_event ON ddl_command_end EXECUTE FUNCTION public.of_event()")
        found = Planted(url, marks)
        assert (ran(url), found.harm()) == (set(), ([], []))
        yield found
    finally:
        query(url, "DROP EVENT TRIGGER IF EXISTS planted_event")
        query(url, f"ALTER DATABASE {database} OWNER TO postgres")
        query(url, f"REASSIGN OWNED BY {ROLE} TO postgres")
        query(url, f"DROP OWNED BY {ROLE}")
        for (name,) in query(url, "SELECT rolname FROM pg_roles WHERE rolname LIKE 'planted\\_by\\_%'"):
            query(url, f"DROP ROLE {name}")
        query(url, f"DROP ROLE {ROLE}")
        shutil.rmtree(marks)
