"""The command line's options, and the commands that need no run of the guide's steps.

Belongs here: which options there are (``parser``) and which go together (``usage``); the commands, by what they are
about. Each of them takes the options, checked, prints what there is to tell and returns the exit status; one that is
refused raises a ``MigrationError``. Does not belong here: the steps, and what is in a report (``steps``, ``reports``).
"""
