"""The table of model families in the documentation is what the library does."""

import json

import pytest
from family_table import DATA, PAGE, measure, table
from published_families import PUBLISHED

SUBSET = ["Llama 4", "Gemma 2", "Granite 4 hybrid"]  # chunks, soft caps, states and scales; see also test_engines.py
COLUMNS = ("class", "engine", "lora", "fsdp2")
ROWS = {row["family"]: row for row in json.loads(DATA.read_text())}


def check(kinds, sharded=True):
    for row in measure(kinds, sharded):
        known = ROWS[row["family"]]
        assert {name: row[name] for name in COLUMNS} == {name: known[name] for name in COLUMNS}, row["why"]
        assert float(row["gap"]) <= 10 * float(known["gap"]), "rounding differs between machines, but not by more"


def test_the_page_has_the_data():
    assert table(list(ROWS.values())) in PAGE.read_text(), "python tests/support/family_table.py"
    assert list(ROWS) == list(PUBLISHED)


def test_no_family_has_a_gap_that_is_not_rounding():
    assert {row["gap"] for row in ROWS.values()} <= {"1e-6", "1e-5", "1e-4", "none"}
    assert [name for name, row in ROWS.items() if row["gap"] == "none"] == []


def test_families_of_each_kind_are_as_the_table_says():
    check(SUBSET, sharded=False)


@pytest.mark.slow
def test_all_families_are_as_the_table_says():
    check(list(PUBLISHED))
