# SPDX-License-Identifier: Apache-2.0
"""The list of defences, the source and docs/threats.md say the same; that each test fails without its defence is tried
by ``python -m tests.client.defences``."""

import pytest

from tests.client.defences import DEFENCES, rows
from tests.switched_off import ROOT, stands


@pytest.mark.parametrize("name", DEFENCES)
def test_a_defence_stands_where_the_list_says(name: str) -> None:
    stands(DEFENCES[name], "client")


def test_the_document_lists_them() -> None:
    text = (ROOT / "docs" / "threats.md").read_text()
    assert "\n".join(rows()) in text, "python -m tests.client.defences --table"
