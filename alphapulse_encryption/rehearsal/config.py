"""The configuration of a rehearsal, as the launchpad shows it."""

from __future__ import annotations

from pydantic import Field

from alphapulse_encryption.bounds import HIGHEST_REST_RATIO
from alphapulse_encryption.defs.resources.workers import PaceConfig, PacingConfig
from alphapulse_encryption.rehearsal.faults.faults import FaultConfig
from alphapulse_encryption.rehearsal.traffic.traffic import TrafficConfig

# So that the application keeps its answers quick on two cores (`make bench-latency`).
REST_RATIO = 2.0


class RehearsalConfig(PacingConfig):
    """What is rehearsed, and how. Addresses and keys are the environment's."""

    tables: list[str] = Field(
        default=[], description="Tables by the names of the catalogue; none: all of them."
    )
    rest_ratio: float = Field(
        default=REST_RATIO,
        ge=0,
        le=HIGHEST_REST_RATIO,
        description="Seconds of rest of the backfill for each second of work, which the application has the machine to "
        "itself. What is predicted is predicted with it: on the day, --set rest_ratio=... to the same.",
    )
    approver: str = Field(
        default="staging rehearsal",
        description="Name for the approval of the drop, in the clone's audit log.",
    )
    observe_seconds: float = Field(
        default=10,
        ge=0,
        le=3600,
        description="How long the application is watched before the first and after the last step, in seconds; not "
        "at all where there is no traffic.",
    )
    production_rows: dict[str, int] = Field(
        default={},
        description="Rows of production by table, for the prediction. Unset: read from the statistics of "
        "ALPHAPULSE_DATABASE_URL, where that is set.",
    )
    production_bytes: dict[str, int] = Field(
        default={},
        description="Bytes of production by table, indexes included; where unset, in the clone's proportion.",
    )
    source_is_not_production: bool = Field(
        default=False,
        description="The staging database is not production, though its name says so, or it is a physical copy.",
    )
    compare_source: bool = Field(
        default=True,
        description="Compute checksums of the staging database before and after: reads all of its catalogued tables.",
    )
    traffic: TrafficConfig = Field(
        default_factory=TrafficConfig,
        description="The application's requests on the clone, while the stages are at work; rate 0 for none.",
    )
    faults: FaultConfig = Field(
        default_factory=FaultConfig,
        description="What is to go wrong while the clone is encrypted; nothing by default.",
    )
    keep_clone: bool = Field(
        default=False, description="Leave the clone there at the end; you remove it yourself."
    )
    keep_failed_hours: float = Field(
        default=2,
        ge=0,
        le=168,
        description="How long the clone of a failed rehearsal is kept, so that it can be re-executed from failure.",
    )

    @property
    def pace(self) -> PaceConfig:
        return PaceConfig(**self.model_dump(include=set(PacingConfig.model_fields)))
