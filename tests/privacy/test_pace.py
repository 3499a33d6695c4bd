# SPDX-License-Identifier: Apache-2.0
"""Pauses are short after news, grow with the time waited, and stay within their bounds."""

import pytest

from fedneuro.privacy.pace import Pace


def test_a_pause_is_a_share_of_the_time_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("fedneuro.privacy.pace.time.monotonic", lambda: now)
    pace = Pace(shortest=0.02, longest=0.5, share=0.05)
    assert pace.pause() == 0.02
    now = 102.0
    assert pace.pause() == pytest.approx(0.1)  # 5 % of two seconds
    now = 1000.0
    assert pace.pause() == 0.5
    pace.news()
    assert pace.pause() == 0.02


def test_a_wait_is_prolonged_by_a_twentieth_at_most_and_costs_few_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking until 10 s have passed: the look that sees it comes before 10.5 s, after some 130 looks."""
    now = 0.0
    monkeypatch.setattr("fedneuro.privacy.pace.time.monotonic", lambda: now)
    pace, looks = Pace(), 0
    while now < 10.0:
        now += pace.pause()
        looks += 1
    assert now <= 10.5 + 1e-9
    assert looks < 150
