# SPDX-License-Identifier: Apache-2.0
"""Groups of patients, lesion sizes, calibration and failures: what hospitals returned, as rows and a chart."""

from typing import Any

from fedneuro.server.report_groups import calibration, failures, groups


def estimate(mean: float, n: int = 10) -> dict[str, Any]:
    return {"mean": mean, "ci95": [mean - 0.1, mean + 0.1], "n": n}


def results(**sites: dict[str, Any]) -> dict[str, Any]:
    return {
        "effective_study": {"task": {"kind": "segmentation"}, "evaluation": {"metrics": ["dice", "hd95"]}},
        "sites": {name: {"role": "train", "metrics": {}, **site} for name, site in sites.items()},
    }


def test_strata_are_of_the_first_metric_and_sizes_of_sensitivity() -> None:
    found = results(
        west={"strata": {"sex": {"F": estimate(0.8, 15), "M": estimate(0.7)}}},
        north={"lesion_sizes": {"small": estimate(0.4, 5)}},
        empty={"strata": {}, "lesion_sizes": {}},
    )
    rows = groups(found, ["north", "west", "empty"])
    assert [(r["site"], r["metric"], r["what"], r["group"], r["value"], r["n"]) for r in rows] == [
        ("north", "Lesion sensitivity", "lesion size", "small", "0.40 (0.30–0.50)", 5),
        ("west", "Dice", "sex", "F", "0.80 (0.70–0.90)", 15),
        ("west", "Dice", "sex", "M", "0.70 (0.60–0.80)", 10),
    ], "in the order of the page"


def test_an_older_result_without_groups_has_no_rows() -> None:
    found = results(west={})
    assert groups(found, ["west"]) == [] and calibration(found, ["west"]) is None and failures(found, ["west"]) == []


def test_the_curve_shows_every_hospital_that_returned_one_beside_the_ideal() -> None:
    points = [
        {"bin": 2, "predicted": 0.2, "observed": estimate(0.3)},
        {"bin": 9, "predicted": 0.9, "observed": estimate(0.7)},
    ]
    chart = calibration(
        results(west={"role": "heldout", "reliability": points}, north={"reliability": points}, south={}),
        ["west", "north", "south"],
    )
    assert chart is not None and "west" in chart and "north" in chart and "ideal" in chart
    assert str(chart).count("<svg") == 1 and "observed" in chart


def test_names_of_hospitals_are_text_in_the_chart() -> None:
    points = [
        {"bin": 1, "predicted": 0.1, "observed": estimate(0.2)},
        {"bin": 2, "predicted": 0.2, "observed": estimate(0.3)},
    ]
    chart = calibration(results(**{"<script>": {"reliability": points}}), ["<script>"])
    assert chart is not None and "<script>" not in str(chart)


def test_failures_are_told_where_there_were_any() -> None:
    found = results(
        west={"failures": estimate(0.125, 8)}, north={"failures": None}, south={"failures": estimate(0.0, 8)}
    )
    assert failures(found, ["west", "north", "south"]) == [
        ("west", "inference failed on 12.5 % of 8 patients; each has the worst value")
    ]
