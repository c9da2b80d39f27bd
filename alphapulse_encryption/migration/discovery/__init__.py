"""Which columns look sensitive, by name and by sampled values.

Nothing here keeps a value.
"""
