# SPDX-License-Identifier: Apache-2.0
"""The list of the coordinator's defences, the source and docs/threats.md say the same; that each test fails without its
defence is tried by ``python -m tests.server.defences``."""

import pytest

from tests.server.defences import DEFENCES, rows
from tests.switched_off import ROOT, stands


@pytest.mark.parametrize("name", DEFENCES)
def test_a_defence_stands_where_the_list_says(name: str) -> None:
    stands(DEFENCES[name], "server")


def test_the_document_lists_them() -> None:
    text = (ROOT / "docs" / "threats.md").read_text()
    assert "\n".join(rows()) in text, "python -m tests.server.defences --table"
