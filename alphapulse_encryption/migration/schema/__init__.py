"""A user's table as it is: definition, dependants, indexes, views, the statements on it.

What may be done to it is decided elsewhere.
"""
