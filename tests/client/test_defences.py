# SPDX-License-Identifier: Apache-2.0
"""The list of defences, the source and docs/threats.md say the same; that each test fails without its defence is tried
by ``python -m tests.client.defences``."""

import re

import pytest

from tests.client.defences import DEFENCES, ROOT, rows


@pytest.mark.parametrize("name", DEFENCES)
def test_a_defence_stands_where_the_list_says(name: str) -> None:
    defence = DEFENCES[name]
    for file, old, new in defence.changes:
        assert old != new and (ROOT / file).read_text().count(old) == 1, f"{file}: {old!r}"
    for test in defence.tests:
        file, _, function = test.partition("::")
        assert re.search(rf"^def {function}\(", (ROOT / "tests" / "client" / file).read_text(), re.MULTILINE), test


def test_the_document_lists_them() -> None:
    text = (ROOT / "docs" / "threats.md").read_text()
    assert "\n".join(rows()) in text, "python -m tests.client.defences --table"
