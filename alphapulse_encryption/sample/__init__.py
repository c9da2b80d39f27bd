"""The AlphaPulse sample database, and the embedded PostgreSQL that serves it when no database is given."""
