"""Faults on request while a rehearsal encrypts, and the processes they end.

Measuring them belongs to the stages.
"""
