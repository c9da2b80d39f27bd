"""The command line: options, commands, launching and reports at a terminal.

No rule of the migration belongs here.
"""
