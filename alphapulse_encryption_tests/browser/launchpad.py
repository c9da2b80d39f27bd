"""What is typed into the launchpad, in the words of docs/drop-and-restore.md."""

from __future__ import annotations


def tables(op: str, table: str) -> str:
    """The configuration of a job over tables."""
    return f"ops:\n  {op}:\n    config:\n      tables:\n        - {table}\n"


def drop(table: str, operator: str) -> str:
    """The configuration of ``drop_unencrypted``: who drops is somebody else than who approved."""
    return f"{tables('drop', table)}      operator: {operator}\n"


def erasure(table: str) -> str:
    """The configuration of ``erase_dropped``."""
    return f"ops:\n  erase:\n    config:\n      table: {table}\n      confirmation: {table}\n"


def approval(table: str, confirmation: str) -> str:
    """The configuration of ``approve_drop``."""
    return (
        "ops:\n"
        "  approve:\n"
        "    config:\n"
        f"      table: {table}\n"
        "      approver: Ada Example\n"
        "      reason: it has served for a month\n"
        f'      confirmation: "{confirmation}"\n'
    )
