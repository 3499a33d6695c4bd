# SPDX-License-Identifier: Apache-2.0
"""The study file: every kind of fault gives one line with place, key, finding and remedy; valid files round-trip."""

import hashlib
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import jsonschema
import pytest
from hypothesis import given, settings

from fedneuro.privacy.errors import ContractViolation, StudyError
from fedneuro.privacy.study import Study
from fedneuro.privacy.study_file import describe, json_schema, load_study, reference_markdown
from fedneuro.privacy.study_words import section_schemas, toml_value

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "simulations" / "studies").glob("*.toml"))

VALID = """\
# A small study.
[study]
name = "toy"

[data]
modalities = [
  "FLAIR",  # a bracket ] in a comment
  "T1w",
]
normalise = "zscore"

[training]
rounds = 3
local_steps = 2
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "toy.toml"
    path.write_text(text, encoding="utf-8")
    return path


def faults(folder: Path, text: str, *overrides: str) -> list[str]:
    """The lines of the StudyError that ``text`` gives, without the folder."""
    with pytest.raises(StudyError) as caught:
        load_study(write(folder, text), overrides)
    return str(caught.value).replace(f"{folder}/", "").splitlines()


def test_valid_study_has_its_values_and_defaults(tmp_path: Path) -> None:
    study = load_study(write(tmp_path, VALID))
    assert study.data.modalities == ("FLAIR", "T1w")
    assert (study.training.rounds, study.training.local_steps) == (3, 2)
    assert study.privacy.mode == "local"


def test_byte_order_mark_of_windows_editors_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "toy.toml"
    path.write_bytes(b"\xef\xbb\xbf" + VALID.replace("\n", "\r\n").encode())
    assert load_study(path).hash == load_study(write(tmp_path, VALID)).hash


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        (
            "rounds = 3",
            "ruonds = 3",
            "toy.toml:13: training.ruonds = 3: unknown key; did you mean rounds? (allowed: rounds, local_steps, ",
        ),
        (
            '"zscore"',
            '"zscor"',
            'toy.toml:10: data.normalise = "zscor": expected one of "zscore", "percentile", "none", "nyul", "window"; '
            'did you mean "zscore"?',
        ),
        (
            "rounds = 3",
            'rounds = "3"',
            'toy.toml:13: training.rounds = "3": expected an integer from 1 to 10000, found the string "3"',
        ),
        (
            "rounds = 3",
            "rounds = 3.5",
            "toy.toml:13: training.rounds = 3.5: expected an integer from 1 to 10000, found the number 3.5",
        ),
        (
            "rounds = 3",
            "rounds = true",
            "toy.toml:13: training.rounds = true: expected an integer from 1 to 10000, found true",
        ),
        ("rounds = 3", "rounds = 0", "toy.toml:13: training.rounds = 0: expected an integer from 1 to 10000"),
        (
            "rounds = 3",
            "learning_rate = 0",
            "toy.toml:13: training.learning_rate = 0: expected a number above 0, at most 100",
        ),
        ("rounds = 3", "ema = nan", "toy.toml:13: training.ema = nan: expected a number at least 0, below 1"),
        (
            "rounds = 3",
            "learning_rate = -inf",
            "toy.toml:13: training.learning_rate = -inf: expected a number above 0, at most 100",
        ),
        (
            "rounds = 3",
            "rounds = 2026-01-01",
            "toy.toml:13: training.rounds = 2026-01-01: expected an integer from 1 to 10000, found the date 2026-01-01",
        ),
        (
            "rounds = 3",
            "rounds = {a = 1}",
            "toy.toml:13: training.rounds: expected an integer from 1 to 10000, found a table of keys",
        ),
        (
            '"T1w",',
            "3,",
            'toy.toml:6: data.modalities = ["FLAIR", 3]: expected a list of 1 to 8 strings of the form '
            "^([a-z]+-[A-Za-z0-9]+_)*[A-Za-z0-9]+$; item 2 is 3, found the integer 3",
        ),
        (
            'normalise = "zscore"',
            "patch = [64]",
            "toy.toml:10: data.patch = [64]: expected a list of 2 to 3 integers from 8 to 1024",
        ),
        (
            'normalise = "zscore"',
            "patch = 64",
            "toy.toml:10: data.patch = 64: expected a list of 2 to 3 integers from 8 to 1024, found the integer 64; "
            "write [64]",
        ),
        (
            'normalise = "zscore"',
            "rounds = 4",
            "toy.toml:10: data.rounds = 4: unknown key; it belongs to [training] (allowed: modalities, ",
        ),
        (
            'name = "toy"',
            'name = "Toy study"',
            'toy.toml:3: study.name = "Toy study": expected a string of the form ^[a-z0-9][a-z0-9-]{0,63}$ '
            "(Short name: lower case, digits, hyphens.)",
        ),
        ('name = "toy"', "", "toy.toml:2: study.name: missing; expected a string of the form ^[a-z0-9]"),
        ("[data]", "[dota]", "toy.toml:5: [dota]: unknown section; did you mean [data]? (allowed: study, task, data, "),
        ("[data]", "[data.extra]", "toy.toml:5: data.extra: unknown key (allowed: modalities, "),
        ("# A small study.", "seed = 1", "toy.toml:1: seed = 1: a key outside the sections; it belongs to [study]"),
        ("# A small study.", "model = 1", "toy.toml:1: model = 1: expected a section: [model] on a line of its own"),
        ("# A small study.", "[[model]]", "toy.toml:1: model = [{}]: expected a section: [model] on a line of its own"),
        (
            "local_steps = 2",
            "local_steps = 2\nlocal_epochs = 1",
            "toy.toml:14: training.local_steps: both local_steps and local_epochs are set; give exactly one of them",
        ),
        (
            "local_steps = 2",
            "momentum = 0.9\nlocal_steps = 2",
            'toy.toml:14: training.momentum: momentum with optimizer = "adam"; momentum belongs to "sgd"',
        ),
        (
            'normalise = "zscore"',
            "patch = [64, 64, 64]",
            "toy.toml:10: data.patch has 3 numbers while model.dims = 2; give 2",
        ),
        (
            'normalise = "zscore"',
            "patch = [60, 64]",
            "toy.toml:10: data.patch = [60, 64] with 4 levels in model.channels; every side must be a multiple of 8",
        ),
        (
            "local_steps = 2",
            "local_epochs = 1",
            'toy.toml:12: training.local_steps: training.local_epochs with privacy.mode = "local"; private training',
        ),
        (
            "rounds = 3",
            "rounds = 3\nrounds = 4",
            "toy.toml:14: training.rounds is given twice, first in line 13; remove one",
        ),
        (
            "local_steps = 2",
            "local_steps = 2\n[training.init]\nsteps = 0",
            "toy.toml:16: training.init.steps = 0: expected an integer from 1 to 1000000",
        ),
        (
            "local_steps = 2",
            "local_steps = 2\ninit.form = 1",
            "toy.toml:15: training.init.form = 1: unknown key; did you mean from? (allowed: from, steps, ",
        ),
        (
            "rounds = 3",
            "init = 3",
            "toy.toml:13: training.init = 3: expected a section: [training.init] on a line of its own",
        ),
        (
            "local_steps = 2",
            'local_steps = 2\n[training.init]\nlesions = ["mass", "mas"]',
            'toy.toml:16: training.init.lesions = ["mass", "mas"]: expected a list of 1 to 16 names out of "blob", '
            '"mass", "multifocal", "wedge"; item 2 is "mas"; did you mean "mass"?',
        ),
        (
            "local_steps = 2",
            'local_steps = 2\n[training.init]\nfrom = "checkpoint"',
            'toy.toml:15: training.init.sha256: no sha256 with from = "checkpoint"; give what sha256sum prints',
        ),
        (
            "local_steps = 2",
            'local_steps = 2\n[training.init]\npath = "model.safetensors"',
            'toy.toml:16: training.init.path: path with from = ""; path belongs to from = "checkpoint"',
        ),
        (
            "[training]",
            '[task]\nlabels = ["a", "b"]\n[training]\ninit.from = "phantoms"',
            "toy.toml:15: training.init.from: phantoms for segmentation of 2 labels; phantoms teach",
        ),
        ("[data]", "[study]", "toy.toml:5: study is given twice, first in line 2; remove one of them"),
        (
            "rounds = 3",
            "rounds = three",
            "toy.toml:13: not TOML: Invalid value: rounds = three; strings stand in double",
        ),
        ("rounds = 3", "rounds 3", "toy.toml:13: not TOML: Expected '=' after a key in a key/value pair: rounds 3; "),
        ("local_steps = 2\n", "local_steps = [2\n", "toy.toml:15: not TOML: Unclosed array: end of the file; "),
    ],
)
def test_one_fault_one_line(tmp_path: Path, old: str, new: str, line: str) -> None:
    assert VALID.count(old) >= 1
    found = faults(tmp_path, VALID.replace(old, new, 1))
    assert len(found) == 1
    assert found[0].startswith(line)


def test_all_faults_are_reported_at_once_in_the_order_of_the_file_overrides_last(tmp_path: Path) -> None:
    text = VALID.replace("rounds = 3", "rounds = 0").replace('"zscore"', '"Z"').replace('"toy"', '""')
    found = faults(tmp_path, text, "privacy.epsilon=0")
    assert [line.split(" ")[0] for line in found[:3]] == ["toy.toml:3:", "toy.toml:10:", "toy.toml:13:"]
    assert found[3] == "--set privacy.epsilon=0: expected a number above 0, at most 1000"
    assert len(found) == 4


def test_missing_sections_show_as_their_missing_keys(tmp_path: Path) -> None:
    found = faults(tmp_path, "")
    assert [line.split(": ")[1] for line in found] == ["study.name", "training.local_steps"]


def test_lines_are_right_behind_multi_line_strings_and_arrays(tmp_path: Path) -> None:
    text = (
        '[study]\nname = "toy"\ndescription = """\nA text\n[data]\nseed = 3 # no key\n"""\nseed = -1\n'
        '[training]\nlocal_steps = 2\n[evaluation]\nheldout = [\n  "[a",\n  "b = 3",\n]\nevery = -1\n'
    )
    found = faults(tmp_path, text)
    assert [line.split(": ")[:2] for line in found] == [
        ["toy.toml:8", "study.seed = -1"],
        ["toy.toml:12", 'evaluation.heldout = ["[a", "b = 3"]'],
        ["toy.toml:16", "evaluation.every = -1"],
    ]


def test_dotted_and_quoted_keys_and_inline_tables_have_lines(tmp_path: Path) -> None:
    text = 'study.name = "toy"\n\ntraining . "rounds" = 0\ntraining.local_steps = 2\nprivacy = {mode = "x"}\n'
    found = faults(tmp_path, text)
    assert [line.split(" ")[0] for line in found] == ["toy.toml:3:", "toy.toml:5:"]


def test_long_and_multi_line_values_are_cut(tmp_path: Path) -> None:
    found = faults(tmp_path, VALID.replace('"zscore"', '"""' + "x\n" * 500 + '"""'))
    assert len(found) == 1
    assert len(found[0]) < 250


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("privacy.mode=none", "privacy", "mode", "none"),
        ('privacy.mode="none"', "privacy", "mode", "none"),
        ("privacy.epsilon=8", "privacy", "epsilon", 8.0),
        ("privacy.delta = 1e-6", "privacy", "delta", 1e-6),
        ('evaluation.heldout=["HT"]', "evaluation", "heldout", ("HT",)),
        ("study.name=glioma-2", "study", "name", "glioma-2"),
        ("data.split_key=a=b", "data", "split_key", None),
        ('data.split_key="a=b"', "data", "split_key", "a=b"),
        ("training.rounds=5", "training", "rounds", 5),
    ],
)
def test_overrides(tmp_path: Path, override: str, section: str, key: str, value: object) -> None:
    path = write(tmp_path, VALID)
    if value is None:
        with pytest.raises(StudyError, match="not a TOML value"):
            load_study(path, [override])
    else:
        assert getattr(getattr(load_study(path, [override]), section), key) == value


def test_the_last_override_wins_and_an_override_mends_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, VALID.replace("rounds = 3", "rounds = 0"))
    assert load_study(path, ["training.rounds=4", "training.rounds=5"]).training.rounds == 5


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("training.rounds=0", "--set training.rounds=0: expected an integer from 1 to 10000"),
        (
            "training.rounds=ten",
            '--set training.rounds=ten: expected an integer from 1 to 10000, found the string "ten"',
        ),
        ("training.ronds=3", "--set training.ronds=3: unknown key; did you mean rounds? (allowed: "),
        ("trainig.rounds=3", "toy.toml: [trainig]: unknown section; did you mean [training]?"),
        (
            "evaluation.heldout=HT",
            "--set evaluation.heldout=HT: expected a list of strings of the form ^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$, "
            'found the string "HT"; write ["HT"]',
        ),
        ("training.local_epochs=3", "toy.toml:14: training.local_steps: both local_steps and local_epochs are set; "),
        ("rounds=3", "--set rounds=3: expected section.key=value, such as --set training.rounds=5"),
        ("training.rounds", "--set training.rounds: expected section.key=value, such as"),
        ("a.b.c=1", "--set a.b.c=1: expected section.key=value, such as"),
        (
            "data.patch=[32, 32",
            "--set data.patch=[32, 32: [32, 32 is not a TOML value; strings need quotes, lists brackets",
        ),
        ("study.description=two words", "--set study.description=two words: two words is not a TOML value; strings"),
        ("training.init=4", "--set training.init=4: expected a section: [training.init] on a line of its own"),
        ("training.rounds.x=4", "--set training.rounds.x=4: expected section.key=value, such as"),
        (
            "training.init.steps=x",
            "--set training.init.steps=x: expected an integer from 1 to 1000000, found the string",
        ),
        (
            "training.init.from=phantom",
            '--set training.init.from=phantom: expected one of "", "phantoms", "checkpoint"; did you mean "phantoms"?',
        ),
        ("training.rounds=", "--set training.rounds=: nothing is not a TOML value; strings need quotes"),
    ],
)
def test_faulty_overrides_name_themselves(tmp_path: Path, override: str, line: str) -> None:
    found = faults(tmp_path, VALID, override)
    assert len(found) == 1
    assert found[0].startswith(line)


def test_an_override_cannot_smuggle_a_second_key(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="not a TOML value"):
        load_study(write(tmp_path, VALID), ["training.rounds=1\nother = 2"])


def test_bytes_of_the_command_line_that_are_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="not a TOML value"):
        load_study(write(tmp_path, VALID), ['study.description="\udcff"'])


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    write(tmp_path, VALID)
    cases: dict[Path, str] = {
        tmp_path / "tyo.toml": rf"tyo\.toml: no such study file; did you mean {re.escape(str(tmp_path))}/toy\.toml\?",
        tmp_path / "none" / "x.toml": r"x\.toml: no such study file$",
        tmp_path: "a folder; give the study file",
        tmp_path / "toy.toml" / "below": "cannot be read: Not a directory",
        tmp_path / ("x" * 300): "cannot be read: File name too long",
    }
    for path, message in cases.items():
        with pytest.raises(StudyError, match=message):
            load_study(path)
    (tmp_path / "latin.toml").write_bytes('name = "ü"'.encode("latin-1"))
    with pytest.raises(StudyError, match=r"latin\.toml: not UTF-8 text \(byte 8\)"):
        load_study(tmp_path / "latin.toml")


@pytest.mark.parametrize("text", ["a = " + "[" * 5000, "a = " + "9" * 5000])
def test_hostile_nesting_and_numbers_are_one_line(tmp_path: Path, text: str) -> None:
    assert len(faults(tmp_path, text)) == 1


def studies() -> st.SearchStrategy[dict[str, Any]]:
    """Valid studies, over keys of every type."""
    text = st.text(st.characters(codec="utf-8"), max_size=40)
    name = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,12}", fullmatch=True)
    return st.fixed_dictionaries(
        {
            "study": st.fixed_dictionaries(
                {"name": st.just("toy")}, optional={"description": text, "seed": st.integers(0, 2**32 - 1)}
            ),
            "training": st.fixed_dictionaries(
                {"local_steps": st.integers(1, 1000)},
                optional={
                    "learning_rate": st.floats(0, 100, exclude_min=True) | st.integers(1, 100),
                    "optimizer": st.sampled_from(["sgd", "adam", "adamw"]),
                    "rounds": st.integers(1, 10_000),
                },
            ),
        },
        optional={
            "data": st.fixed_dictionaries(
                {},
                optional={
                    "spacing": st.lists(st.floats(1e-300, 20), min_size=3, max_size=3),
                    "patch": st.lists(st.integers(1, 128).map(lambda n: 8 * n), min_size=2, max_size=2),
                    "split_key": text.filter(bool),
                },
            ),
            "privacy": st.fixed_dictionaries(
                {}, optional={"delta": st.floats(0, 1, exclude_min=True, exclude_max=True)}
            ),
            "evaluation": st.fixed_dictionaries({}, optional={"heldout": st.lists(name, unique=True, max_size=4)}),
        },
    )


@settings(max_examples=150, deadline=None)
@given(values=studies())
def test_the_effective_study_is_a_study_file_of_the_same_hash(
    values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    study = Study.parse(values)
    path = tmp_path_factory.getbasetemp() / "effective.toml"
    path.write_text(describe(study), encoding="utf-8", newline="")
    again = load_study(path)
    assert again.hash == study.hash
    assert again == study


ANY_VALUE = st.recursive(
    st.booleans()
    | st.integers()
    | st.sampled_from([10**400, -(10**30), 0.5, -0.0])
    | st.floats()
    | st.text(st.characters(codec="utf-8"), max_size=8)
    | st.dates()
    | st.times()
    | st.datetimes(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.from_regex(r"[a-z]{1,3}", fullmatch=True), inner, max_size=2)
    ),
    max_leaves=4,
)
KNOWN_KEYS = [(section, key) for section, keys in section_schemas().items() for key in keys]


@settings(max_examples=300)
@given(
    keys=st.lists(
        st.tuples(st.sampled_from(KNOWN_KEYS) | st.tuples(st.text(max_size=3), st.text(max_size=3)), ANY_VALUE),
        max_size=4,
        unique_by=lambda item: item[0],
    ),
    override=ANY_VALUE,
)
def test_whatever_stands_in_a_study_is_a_study_or_one_line_per_fault(
    keys: list[tuple[tuple[str, str], Any]], override: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """No value of TOML, in any key, gives anything but a study or a StudyError with lines that name their place."""
    lines = ['study.name = "toy"', "training.local_steps = 1"]
    given_keys = {("study", "name"), ("training", "local_steps")}
    for (section, key), value in keys:
        if (section, key) not in given_keys:
            table = section if section in section_schemas() else toml_value(section)
            lines.append(f"{table}.{toml_value(key)} = {toml_value(value)}")
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_text("\n".join(lines), encoding="utf-8", newline="")
    try:
        study = load_study(path, [f"data.normalise={toml_value(override)}"])
    except StudyError as error:
        found = str(error).splitlines()
        assert found
        assert [line for line in found if not line.startswith((str(path), "--set "))] == []
    else:
        assert load_study(path, [f"data.normalise={toml_value(override)}"]).hash == study.hash


def test_describe_names_the_hash_and_every_key_with_its_meaning(tmp_path: Path) -> None:
    study = load_study(write(tmp_path, VALID))
    text = describe(study)
    assert study.hash in text
    assert tomllib.loads(text) == json.loads(study.canonical)
    assert "# Step size. A number above 0, at most 100.\nlearning_rate = 0.001\n" in text


def test_comments_order_and_written_out_defaults_leave_the_hash_alone(tmp_path: Path) -> None:
    first = load_study(write(tmp_path, VALID)).hash
    training = "[training]\nlocal_steps=2\nrounds=3\nlearning_rate=0.001\n"
    other = training + '[data]\nmodalities=["FLAIR","T1w"]\n[study]\nname="toy"\n'
    assert load_study(write(tmp_path, other)).hash == first
    assert load_study(write(tmp_path, VALID), ["study.seed=1"]).hash != first


def test_path_of_a_checkpoint_is_no_part_of_the_study(tmp_path: Path) -> None:
    """Its digest is: the path stays at the coordinator, and a study that comes in a message may not name one."""
    sets = ["training.init.from=checkpoint", f'training.init.sha256="{"a" * 64}"']
    bare = load_study(write(tmp_path, VALID), sets)
    study = load_study(write(tmp_path, VALID), [*sets, 'training.init.path="/data/model.safetensors"'])
    assert study.training.init.path == "/data/model.safetensors"
    assert study.canonical == bare.canonical
    assert load_study(write(tmp_path, describe(study))) == study
    assert Study.from_canonical(study.canonical, study.hash).training.init.path == ""
    assert load_study(write(tmp_path, VALID), [sets[0], f'training.init.sha256="{"b" * 64}"']).hash != study.hash
    forged = study.canonical.replace(b'"init":{', b'"init":{"path":"/etc/passwd",')
    with pytest.raises(ContractViolation, match="canonical"):
        Study.from_canonical(forged, hashlib.sha256(forged).hexdigest())


def test_json_schema_accepts_what_is_valid_and_refuses_what_is_not() -> None:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    validator.validate(tomllib.loads(VALID))
    for wrong in ("rounds = 0", 'rounds = "3"', "ruonds = 3"):
        assert not validator.is_valid(tomllib.loads(VALID.replace("rounds = 3", wrong)))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_studies_are_valid_for_us_and_for_editors(path: Path) -> None:
    assert load_study(path).study.name == path.stem
    jsonschema.validate(tomllib.loads(path.read_text(encoding="utf-8")), json_schema())


def test_every_key_has_a_description() -> None:
    for section in json_schema()["$defs"].values():
        assert section["description"]
        for key, schema in section["properties"].items():
            assert schema["description"].rstrip().endswith("."), key


def test_generated_documents_are_up_to_date() -> None:
    """Run ``make docs`` where this fails."""
    assert (ROOT / "docs" / "study-file.md").read_text(encoding="utf-8") == reference_markdown()
    assert json.loads((ROOT / "docs" / "study.schema.json").read_text(encoding="utf-8")) == json_schema()


def test_toml_values_survive_control_characters() -> None:
    text = 'a"b\\c\n\t\x7f\x00é😀'
    assert tomllib.loads(f"v = {toml_value(text)}") == {"v": text}
