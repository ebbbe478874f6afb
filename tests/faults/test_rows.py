"""Every promised row has a test, and the table in the docs names them all."""

import re

from faults import rows


def test_every_row_has_a_test():
    known = rows.tests()
    assert not [row for row, tests in known.items() if not tests]
    assert known.keys() == rows.ROWS.keys(), "a test is named after a row that is not"
    letters = {"a": 17, "b": 30, "c": 44, "d": 57, "e": 61, "f": 65, "g": 68, "h": 83}
    numbers = sorted(int(row[1:]) for row in rows.ROWS if row[1:].isdigit())
    assert numbers == list(range(1, 84))
    for row in rows.ROWS:
        if row[1:].isdigit():
            assert int(row[1:]) <= letters[row[0]]


def test_the_table_in_the_docs_names_the_tests_that_there_are():
    table = (rows.ROOT / "docs" / "reliability.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", table))
    there = {t.partition("::")[2] for tests in rows.tests().values() for t in tests}
    assert named == there, "make docs/reliability.md anew: see tests/faults/rows.py"
    assert not re.search(r"\d (failure|error)", table)
