"""The table of faults in the documentation is that of the tests, and no row of the catalogue is forgotten."""

from __future__ import annotations

from tests.faults.catalogue import EXCUSED, FAULTS
from tests.faults.table import ROOT, render, shown_by_row


def test_every_row_of_the_catalogue_has_a_test_or_a_reason() -> None:
    assert FAULTS.keys() - shown_by_row().keys() - EXCUSED.keys() == set()
    assert (shown_by_row().keys() | EXCUSED.keys()) <= FAULTS.keys()


def test_the_table_in_the_documentation_is_current() -> None:
    assert (ROOT / "FAULTS.md").read_text(encoding="utf-8") == render(), "python -m tests.faults.table > FAULTS.md"
