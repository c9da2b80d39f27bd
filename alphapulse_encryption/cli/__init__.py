"""The command line: options, launching, progress and reports at a terminal; no rule of the migration."""
