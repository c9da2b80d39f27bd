"""The sample database and the embedded PostgreSQL that serves it; nothing that production needs."""
