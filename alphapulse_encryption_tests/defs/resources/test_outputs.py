"""What a step leaves for the next one: somebody else's file in its place is data at most."""

import os
import pickle
from pathlib import Path
from typing import Any

import dagster as dg

from alphapulse_encryption.definitions import build_defs
from alphapulse_encryption.defs.resources.outputs import json_outputs

LEFT = {"rows": 3, "tables": ["users"], "seconds": 0.5, "none": None}


class Payload:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


@dg.op
def leave() -> dict[str, Any]:
    return LEFT


@dg.op
def take(context: dg.OpExecutionContext, left: dict[str, Any]) -> None:
    if "fails" in context.run.tags:
        raise dg.Failure("told to")
    assert left == LEFT


@dg.job(resource_defs={"io_manager": json_outputs}, executor_def=dg.in_process_executor)
def passing() -> None:
    take(leave())


def test_a_planted_pickle_is_not_read(tmp_path: Path) -> None:
    with dg.instance_for_test() as instance:
        job = dg.reconstructable(passing)
        failed = dg.execute_job(job, instance, tags={"fails": "yes"}, raise_on_error=False)
        assert not failed.success
        kept = [path for path in Path(instance.storage_directory()).rglob("*") if path.is_file()]
        (of_leave,) = [path for path in kept if "leave" in path.parts]
        assert of_leave.read_text().startswith('{"rows": 3')

        def again() -> dg.JobExecutionResult:
            options = dg.ReexecutionOptions.from_failure(failed.run_id, instance)
            with dg.execute_job(job, instance, reexecution_options=options, raise_on_error=False) as result:
                return result

        # Where Dagster's own would look, and in the place of ours.
        for path in (of_leave.with_suffix(""), of_leave):
            path.write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
        assert not again().success
        assert not (tmp_path / "ran").exists()
        # That it would have run.
        pickle.loads(of_leave.read_bytes())
        assert (tmp_path / "ran").exists()


def test_every_job_leaves_its_outputs_so() -> None:
    repository = build_defs().get_repository_def()
    jobs = repository.get_all_jobs()
    assert len(jobs) > 20
    assert {job.resource_defs["io_manager"] for job in jobs} == {json_outputs}
