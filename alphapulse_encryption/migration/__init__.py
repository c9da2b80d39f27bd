"""The engine: plans, backfills, verifies, gates and undoes an encryption migration.

What belongs here: everything that speaks SQL to the target database, on psycopg.
What does not: Dagster, key sources, the command line. Callers hand in a
:class:`~alphapulse_encryption.migration.postgres.database.Database`, a catalogue and a cipher.
"""
