"""The steps of the guide that change a table, one module each.

A rule that two of them need belongs in a room below.
"""
