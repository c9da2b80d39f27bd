"""A user's table as it is: definition, dependants, indexes, views; not what may be done to it."""
