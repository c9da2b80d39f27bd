"""``--discover``: the proposed catalogue, on standard output or in a file that is not there yet."""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console

from alphapulse_encryption.cli.reports.terminal import grid
from alphapulse_encryption.errors import ConfigurationError
from alphapulse_encryption.migration.discovery.discover import Discovery, as_yaml


def refuse_existing(path: Path, *, force: bool) -> None:
    """Refuse to write over a file, or where none can be written.

    Raises:
        ConfigurationError: it is there already, or its directory is not.
    """
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigurationError(f"{path} cannot be written: it is a directory, or is in none.")
    if path.exists() and not force:
        raise ConfigurationError(
            f"{path} is there already, and was left alone. Name another file, or add --force to replace it."
        )


def write_catalogue(discovery: Discovery, path: Path, *, force: bool) -> None:
    """Write the proposal as a whole or not at all.

    Raises:
        ConfigurationError: the file is there (now), or cannot be written.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(as_yaml(discovery), encoding="utf-8")
        if force:
            unfinished.replace(path)
        else:
            # Fails where somebody else has made it meanwhile.
            os.link(unfinished, path)
    except FileExistsError:
        refuse_existing(path, force=force)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be written: {error.strerror}.") from None
    finally:
        unfinished.unlink(missing_ok=True)


def show_discovery(discovery: Discovery, out: Console) -> None:
    """What was proposed, in short; the reasons are in the file."""
    shown = grid("column", "type", ">score", "category", "context", "searchable")
    for table, column in discovery.proposed:
        shown.add_row(
            f"{table.schema_name}.{table.name}.{column.name}",
            column.type,
            f"{column.score:.2f}",
            column.category,
            column.context or "",
            "yes" if column.search_index is not None else "",
        )
    out.print(shown)
    for table in discovery.tables:
        if not table.possible:
            out.print(f"! {table.schema_name}.{table.name} is not possible: {'; '.join(table.obstacles)}")
