"""What goes together; the rest of it is refused before anything is looked at."""

from __future__ import annotations

import pytest

from alphapulse_encryption.__main__ import main


@pytest.mark.parametrize(
    "arguments",
    [
        ("--json",),
        ("--json", "--add-columns"),
        ("--json", "--plan", "--status"),
        ("--json", "--preflight", "--backup"),
        ("--json", "--settings", "--pause"),
        ("--json", "--check-key"),
        ("--json-schema", "--approvals"),
        ("--plan", "--add-columns"),
        ("--plan", "--status"),
        ("--watch",),
        ("--watch", "--plan"),
        ("--watch", "--status", "--json"),
        ("--schema", "crm", "--plan"),
        ("--sample", "0", "--status"),
        ("--output", "x.yaml", "--plan"),
        ("--discover", "--force"),
        ("--discover", "--table", "users"),
        ("--discover", "--sample", "many"),
        ("--discover", "--status"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("flag", ["--check-key", "--key-usage", "--test-alerts"])
def test_what_goes_alone(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    for others in (["--verify"], ["--pause"], ["--backup-identity"]):
        with pytest.raises(SystemExit, match="2"):
            main([flag, *others])
        assert "to be given without a step" in capsys.readouterr().err
