"""Numbers among the options: which are taken, and that the others are refused in a line."""

from __future__ import annotations

import pytest

from alphapulse_encryption.cli.commands.parser import build_parser

# The smallest and the largest, and what is said of others.
NUMBERS = {
    "--batch-size": (1, 100_000, "must be a whole number from 1 to 100000"),
    "--workers": (1, 16, "must be a whole number from 1 to 16"),
    "--runs": (1, 999, "must be a whole number from 1 to 999"),
    "--limit": (1, 1_000, "must be a whole number from 1 to 1000"),
    "--sample": (0, 100_000, "must be a whole number up to 100000"),
    "--rate": (0, 1_000, "must be a whole number up to 1000"),
    "--rows": (1_000, 10**18 - 1, "must be a whole number of at least 1000"),
    "--revoke-approval": (1, 10**18 - 1, "must be the number of an approval, as --approvals shows it"),
    "--reinstate-key-version": (1, 10**18 - 1, "must be a key version, as --key-versions shows it"),
}
# What int() takes or has words of its own for.
NO_NUMBERS = ("", "x", "-1", "+1", " 1", "1_0", "1.5", "1e3", "٣", "9" * 5000)


def value(option: str, text: str) -> object:
    found = vars(build_parser().parse_args([f"{option}={text}"]))
    return found[option.removeprefix("--").replace("-", "_")]


def test_every_number_is_here() -> None:
    typed = {
        name
        for action in build_parser()._actions
        if action.type is not None
        for name in action.option_strings
    }
    assert typed == {*NUMBERS, "--valid-hours"}


@pytest.mark.parametrize("option", NUMBERS)
def test_whole_numbers(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    least, most, says = NUMBERS[option]
    assert [value(option, str(number)) for number in (least, most)] == [least, most]
    for text in (*NO_NUMBERS, str(least - 1), str(most + 1)):
        with pytest.raises(SystemExit, match="2"):
            value(option, text)
        assert capsys.readouterr().err.splitlines()[-1].endswith(f": argument {option}: {says}"), text


def test_hours(capsys: pytest.CaptureFixture[str]) -> None:
    assert [value("--valid-hours", text) for text in ("0.5", "24", "168")] == [0.5, 24.0, 168.0]
    for text in (*(text for text in NO_NUMBERS if text != "1.5"), "0", "168.1", "nan", "1.5.0", "."):
        with pytest.raises(SystemExit, match="2"):
            value("--valid-hours", text)
        assert capsys.readouterr().err.endswith("--valid-hours: must be a number of hours, at most 168\n")
