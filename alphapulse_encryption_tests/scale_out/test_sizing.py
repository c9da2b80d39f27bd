"""The page on sizing says what the program prints, and the program says what was measured."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def sizing() -> ModuleType:
    path = ROOT / "benchmarks" / "sizing.py"
    if not path.exists():
        pytest.skip("the benchmarks are not here")
    spec = importlib.util.spec_from_file_location("sizing", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["sizing"] = module
    spec.loader.exec_module(module)
    return module


def test_every_table_of_the_page_is_printed(sizing: ModuleType) -> None:
    page = (ROOT / "docs" / "sizing.md").read_text().splitlines()
    printed = sizing.report(sizing.Constants()).splitlines()
    tables = [line for line in printed if line.startswith("|")]
    assert len(tables) >= 25
    # In one piece each, and nothing of an older one left over.
    headings = {line for line in tables if line.startswith(("| workers |", "| MiB", "| rows |"))}
    for heading in headings:
        start, there = tables.index(heading), page.index(heading)
        length = next((n for n, line in enumerate(tables[start + 1 :], 1) if line in headings), len(tables))
        expected = tables[start : start + length]
        assert page[there : there + len(expected)] == expected
        assert not page[there + len(expected)].startswith("|")


def test_the_constants_of_the_page(sizing: ModuleType) -> None:
    constants = sizing.Constants()
    page = (ROOT / "docs" / "sizing.md").read_text()
    for said in (
        f"{constants.server_us:.1f} µs: {1e6 / constants.server_us:,.0f} rows a second",
        f"{constants.worker_us} µs",
        f"{constants.verified_us:.0f} µs: {1e6 / constants.verified_us:,.0f} rows a second",
        f"{constants.wal_bytes:,} bytes",
        f"{constants.growth_bytes:,} bytes",
        f"{constants.index_growth:.1%}".replace("%", " %"),
        f"{2**32 / constants.same_key / 1e9:.2f} billion rows",
    ):
        assert said in page, said


def test_the_model_is_near_what_was_measured(sizing: ModuleType) -> None:
    constants = sizing.Constants()
    readme = (ROOT / "README.md").read_text()
    for name, (workers, measured) in zip(("one worker", "two workers"), constants.points, strict=True):
        assert f"| {name} | {measured:,} |" in readme
        assert sizing.rate(constants, workers) == pytest.approx(measured, rel=0.1)
    assert f"| the limit: the server alone | {1e6 / constants.server_us:,.0f} |" in readme


def test_the_model_keeps_to_its_bounds(sizing: ModuleType) -> None:
    constants = sizing.Constants()
    for lanes in (1, 2, 8):
        ceiling = lanes * 1e6 / constants.server_us
        rates = [sizing.rate(constants, workers, lanes) for workers in range(1, 40)]
        assert rates == pytest.approx(sorted(rates))
        assert rates[-1] <= ceiling * 1.0001
        alone = 1e6 / (constants.worker_us + constants.server_us)
        assert all(found <= alone * workers * 1.0001 for workers, found in enumerate(rates, 1))
    # Nothing but the client, and nothing but the server: what can be said without a model.
    assert rates[0] == pytest.approx(alone)
    assert sizing.bound(constants, sizing.SIZES[3])[1] == "replica"
    assert sizing.keys(constants, 1_000_000_000) == 1
    assert sizing.keys(constants, 2_000_000_000) == 2
