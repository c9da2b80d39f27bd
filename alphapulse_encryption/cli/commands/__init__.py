"""Commands that need no run of a step, and the options of all; not the steps, and not what a report says."""
