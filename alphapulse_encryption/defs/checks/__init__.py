"""Asset checks: what the UI shows red or green beside an asset, evaluated from the database's own bookkeeping.

Belongs here: which checks there are, and what passes. Does not belong here: how values are compared (``migration``).
"""
