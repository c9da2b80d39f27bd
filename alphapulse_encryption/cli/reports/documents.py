"""Reports as JSON: one document on standard output, with a version of its own that grows when its members change."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel, TypeAdapter

from alphapulse_encryption.visible import visible_json

Kind = Literal["preflight", "approvals", "settings", "key-usage", "key-versions", "slow-queries"]


def print_document(document: BaseModel) -> None:
    """Print a report that is a model of its own."""
    _print(document.model_dump_json(indent=2))


def print_schema(document: type[BaseModel]) -> None:
    """Print the JSON schema of such a report."""
    sys.stdout.write(json.dumps(document.model_json_schema(mode="serialization"), indent=2) + "\n")


def print_members(kind: Kind, members: Mapping[str, object]) -> None:
    """Print a report that is put together here: dataclasses, models, moments and plain values."""
    document = {"version": 1, "kind": kind, "at": datetime.now(UTC), **members}
    _print(TypeAdapter(dict[str, Any]).dump_json(document, indent=2).decode())


def _print(document: str) -> None:
    sys.stdout.write(visible_json(document) + "\n")
