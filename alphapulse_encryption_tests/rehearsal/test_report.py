"""The pages and the metadata, of rehearsals of every kind."""

from __future__ import annotations

import html
import math
import re
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from alphapulse_encryption.cli.commands.parser import build_parser, check_usage
from alphapulse_encryption.migration.insight.estimates import Span
from alphapulse_encryption.rehearsal.measures import (
    Circumstances,
    Fault,
    Finding,
    Latency,
    Moment,
    Rehearsal,
    Sizes,
    Stage,
    StageMeasure,
    TableSize,
    TableWork,
    Traffic,
)
from alphapulse_encryption.rehearsal.report import plots, report, wording
from alphapulse_encryption.rehearsal.report.history import metadata
from alphapulse_encryption_tests.rehearsal import made_up

VOID = {"meta", "link", "br", "hr", "img", "input"}
HOSTILE = "<script>alert(1)</script>\"' & {{ 7 * 7 }} $x^2$ _#010203 --flag"


class Page(HTMLParser):
    """What is in a page, and whether its elements are closed in their order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(rehearsal: Rehearsal, history: Sequence[Rehearsal] = ()) -> Page:
    return safe(report.page(rehearsal, history))


def safe(text: str) -> Page:
    """The page, having seen that it asks for nothing from anywhere and runs nothing."""
    page = Page(text)
    assert not {"script", "iframe", "object", "embed", "image", "img"} & set(page.tags)
    for name, value in page.attributes:
        assert not name.startswith("on"), name
        if name in ("src", "href", "xlink:href", "action"):
            # Of the page itself: a report of another run, a place in it, a part of a plot.
            assert re.fullmatch(r"data:,|#[\w-]+|[\w-]+/index\.html|\.\./history\.html", value or ""), value
    assert not re.search(r"url\((?!#)|@import", text)
    return page


# What every page says.


def test_the_report_says_what_was_measured(tmp_path: Path) -> None:
    whole = made_up.surprising()
    path = report.write(whole, [whole], tmp_path / "new" / "directory")
    assert path == tmp_path / "new" / "directory" / "index.html"
    page = safe(path.read_text(encoding="utf-8"))
    assert page.tags.count("svg") == 5
    assert page.text.index("Ready, with warnings") < page.text.index("How long production will take")
    for text in (
        *("1 finding needs a decision: users.email", "the view active_users depends on it"),
        "Point it at v_users before the drop.",
        *("The server was restarted; the backfill went on by itself.", "OperationalError 57P01"),
        *(
            "2.20 times",
            "20,000,000 rows",
            "transactionid",
            "unchanged: its tables",
            "alphapulse_staging",
        ),
        *(str(stage) for stage in Stage),
        *made_up.TABLES,
    ):
        assert text in page.text, text
    assert [found for found in tmp_path.rglob("*") if found.is_file()] == [path]


def test_a_failed_rehearsal_gets_its_page() -> None:
    for stage in (Stage.BASELINE, Stage.BACKFILL, Stage.REMOVAL):
        page = read(made_up.failed(stage))
        assert page.text.index("Not ready") < page.text.index(f"the stage {stage} failed: The disk is full.")
    first = read(made_up.failed(Stage.CLONE))
    assert "Nothing can be predicted" in first.text
    assert "No stage came to its end" in first.text
    assert "It was rehearsed without traffic" in first.text
    assert "svg" not in first.tags
    # What is to be done on the day is known all the same.
    assert "--drop-unencrypted --confirm" in first.text


def test_production_of_unknown_size_is_shown_by_an_example() -> None:
    page = read(made_up.rehearsal(production=None))
    assert "Production's size is not known" in page.text
    assert "500,000 rows" in page.text


def test_what_got_worse_stands_at_the_top() -> None:
    history = [made_up.rehearsal(run_id=f"{n}", day=n, noise=0.05, seed=n) for n in range(3)]
    slow = made_up.rehearsal(run_id="slow", day=9, slower=3)
    page = read(slow, [*history, slow])
    assert page.text.index("It got worse since 3 rehearsals before") < page.text.rindex(
        "Ready, with warnings"
    )
    assert "backfill was slower per row" in page.text
    assert "It got worse" not in read(history[-1], history).text


def test_the_history_shows_all_and_links_reports(tmp_path: Path) -> None:
    assert "No rehearsal has been recorded" in safe(report.write_history([], tmp_path).read_text()).text
    history = [made_up.rehearsal(run_id=f"run-{n}", day=n, noise=0.05, seed=n) for n in range(3)]
    slow = made_up.rehearsal(run_id="run-9", day=9, slower=3)
    failed = made_up.failed(Stage.DROP, run_id="../../etc", day=4)
    report.write(slow, history, tmp_path / "run-9")
    text = report.write_history([slow, failed, *history], tmp_path).read_text(encoding="utf-8")
    page = safe(text)
    assert page.tags.count("svg") == 3
    assert "It got worse" in page.text
    assert ("href", "run-9/index.html") in page.attributes
    assert "etc" not in text
    rows = re.findall(r"2026-03-\d\d 02:00 UTC", page.text[page.text.index("Side by side") :])
    assert rows == [f"2026-03-{day:02} 02:00 UTC" for day in (10, 5, 3, 2, 1)]
    other = made_up.rehearsal(run_id="other", day=12, circumstances=made_up.circumstances(cores=8))
    differing = safe(report.history_page([slow, *history, other]))
    assert "cores: 8, before 2" in differing.text
    assert "It got worse" not in differing.text.split("Side by side")[0]


def test_the_metadata_say_the_same() -> None:
    history = [made_up.rehearsal(run_id=f"{n}", day=n, noise=0.05, seed=n) for n in range(2)]
    whole = made_up.surprising().model_copy(update={"run_id": "now"})
    found = dg.AssetMaterialization(
        "a", metadata=metadata(whole, history, Path("/there/index.html"))
    ).metadata
    text = str(found["verdict"].value)
    assert text.startswith("**Ready, with warnings**")
    assert "- warning: 1 finding needs a decision: users.email. See" in text
    assert found["ready"].value == 1
    assert found["p99_times_baseline"].value == pytest.approx(2.2)
    assert found["failed_requests"].value == 3
    assert found["report"].value == "/there/index.html"
    stages = found["stages"]
    assert isinstance(stages, dg.TableMetadataValue)
    assert [record.data["stage"] for record in stages.records] == list(Stage)
    failed = metadata(made_up.failed(Stage.CLONE), [])
    assert failed["ready"] == 0
    assert "predicted_seconds" not in failed


# Commands.


def commands(rehearsal: Rehearsal) -> list[list[str]]:
    pages_commands = re.findall(r"<pre>(.*?)</pre>", report.page(rehearsal, []), re.DOTALL)
    return [
        shlex.split(line) for block in pages_commands for line in html.unescape(block).strip().split("\n")
    ]


@pytest.mark.parametrize("workers", [1, 4])
def test_the_commands_of_the_day_are_ones_the_command_line_takes(workers: int) -> None:
    whole = made_up.rehearsal(circumstances=made_up.circumstances(workers=workers, rest_ratio=1.5))
    parser = build_parser()
    done = set()
    for program, module, name, *arguments in commands(whole):
        assert (program, module, name) == ("python", "-m", "alphapulse_encryption")
        options = parser.parse_args(arguments)
        check_usage(parser, options)
        if options.table:
            assert set(options.table) <= set(made_up.TABLES)
        done |= {argument for argument in arguments if argument.startswith("--")}
    assert {"--drop-unencrypted", "--confirm", "--operator", "--restore-drill", "--hold"} <= done
    assert ("--workers" in done) == (workers > 1)
    assert "rest_ratio=1.5" in {argument for command in commands(whole) for argument in command}


@pytest.mark.parametrize("table", ["audit.Log Entries", "a'b;rm -rf", "-x", "$(id)"])
def test_names_are_quoted_for_the_shell(table: str) -> None:
    sizes = Sizes(database=1, tables={table: TableSize(rows=1, heap=1, indexes=1)})
    parser = build_parser()
    for _, _, _, *arguments in commands(made_up.rehearsal().model_copy(update={"before": sizes})):
        options = parser.parse_args(arguments)
        check_usage(parser, options)
        assert options.table in ([], [table])
        assert options.confirmation in (None, table)


# Whatever comes.

names = st.one_of(
    st.text(min_size=1, max_size=63).filter(lambda name: "\0" not in name),
    st.sampled_from([HOSTILE, "a\u2028b", "$\\frac{$", "_", "\x01", "名前", "x" * 63, "</svg><b>", "]]>"]),
)
counts = st.one_of(st.integers(0, 10_000), st.sampled_from([0, 1, 2**63 - 1, 2**70]))
seconds = st.one_of(st.floats(0, 1e6), st.sampled_from([0.0, 1e-9, 1e12, 1e300]))
moments = st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC))
phases = st.lists(names, max_size=2).map(tuple)


def tuples(strategy: st.SearchStrategy[Any], size: int = 3) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(strategy, max_size=size).map(tuple)


latencies = st.builds(
    Latency, kind=names, way=names, requests=counts, errors=counts, wrong_answers=counts,
    p50=seconds, p95=seconds, p99=seconds, longest=seconds,
)  # fmt: skip
traffics = st.builds(
    Traffic,
    phases=phases,
    overall=latencies,
    by_kind=tuples(latencies),
    moments=tuples(
        st.builds(
            Moment, at=moments, seconds=seconds, requests=counts, errors=counts,
            p50=st.none() | seconds, p99=st.none() | seconds, longest=st.none() | seconds,
        )
    ),
    lock_waits=st.dictionaries(names, counts, max_size=2),
    longest_lock_wait=seconds,
    error_kinds=st.dictionaries(names, counts, max_size=2),
)  # fmt: skip
works = st.builds(
    TableWork, rows=counts, values=counts, seconds=seconds,
    seconds_held_back=seconds, changed_meanwhile=counts, quarantined=counts, locked_seconds=seconds,
)  # fmt: skip
faults = st.builds(
    Fault,
    kind=names,
    at=moments,
    seconds_away=seconds,
    seconds_lost=seconds,
    survived=st.booleans(),
    what=names,
)
findings = st.builds(
    Finding, level=st.sampled_from(["blocker", "warning", "note"]), subject=names, what=names, advice=names
)
sizes = st.builds(
    Sizes,
    database=counts,
    tables=st.dictionaries(
        names, st.builds(TableSize, rows=counts, heap=counts, indexes=counts), max_size=10
    ),
)


@st.composite
def rehearsals(draw: st.DrawFn) -> Rehearsal:
    before = draw(sizes)
    keys = st.sampled_from(list(before.tables)) if before.tables else names
    stages = [
        draw(
            st.builds(
                StageMeasure,
                stage=st.just(stage),
                started=moments,
                ended=moments,
                seconds=seconds,
                tables=st.dictionaries(keys, works, max_size=3),
                wal=counts,
                sizes=st.none() | st.just(before) | sizes,
                traffic=st.none() | traffics,
                faults=tuples(faults, 2),
                findings=tuples(findings, 2),
                attempts=counts,
            )
        )
        for stage in draw(st.lists(st.sampled_from(Stage), unique=True, max_size=4))
    ]
    return draw(
        st.builds(
            Rehearsal,
            run_id=names,
            started=moments,
            ended=moments,
            circumstances=st.builds(
                Circumstances, source=names, cloned_by=names, server_version=names, version=names,
                cores=st.integers(0, 99), workers=st.integers(0, 99), batch_ranges=counts, rate=seconds,
            ),
            before=st.just(before),
            stages=st.just(tuple(stages)),
            failed_stage=st.none() | st.sampled_from(Stage),
            failure=names,
            source_unchanged=st.none() | st.booleans(),
            production=st.none() | st.just(before) | sizes,
        )
    )  # fmt: skip


# Not shrunk: that takes minutes, each example being several pages with their plots.
@settings(
    max_examples=6,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
@given(rehearsals(), rehearsals())
def test_any_rehearsal_makes_a_page(one: Rehearsal, other: Rehearsal) -> None:
    # Both are compared, and one is predicted by the other.
    like = other.model_copy(
        update={"circumstances": one.circumstances, "started": one.started - timedelta(days=1)}
    )
    read(one, [like])
    safe(report.history_page([one, like]))
    found = dg.AssetMaterialization("a", metadata=metadata(one, [like])).metadata
    assert all(math.isfinite(v.value) for v in found.values() if isinstance(v.value, float))


def test_hostile_names_are_text() -> None:
    before = Sizes(database=10**8, tables={HOSTILE: TableSize(rows=1000, heap=10**7, indexes=10**6)})
    work = {HOSTILE: TableWork(rows=1000, values=5, seconds=2.0, quarantined=1)}
    whole = made_up.rehearsal(
        before=before, production=before, circumstances=made_up.circumstances(source=HOSTILE)
    )
    stages = tuple(
        measure.model_copy(update={"tables": work, "sizes": before, "findings": (finding,)})
        for measure in whole.stages
        for finding in [Finding(level="blocker", subject=HOSTILE, what=HOSTILE, advice=HOSTILE)]
    )
    whole = whole.model_copy(update={"stages": stages, "failure": HOSTILE, "failed_stage": Stage.DROP})
    page = read(
        whole, [whole.model_copy(update={"run_id": HOSTILE, "started": made_up.BEGAN - timedelta(days=1)})]
    )
    assert HOSTILE in page.text
    # A template in a name is not one.
    assert "& 49 $" not in page.text
    assert "<" not in str(metadata(whole, [])["verdict"]).split("MarkdownMetadataValue")[1]


# Figures.


@pytest.mark.parametrize(
    ("seconds_", "words"),
    [
        (0, "0 s"), (0.01, "< 0.1 s"), (0.44, "0.4 s"), (9.96, "10 s"), (119, "119 s"), (120, "2 min"),
        (7_199, "120 min"), (7_200, "2 h"), (12_000, "3 h 20 min"), (200_000, "2 days 8 h"),
        (1e12, "more than 100 years"), (None, "unknown"), (math.nan, "unknown"), (math.inf, "more than 100 years"),
    ],
)  # fmt: skip
def test_durations(seconds_: float | None, words: str) -> None:
    assert wording.duration(seconds_) == words


@pytest.mark.parametrize(
    ("bytes_", "words"),
    [
        (0, "0 bytes"), (1023, "1,023 bytes"), (1536, "1.5 kB"), (10 * 2**20, "10 MB"), (-(2**30), "-1.0 GB"),
        (None, "unknown"),
    ],
)  # fmt: skip
def test_sizes(bytes_: float | None, words: str) -> None:
    assert wording.size(bytes_) == words


def test_plots_take_their_colours_from_the_page_and_keep_text_as_text() -> None:
    svg = plots.ranges({"a<b>&$x$": Span(1, 2, 4)}, "seconds", 'Title "quoted"')
    assert "var(--series-1)" in svg
    assert "var(--ink)" in svg
    assert not re.search(r"#0102\d\d", svg)
    assert "a&lt;b&gt;&amp;$x$" in svg
    assert 'aria-label="Title &#34;quoted&#34;"' in svg
    assert "<metadata" not in svg
    # As often as they are shown: names of plots do not get into each other's way.
    other = plots.ranges({"a": Span(1, 2, 4)}, "seconds", "Another")
    ids = [set(re.findall(r'id="([^"]+)"', drawn)) for drawn in (svg, other)]
    assert not ids[0] & ids[1]
