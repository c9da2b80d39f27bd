"""PostgreSQL as such: sessions and what is set in them, short-lock DDL, the wire format, client programs.

Nothing here knows encryption.
"""
