"""What one step of a run leaves for the next one, as JSON: Dagster's default is a pickle, which runs code when read."""

import json
from typing import Any, cast

import dagster as dg
from upath import UPath


class JsonOutputs(dg.UPathIOManager):
    """Files below a directory, one for each output of a step."""

    extension = ".json"

    def dump_to_path(self, context: dg.OutputContext, obj: Any, path: UPath) -> None:
        """Called by Dagster with a step's output; raises where it is nothing that JSON has."""
        path.write_text(json.dumps(obj), encoding="utf-8")

    def load_from_path(self, context: dg.InputContext, path: UPath) -> Any:
        """Called by Dagster for the step that takes it."""
        return json.loads(path.read_text(encoding="utf-8"))


@dg.io_manager
def json_outputs(context: dg.InitResourceContext) -> JsonOutputs:
    """Where the instance keeps what its runs leave."""
    instance = cast(dg.DagsterInstance, context.instance)
    return JsonOutputs(UPath(instance.storage_directory()))
