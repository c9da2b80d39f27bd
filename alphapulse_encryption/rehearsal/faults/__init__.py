"""Faults on request while a rehearsal encrypts, and the processes they end; not what they cost."""
