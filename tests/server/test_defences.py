# SPDX-License-Identifier: Apache-2.0
"""The list of the coordinator's defences, the source and docs/threats.md say the same; that each test fails without its
defence is tried by ``python -m tests.server.defences``."""

import re

import pytest

from tests.server.defences import DEFENCES, ROOT, rows


@pytest.mark.parametrize("name", DEFENCES)
def test_a_defence_stands_where_the_list_says(name: str) -> None:
    file, old, new = DEFENCES[name].change
    assert old != new and (ROOT / file).read_text().count(old) == 1, f"{file}: {old!r}"
    for test in DEFENCES[name].tests:
        place, _, function = test.partition("::")
        assert re.search(rf"^def {function}\(", (ROOT / "tests" / "server" / place).read_text(), re.MULTILINE), test


def test_the_document_lists_them() -> None:
    text = (ROOT / "docs" / "threats.md").read_text()
    assert "\n".join(rows()) in text, "python -m tests.server.defences --table"
