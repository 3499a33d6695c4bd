# SPDX-License-Identifier: Apache-2.0
"""``node.toml``: what is right is read in full, what is wrong is one line that names it."""

from pathlib import Path

import pytest

from fedneuro.client.node_settings import load_node_settings
from fedneuro.privacy.contract import Role
from fedneuro.privacy.errors import BadInput

HASH = "0123456789abcdef" * 4
GOOD = f"""
[site]
name = "hospital-1"
role = "heldout"
public_size = 40
data = "bids"
state = "state"

[study]
approved = ["{HASH}"]

[superlink]
address = "coordinator.example.org:8000"
root_certificate = "ca.crt"
key = "node.key"

[runner]
port = 9094
secret = "runner.secret"
bundle = "{HASH}"
"""


@pytest.fixture
def node(tmp_path: Path) -> Path:
    (tmp_path / "bids").mkdir()
    for name, mode in (("ca.crt", 0o644), ("node.key", 0o600), ("runner.secret", 0o600)):
        (tmp_path / name).write_text("x")
        (tmp_path / name).chmod(mode)
    (tmp_path / "node.toml").write_text(GOOD)
    return tmp_path / "node.toml"


def test_a_good_file_gives_the_sites_settings(node: Path) -> None:
    settings = load_node_settings(node)
    site = settings.site_settings()
    assert site.name == "hospital-1"
    assert site.role is Role.HELDOUT
    assert site.public_size == 40
    assert site.data == node.parent / "bids"  # relative to the file, not to where the command runs
    assert site.state == node.parent / "state"
    assert site.cache is None
    assert site.approved == frozenset({HASH})
    assert settings.superlink.root_certificate == str(node.parent / "ca.crt")
    assert site.identity == node.parent / "node.key"
    assert site.peers is None
    with pytest.raises(ValueError, match="frozen"):
        settings.site.name = "other"  # type: ignore[misc]


def test_peers_are_named_with_their_keys(node: Path) -> None:
    node.write_text(f'{GOOD}\n[[peer]]\nname = "hospital-2"\nkey = "{HASH}"\n')
    assert load_node_settings(node).site_settings().peers == frozenset({("hospital-2", HASH)})


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("public_size = 40", "public_sise = 40", ["site.public_sise", "did you mean public_size?"]),
        ("[study]", "[studies]", ["studies is not a known key", "did you mean study?"]),
        ("public_size = 40", "", ["site.public_size is missing"]),
        ("public_size = 40", "public_size = 0", ["site.public_size = 0", "greater than or equal to 1"]),
        ("public_size = 40", 'public_size = "40"', ["site.public_size = '40'", "valid integer"]),
        ('role = "heldout"', 'role = "king"', ["site.role = 'king'", "'train' or 'heldout'"]),
        ('name = "hospital-1"', 'name = "../x"', ["site.name"]),
        (f'approved = ["{HASH}"]', 'approved = ["all"]', ["study.approved.0 = 'all'"]),
        (":8000", "", ["superlink.address"]),
        ("port = 9094", "port = 94000", ["runner.port = 94000"]),
        ('data = "bids"', 'data = "nowhere"', ["site.data: there is no folder", "nowhere"]),
        ('key = "node.key"', 'key = "other.key"', ["superlink.key: there is no file", "other.key"]),
        ("[site]", "[site", ["is not TOML"]),
        (GOOD, "site = 3", ["site = 3"]),
    ],
)
def test_a_wrong_file_is_named_in_one_line(node: Path, old: str, new: str, words: list[str]) -> None:
    assert old in GOOD
    node.write_text(GOOD.replace(old, new))
    with pytest.raises(BadInput) as error:
        load_node_settings(node)
    text = str(error.value)
    assert text.startswith(f"{node}: ")
    assert "\n" not in text
    for word in words:
        assert word in text


@pytest.mark.parametrize("name", ["node.key", "runner.secret"])
def test_a_secret_that_others_can_read_is_refused(node: Path, name: str) -> None:
    (node.parent / name).chmod(0o640)
    with pytest.raises(BadInput, match="chmod 600"):
        load_node_settings(node)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"node\.toml: cannot be read \(No such file"):
        load_node_settings(tmp_path / "node.toml")
