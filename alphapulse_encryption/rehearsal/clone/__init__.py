"""The database that a rehearsal works on: where it comes from, what marks it, how it goes.

No stage of the migration belongs here.
"""
