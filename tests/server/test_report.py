# SPDX-License-Identifier: Apache-2.0
"""The report: what it says, what it admits, that it is one harmless file, and that a browser draws it."""

import copy
import re
import xml.etree.ElementTree as ET  # the charts are our own output
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedneuro.privacy.errors import EnvironmentProblem, StateError
from fedneuro.privacy.study import Study
from fedneuro.server.charts import DotRow, Mark, Series, dot_plot, line_chart
from fedneuro.server.report import write_report
from fedneuro.server.report_words import duration_text, epsilon_text, metric_name
from tests.server.browser import Browser

TRAINING = ("CS", "DU")
VOID = {"meta", "img", "br", "hr", "link", "input"}


def _estimate(mean: float, low: float, high: float, n: int) -> dict[str, Any]:
    return {"mean": mean, "ci95": [low, high], "n": n}


def _results() -> dict[str, Any]:
    study = Study.parse(
        {
            "study": {"name": "glioma", "description": "Lesions on FLAIR."},
            "training": {"rounds": 3, "local_steps": 5},
            "evaluation": {"heldout": ["HT"]},
        }
    )
    sites: dict[str, dict[str, Any]] = {
        "CS": {
            "role": "train", "public_size": 10, "state": "answered",
            "metrics": {"dice": _estimate(0.71, 0.6, 0.8, 4), "hd95": _estimate(5.25, 4.0, 7.0, 4)},
            "untrained": {"dice": _estimate(0.02, 0.01, 0.03, 4)},
        },
        "DU": {
            "role": "train", "public_size": 30, "state": "answered",
            "metrics": {"dice": _estimate(0.67, 0.5, 0.75, 7), "hd95": _estimate(6.0, 4.0, 7.0, 7)},
            "untrained": {"dice": _estimate(0.03, 0.01, 0.04, 7)},
        },
        "HT": {
            "role": "heldout", "public_size": 25, "state": "answered",
            "metrics": {"dice": _estimate(0.583, 0.512, 0.644, 25), "hd95": _estimate(9.0, 7.0, 12.0, 25)},
            "untrained": {"dice": _estimate(0.04, 0.03, 0.05, 25)},
        },
    }  # fmt: skip
    rounds: list[dict[str, Any]] = [
        {
            "round": number, "seconds": 2.5, "bytes_down": 3_000_000, "bytes_up": 1_500_000 if number else 0,
            "train": {
                name: {"loss": None, "steps": 5, "seconds": 1.0, "epsilon": 2.5 * number, "noise_multiplier": 1.5}
                for name in TRAINING
            } if number else {},
            "metrics": {name: {"dice": _estimate(0.1 + 0.15 * number, 0.1, 0.6, 4)} for name in sites},
            "refusals": {},
        }
        for number in range(4)
    ]  # fmt: skip
    other = copy.deepcopy(sites)
    other["HT"]["metrics"]["dice"] = _estimate(0.79, 0.7, 0.85, 25)
    return {
        "schema_version": 1,
        "study": {"name": "glioma", "description": "Lesions on FLAIR."},
        "study_hash": study.hash,
        "effective_study": study.model_dump(mode="json"),
        "status": "complete",
        "engine": "inprocess",
        "selected_round": 3,
        "select": {"metric": "dice", "value": 0.69},
        "sites": sites,
        "rounds": rounds,
        "privacy": {
            "mode": "local", "unit": "patient", "neighbouring_relation": "zero-out of one patient", "delta": 1e-5,
            "clip": 1.0, "sample_rate": 0.3, "steps": 15, "accountant": "PLD (dp-accounting)",
            "noise_multiplier": {"CS": 2.1, "DU": 1.5}, "epsilon": {"CS": 7.1234, "DU": 7.901},
            "not_covered": ["metrics on validation patients, which are not noised"],
        },
        "comparators": {"no-privacy": {"title": "same federation, no privacy", "sites": other}},
        "versions": {"fedneuro": "0.1.0", "torch": "2.13.0"},
        "seconds": 123.4,
        "model_digest": "ab" * 32,
    }  # fmt: skip


class _Page(HTMLParser):
    """Visible text, tags with their attributes, and whether every element is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.pieces: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        assert self._open == [], f"not closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID and not self.get_starttag_text().endswith("/>"):  # type: ignore[union-attr]
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("line", "circle", "polygon", "polyline") or (self._open and self._open[-1] == tag):
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self._open or self._open[-1] != "style":
            self.pieces.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.pieces))


def _write(tmp_path: Path, results: dict[str, Any], **options: Any) -> tuple[str, _Page]:
    write_report(results, tmp_path / "report.html", **options)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    return html, _Page(html)


def _picture(path: Path) -> Path:
    Image.fromarray(np.full((8, 24, 3), 128, np.uint8)).save(path)
    return path


def test_the_page_opens_with_the_held_out_hospital_and_its_price(tmp_path: Path) -> None:
    _, page = _write(tmp_path, _results())
    text = page.text
    assert text.index("Hospitals that never trained") < text.index("Hospitals that trained") < text.index("Charts")
    card = text[text.index("Hospitals that never trained") : text.index("Hospitals that trained")]
    for words in ("HT", "0.58", "0.51–0.64", "25 patients", "9.0 mm", "0.04 (0.03–0.05)", "0.79 (0.70–0.85)"):
        assert words in card
    # The dearest training hospital's ε, rounded up, with its δ and its unit.
    assert "ε ≤ 7.91, δ = 1e-05" in card and "per patient" in card
    assert "banner" not in " ".join(str(attributes.get("class")) for _, attributes in page.tags)


@pytest.mark.parametrize(
    ("start", "words"),
    [
        ((0.41, 0.35, 0.5), "Training beat it: the 95 % intervals do not overlap."),
        ((0.55, 0.48, 0.62), "this run does not show that training was worth its ε."),
        ((0.6, 0.5, 0.7), "Training did not beat it: its ε bought nothing here."),
    ],
)
def test_the_model_that_saw_no_private_patient_is_the_row_to_beat(
    tmp_path: Path, start: tuple[float, float, float], words: str
) -> None:
    """HT has 0.583 (0.512 to 0.644): above, within and below the start's interval."""
    results = _results()
    title = "pre-trained on phantoms, no private patient"
    results["start"] = {"from": "phantoms", "title": title, "digest": "0" * 64}
    results["sites"]["HT"] |= {"untrained": {}, "start": {"dice": _estimate(*start, 25)}}
    text = _write(tmp_path, results)[1].text
    card = text[text.index("Hospitals that never trained") : text.index("Hospitals that trained")]
    assert words in card and card.count(title) >= 3 and f"{start[0]:.2f} ({start[1]:.2f}–{start[2]:.2f})" in card
    assert "untrained network" not in text
    assert "this run does not" not in _write(tmp_path, _results())[1].text


def test_training_hospitals_show_their_own_epsilon_and_the_gap(tmp_path: Path) -> None:
    text = _write(tmp_path, _results())[1].text
    part = text[text.index("Hospitals that trained") : text.index("Charts")]
    assert "ε = 7.13, δ = 1e-05" in part and "ε = 7.91, δ = 1e-05" in part
    # 4 and 7 patients: (4 × 0.71 + 7 × 0.67) / 11 = 0.6845, less √((4/11 × 0.11)² + (7/11 × 0.17)²) = 0.1153, more
    # 0.0605. The difference of -0.1015 is less √(0.071² + 0.0605²) = 0.0933 and more √(0.061² + 0.1153²) = 0.1305.
    assert re.search(
        r"Dice 0\.68 \(0\.57–0\.7[45]\) 0\.58 \(0\.51–0\.64\) −0\.10[12] \(−0\.195 to \+0\.029\) no difference shown",  # noqa: RUF001
        part,
    )
    assert re.search(r"HD95 5\.7 mm \(4\.4–6\.6\) 9\.0 mm \(7\.0–12\.0\) \+3\.3 \(\+1\.1 to \+6\.6\) worse", part)


def test_privacy_rounds_and_provenance_are_stated(tmp_path: Path) -> None:
    results = _results()
    results["rounds"][2]["refusals"] = {"DU": "timeout"}
    del results["rounds"][2]["train"]["DU"]
    text = _write(tmp_path, results)[1].text
    for words in (
        "zero-out of one patient", "PLD (dp-accounting)", "sampling rate q per step 0.3",
        "private steps per hospital 15",
        "metrics on validation patients, which are not noised", "2.100", "1 of 2 sites, DU missing: timeout",
        "the hospital did not answer in time", "3.0 1.5", results["study_hash"], "ab" * 32, "0.1.0", "[privacy]",
        'heldout = ["HT"]', "The training loss is not shown", "2 min",
    ):  # fmt: skip
        assert words in text, words


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    results = _results()
    del results["sites"]["HT"]["metrics"]["hd95"]
    results["sites"]["DU"] |= {"metrics": {}, "untrained": {}, "state": "missing since round 2: timeout"}
    text = _write(tmp_path, results)[1].text
    assert "HD95 not reported: voxel size unknown" in text
    assert "Dice not reported: missing since round 2: timeout" in text


def test_a_partial_run_without_held_out_and_privacy_says_so_at_the_top(tmp_path: Path) -> None:
    results = _results()
    results["status"] = "partial"
    del results["sites"]["HT"], results["comparators"]["no-privacy"]["sites"]["HT"]
    results["privacy"] = {
        "mode": "none",
        "unit": "patient",
        "delta": None,
        "epsilon": {},
        "not_covered": ["everything"],
    }
    for record in results["rounds"]:
        for number, entry in enumerate(record["train"].values()):
            entry |= {"epsilon": None, "noise_multiplier": None, "loss": 0.5 + number}
    text = _write(tmp_path, results)[1].text
    top = text[: text.index("Hospitals that trained")]
    assert "This run is not finished." in top and "No held-out hospital." in top and "No privacy promise." in top
    assert "Training loss by round" in text and "Privacy spent by round" not in text
    assert "ε" not in text.replace("epsilon", "")


def test_an_empty_run_still_gives_a_page(tmp_path: Path) -> None:
    results = _results()
    results |= {"rounds": [], "status": "partial", "selected_round": 0, "comparators": {}}
    results["select"]["value"] = None
    results["privacy"]["epsilon"] = {}
    for site in results["sites"].values():
        site |= {"metrics": {}, "untrained": {}}
    text = _write(tmp_path, results)[1].text
    assert "No round was finished." in text and "nothing spent" in text
    assert "Dice not reported: the hospital returned no metric" in text


def test_classification_and_labels_are_named(tmp_path: Path) -> None:
    results = _results()
    results["effective_study"]["task"]["kind"] = "classification"
    results["select"]["metric"] = "auroc"
    for site in results["sites"].values():
        site["metrics"] = {"accuracy": _estimate(0.8, 0.7, 0.9, 9), "auroc": _estimate(0.93, 0.9, 0.97, 9)}
    text = _write(tmp_path, results)[1].text
    assert "0.93 AUROC" in text and "Accuracy" in text and "HD95" not in text
    assert metric_name("dice_anterior") == "Dice, anterior"


def test_previews_are_embedded_held_out_first(tmp_path: Path) -> None:
    picture = _picture(tmp_path / "1.png")
    (tmp_path / "text.png").write_text("no picture")
    html, page = _write(
        tmp_path,
        _results(),
        previews={
            "CS": [{"file": picture, "caption": "sub-1: Dice 0.71"}],
            "HT": [
                {"file": picture, "caption": "sub-2"},
                {"file": tmp_path / "gone.png", "caption": "sub-3"},
                {"file": tmp_path / "text.png", "caption": "sub-4"},
            ],
        },
    )
    assert html.count("data:image/png;base64,") == 2
    assert page.text.count("The picture cannot be read.") == 2
    assert page.text.index("sub-2") < page.text.index("sub-1: Dice 0.71")


def test_nothing_is_fetched_and_nothing_runs(tmp_path: Path) -> None:
    html, page = _write(tmp_path, _results(), previews={"HT": [{"file": _picture(tmp_path / "1.png"), "caption": "x"}]})
    assert not re.search(r"https?:|//[a-z]|@import|url\(", html.replace("data:image/png;base64,", ""), re.IGNORECASE)
    assert {"script", "link", "iframe", "object", "embed", "form"}.isdisjoint(tag for tag, _ in page.tags)
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        assert str(attributes.get("href", "#")).startswith("#"), "a link leaves the page"
        assert attributes.get("src", "data:") is not None and str(attributes.get("src", "data:")).startswith("data:")
    policies = [a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies and str(policies[0]).startswith("default-src 'none'")


def test_hostile_text_is_shown_not_run(tmp_path: Path) -> None:
    evil = "\"><script>alert(1)</script><img src=x onerror='alert(2)'>"
    results = _results()
    results["study"] |= {"name": evil, "description": evil}
    results["sites"][evil] = results["sites"].pop("HT")
    results["sites"]["&" + evil] = copy.deepcopy(results["sites"]["CS"])
    results["comparators"] = {"x": {"title": evil, "sites": results["sites"]}}
    results["versions"] = {evil: evil}
    results["privacy"]["not_covered"] = [evil]
    results["effective_study"]["study"]["description"] = evil
    results["engine"] = results["sites"]["CS"]["state"] = evil
    for record in results["rounds"]:
        record["metrics"] = {**record["metrics"], evil: record["metrics"]["CS"], "&" + evil: record["metrics"]["CS"]}
        record["refusals"] = {evil: evil}
    _, page = _write(tmp_path, results, previews={evil: [{"file": _picture(tmp_path / "1.png"), "caption": evil}]})
    assert "script" not in {tag for tag, _ in page.tags}
    assert [attributes["src"] for tag, attributes in page.tags if tag == "img" and attributes["src"] == "x"] == []
    assert not any("onerror" in attributes for _, attributes in page.tags)
    assert page.text.count("<script>alert(1)</script>") > 8


def test_other_schema_and_unwritable_place_are_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="schema_version 2, this FedNeuro reads 1"):
        write_report(_results() | {"schema_version": 2}, tmp_path / "report.html")
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentProblem, match="cannot write"):
        write_report(_results(), tmp_path / "file" / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_charts_are_well_formed_and_put_values_where_they_belong() -> None:
    lines = [
        Series(name="a <b>", points=[(0, 0.0), (5, 0.5), (10, 1.0)], colour="#000"),
        Series(
            name="held out", points=[(0, 0.0), (10, 1.0)], colour="#111", strong=True, band=[(0, 0, 0.1), (10, 0.9, 1)]
        ),
        Series(name="long", points=[(x / 100, 0.5) for x in range(1001)], colour="#222"),
        Series(name="empty", points=[], colour="#333"),
    ]
    svg = line_chart(lines, label="l", x_title="x", y_title="y", y_range=(0, 1), marker=(5, "m"), rule=(1, "r"))
    chart = ET.fromstring(svg)  # noqa: S314
    drawn = {line.get("stroke"): str(line.get("points")).split() for line in chart.iter("polyline")}
    xs, ys = zip(*(map(float, point.split(",")) for point in drawn["#000"]), strict=True)
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.11) and ys[0] - ys[1] == pytest.approx(
        ys[1] - ys[2], abs=0.11
    )
    assert ys[0] > ys[2], "higher values are drawn higher"
    assert len(drawn["#222"]) <= 402 and drawn["#222"][-1].startswith(f"{xs[2]:.1f},")
    names = [t for t in chart.iter("text") if t.text in ("a <b>", "held out", "long")]
    heights = sorted(float(str(t.get("y"))) for t in names)
    assert len(names) == 3 and min(np.diff(heights)) >= 13.9, "names at line ends do not overlap"

    rows = [
        DotRow(name="HT", strong=True, marks=[Mark(value=0.25, interval=(0.0, 0.5)), Mark(value=1.0, shape="square")]),
        DotRow(name="CS", marks=[]),
    ]
    dots = ET.fromstring(dot_plot(rows, label="l", x_title="Dice", x_range=(0, 1)))  # noqa: S314
    (dot,) = dots.iter("circle")
    bar = next(line for line in dots.iter("line") if line.get("stroke"))
    low, high = float(str(bar.get("x1"))), float(str(bar.get("x2")))
    assert float(str(dot.get("cx"))) == pytest.approx((low + high) / 2, abs=0.11)


def test_numbers_never_flatter() -> None:
    assert epsilon_text(7.991) == "8.00" and epsilon_text(8.0) == "8.00" and epsilon_text(0.001) == "0.01"
    assert [duration_text(s) for s in (12.4, 600, 7200)] == ["12 s", "10 min", "2.0 h"]


def test_a_browser_draws_the_page(tmp_path: Path) -> None:
    picture = _picture(tmp_path / "1.png")
    _write(tmp_path, _results(), previews={"HT": [{"file": picture, "caption": "sub-1"}]})
    shot = tmp_path / "shot.png"
    with Browser() as browser:
        browser.screen((1200, 5600))
        browser.open((tmp_path / "report.html").as_uri())
        browser.shoot(shot, whole=False)
        assert browser.faults == []
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    assert pixels.shape == (5600, 1200, 3)
    assert (pixels == 255).all(-1).mean() > 0.5, "a white page"
    for colour in ((200, 68, 11), (31, 95, 168), (128, 128, 128)):  # held out, training, the picture
        assert (np.abs(pixels - colour).max(-1) <= 3).sum() > 50, colour
    assert (pixels[:400].min(-1) < 100).sum() > 1000, "text at the top"
