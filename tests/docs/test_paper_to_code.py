"""What docs/paper_to_code.md names is there."""

from __future__ import annotations

import re

import pytest

from tests.conftest import REPOSITORY
from tests.docs.reading import code_in, names_of_tests, page, resolve, rows

TEXT = page("docs/paper_to_code.md")
ROWS = rows(TEXT, "where", "what it says", "code", "held by") + rows(TEXT, "paper", "what", "code", "held by")


def symbols(cell: str) -> list[str]:
    return [code for code in code_in(cell) if ":" in code]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: next(iter(row.values())))
def test_code_and_tests_of_every_row_exist(row: dict[str, str]) -> None:
    assert symbols(row["code"])
    for symbol in symbols(row["code"]):
        module, qualified = symbol.split(":")
        assert resolve(module, qualified) is not None
    held_by = code_in(row["held by"])
    assert held_by
    for test in held_by:
        file, _, name = test.partition("::")
        assert name in names_of_tests(file), test


def test_every_name_on_the_page_stands_in_a_row() -> None:
    listed = {code for row in ROWS for column in ("code", "held by") for code in code_in(row[column])}
    others = {code for code in code_in(TEXT) if code not in listed}
    assert not [code for code in others if re.match(r"(nni_cream|search_spaces)[.:]|tests/.*::", code.strip("<>"))]
    assert all((REPOSITORY / code).exists() for code in others if code.endswith(".py"))


def test_all_equations_of_darts_are_there() -> None:
    numbers = {
        int(number)
        for row in rows(TEXT, "where", "what it says", "code", "held by")
        if row["where"].startswith("§2.") and "eq." in row["where"]
        for number in re.findall(r"\d+", row["where"].partition("eq.")[2])
    }
    assert numbers == set(range(1, 9))


def test_the_page_reads_tests_as_pytest_does() -> None:
    names = names_of_tests("tests/docs/test_paper_to_code.py")
    assert {"test_the_page_reads_tests_as_pytest_does", "TestOfThisFile::test_in_a_class"} <= names
    assert "symbols" not in names


class TestOfThisFile:
    def test_in_a_class(self) -> None:
        assert symbols("`a:b` and `c`, `d.e:F.g`") == ["a:b", "d.e:F.g"]
