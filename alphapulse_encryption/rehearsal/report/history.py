"""The history of rehearsals, kept by Dagster itself: a materialization of an asset that nobody can materialize.

Its numbers are plotted there; the whole of the measurements is in its metadata as JSON.
"""

from __future__ import annotations

from collections.abc import Mapping

import dagster as dg
from pydantic import ValidationError

from alphapulse_encryption.defs.resources.border import MetadataEntry
from alphapulse_encryption.rehearsal.measures import Rehearsal

ASSET_KEY = dg.AssetKey("staging_rehearsal")
GROUP = "rehearsal"
# More are not compared.
REMEMBERED = 50
_MEASURES = "measurements"


def build_asset() -> dg.AssetSpec:
    """The external asset ``staging_rehearsal``."""
    return dg.AssetSpec(
        key=ASSET_KEY,
        group_name=GROUP,
        description="**Test in staging.** Every rehearsal of the migration on a clone of the staging database, with "
        "what it measured. Reported by the job `staging_rehearsal`, which its schedule starts; it cannot be "
        "materialized from here, and says nothing of the target database.",
    )


def keep(context: dg.OpExecutionContext, rehearsal: Rehearsal, metadata: Mapping[str, MetadataEntry]) -> None:
    """Add a rehearsal."""
    context.log_event(
        dg.AssetMaterialization(
            asset_key=ASSET_KEY,
            description=rehearsal.failure or None,
            metadata={**metadata, _MEASURES: dg.MetadataValue.json(rehearsal.model_dump(mode="json"))},
        )
    )


def read(instance: dg.DagsterInstance, limit: int = REMEMBERED) -> tuple[Rehearsal, ...]:
    """The latest rehearsals, the oldest of them first; those of another version's form are left out."""
    found = []
    for record in instance.fetch_materializations(ASSET_KEY, limit=limit).records:
        materialization = record.asset_materialization
        kept = materialization.metadata.get(_MEASURES) if materialization is not None else None
        if not isinstance(kept, dg.JsonMetadataValue):
            continue
        try:
            found.append(Rehearsal.model_validate(kept.data))
        except ValidationError:
            continue
    return tuple(reversed(found))
