"""Sessions, short-lock DDL, wire format, locks and client programs of PostgreSQL; no word of encryption."""
