"""Tests are marked by what their fixtures bring, and `make quick`, which goes by that, starts no server."""

from pathlib import Path

import pytest

from alphapulse_encryption.sample.postgres import EmbeddedPostgres


def markers(request: pytest.FixtureRequest) -> set[str]:
    return {marker.name for marker in request.node.iter_markers()}


def test_a_server_is_not_started_unannounced(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    assert "postgres" not in markers(request)
    server = EmbeddedPostgres(tmp_path / "postgres")
    with pytest.raises(pytest.fail.Exception, match="starts PostgreSQL"):
        server.ensure_running()
    assert not server.exists()


@pytest.mark.usefixtures("sample_url")
def test_what_uses_the_server_through_others_is_marked(request: pytest.FixtureRequest) -> None:
    assert markers(request) >= {"postgres"}
    assert "dagster" not in markers(request)


@pytest.mark.usefixtures("theirs")
def test_a_place_has_a_dagster_instance(request: pytest.FixtureRequest) -> None:
    assert markers(request) >= {"postgres", "dagster"}
