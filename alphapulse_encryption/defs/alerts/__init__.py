"""Telling a person: what is looked for, when it is told, and how it gets there.

Belongs here: sensors, thin, over the looks of :mod:`.migration.drift` and :mod:`.migration.overdue`; what was told
already (``ledger``); and delivery by webhook and e-mail. Does not belong here: what is wrong with a database.
"""
