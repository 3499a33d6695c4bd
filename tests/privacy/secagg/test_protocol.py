# SPDX-License-Identifier: Apache-2.0
"""The whole protocol in memory: the sum is exact, one message is noise, and a site cannot be talked into more.

``FEDNEURO_FEDERATIONS=1000`` runs the full number of random federations.
"""

import os
import stat
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from fedneuro.privacy.errors import BadInput, ContractViolation, EnvironmentProblem, Refused
from fedneuro.privacy.secagg.aggregator import Aggregation
from fedneuro.privacy.secagg.keys import Identity, RoundKeys, mask_key, self_mask_key
from fedneuro.privacy.secagg.masks import add_streams
from fedneuro.privacy.secagg.messages import Advert
from fedneuro.privacy.secagg.participant import Participant
from tests.privacy.secagg.federation import Federation

FEDERATIONS = int(os.environ.get("FEDNEURO_FEDERATIONS", "12"))
STEPS = ("before_keys", "before_shares", "before_masked", "before_unmask")
POOL = {f"site-{i:02d}": Identity.fresh() for i in range(20)}


def vectors_of(names: list[str], size: int, rng: np.random.Generator) -> dict[str, NDArray[np.uint64]]:
    """Signed numbers of the size that a real grid gives."""
    return {name: rng.integers(-(2**50), 2**50, size).view(np.uint64) for name in names}


def federation(count: int, tolerate: int) -> Federation:
    names = list(POOL)[:count]
    return Federation(names, tolerate=tolerate, identities={name: POOL[name] for name in names})


def check_sum(sites: Federation, dropped: dict[str, list[str]], rng: np.random.Generator) -> None:
    vectors = vectors_of(list(sites.names), 40, rng)
    aggregation, total = sites.run(vectors, **dropped)
    gone = {name for step in STEPS[:3] for name in dropped.get(step, [])}
    assert aggregation.survivors == sorted(set(sites.names) - gone)
    np.testing.assert_array_equal(total, sum(vectors[name] for name in aggregation.survivors))


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("who", range(4))
def test_any_one_of_four_may_vanish_at_any_step(step: str, who: int) -> None:
    sites = federation(4, 1)
    check_sum(sites, {step: [sites.names[who]]}, np.random.default_rng(who))


def test_every_pair_of_steps_for_two_of_seven() -> None:
    rng = np.random.default_rng(5)
    for first, second in product(STEPS, STEPS):
        sites = federation(7, 2)
        dropped: dict[str, list[str]] = {}
        for step, name in zip((first, second), rng.permutation(sites.names)[:2].tolist(), strict=True):
            dropped.setdefault(step, []).append(name)
        check_sum(sites, dropped, rng)


@pytest.mark.parametrize("seed", range(FEDERATIONS))
def test_random_federations_with_random_dropouts(seed: int) -> None:
    """2 to 20 hospitals, every number of dropouts up to the threshold, at steps drawn at random."""
    rng = np.random.default_rng([7, seed])
    count = int(rng.integers(2, 21))
    sites = federation(count, int(rng.integers(0, (count - 1) // 3 + 1)))
    dropped: dict[str, list[str]] = {}
    for name in rng.permutation(sites.names)[: rng.integers(0, sites.tolerate + 1)].tolist():
        dropped.setdefault(STEPS[rng.integers(4)], []).append(name)
    check_sum(sites, dropped, rng)


@pytest.mark.parametrize("step", ["before_masked", "before_unmask"])
def test_one_more_than_may_vanish_and_nothing_is_told(step: str) -> None:
    sites = federation(4, 1)
    with pytest.raises((Refused, ContractViolation), match="needed"):
        check_sum(sites, {step: list(sites.names[:2])}, np.random.default_rng(0))


# -- one message tells nothing ------------------------------------------------------------------------------


def uniform(vector: NDArray[np.uint64]) -> bool:
    """Chi-square over bytes and Kolmogorov-Smirnov over words, at 1e-6."""
    counts = np.bincount(vector.view(np.uint8), minlength=256)
    return bool(stats.chisquare(counts).pvalue > 1e-6 and stats.kstest(vector / 2.0**64, "uniform").pvalue > 1e-6)


def masked_zeros(sites: Federation) -> tuple[Participant, NDArray[np.uint64], bytes]:
    """The first site's message for a vector of zeros, its state before masking, and its self-mask key."""
    adverts = {n: p.advert(sites.identities[n]) for n, p in sites.begin().items()}
    aggregation = Aggregation(sites.terms, sites.roster, adverts, 1)
    for name, part in sites.participants.items():
        aggregation.take_shares(name, part.share(sites.roster, adverts))
    name = sites.names[0]
    part = sites.participants[name]
    part.enter(aggregation.context, aggregation.sealed_for(name))
    own = self_mask_key(part.seed, part.context, name)
    vector = np.zeros(40_000, np.uint64)
    part.mask(vector)
    return part, vector, own


def test_a_message_is_uniform_even_if_every_pairwise_mask_is_known_or_the_self_mask_is() -> None:
    sites = federation(4, 1)
    part, vector, own = masked_zeros(sites)
    assert uniform(vector)
    pairs = [
        mask_key(
            sites.participants[other].keys.masking, part.adverts[part.site].masking, part.context, part.site, other
        )
        for other in sites.names[1:]
    ]
    without_pairs, without_own = vector.copy(), vector.copy()
    add_streams(without_pairs, [], pairs)  # the first by name added all of its pairwise masks
    assert uniform(without_pairs), "the self mask alone must hide the vector"
    add_streams(without_own, [], [own])
    assert uniform(without_own), "the pairwise masks alone must hide the vector"
    one_left = without_own.copy()
    add_streams(one_left, [], pairs[:-1])
    assert uniform(one_left), "one peer that keeps quiet must do"
    add_streams(without_pairs, [], [own])
    assert not without_pairs.any(), "with all masks off the zeros must come out, or this test looks at the wrong keys"


def test_the_test_of_uniformity_rejects_a_plain_vector_and_a_short_mask() -> None:
    rng = np.random.default_rng(1)
    noise = np.rint(rng.normal(0, 2.0**28, 40_000)).astype(np.int64).view(np.uint64)
    assert not uniform(noise)
    assert not uniform(noise + rng.integers(0, 2**60, 40_000).astype(np.uint64))


def test_two_rounds_of_one_vector_share_no_mask() -> None:
    sites = federation(3, 0)
    _, first, _ = masked_zeros(sites)
    _, second, _ = masked_zeros(replace(sites, round=2))
    assert uniform(first - second)


# -- what a site refuses ------------------------------------------------------------------------------------


def entered(count: int = 4, tolerate: int = 1) -> tuple[Federation, Aggregation, dict[str, Advert]]:
    """A federation whose sites have all taken the peers' shares."""
    sites = federation(count, tolerate)
    adverts = {n: p.advert(sites.identities[n]) for n, p in sites.begin().items()}
    aggregation = Aggregation(sites.terms, sites.roster, adverts, 8)
    for name, part in sites.participants.items():
        aggregation.take_shares(name, part.share(sites.roster, adverts))
    for name, part in sites.participants.items():
        part.enter(aggregation.context, aggregation.sealed_for(name))
    return sites, aggregation, adverts


def test_shares_of_both_secrets_of_one_peer_are_never_given() -> None:
    sites, aggregation, _ = entered()
    a, b, c, d = sites.names
    seeds, keys = sites.participants[a].unmask(aggregation.context, {a, b, c})
    assert (set(seeds), set(keys)) == ({a, b, c}, {d})
    with pytest.raises(ContractViolation, match="taken once"):
        sites.participants[a].unmask(aggregation.context, {a, c, d})
    reloaded = Participant.load(sites.participants[b].dump())
    reloaded.unmask(aggregation.context, {a, b, d})
    with pytest.raises(ContractViolation, match="taken once"):
        Participant.load(reloaded.dump()).unmask(aggregation.context, {a, b, c})
    # What two stories give together: of peer c one share each way, of which three were needed.
    assert aggregation.needed == 3


@pytest.mark.parametrize(
    ("survivors", "error", "text"),
    [
        ("ab", Refused, "names 2 sites, 3 are needed"),
        ("bcd", ContractViolation, "leaves out this site"),
        ("abcz", ContractViolation, "did not take part"),
    ],
)
def test_unmasking_of_wrong_survivors(survivors: str, error: type[Exception], text: str) -> None:
    sites, aggregation, _ = entered()
    names = dict(zip("abcd", sites.names, strict=True)) | {"z": "stranger"}
    with pytest.raises(error, match=text):
        sites.participants[sites.names[0]].unmask(aggregation.context, {names[letter] for letter in survivors})


def test_a_vector_is_masked_once_and_never_after_a_restart() -> None:
    sites, _, _ = entered()
    part = sites.participants[sites.names[0]]
    again = Participant.load(part.dump())
    part.mask(np.zeros(8, np.uint64))
    for one in (part, again):
        with pytest.raises(ContractViolation, match="masked once"):
            one.mask(np.zeros(8, np.uint64))


def test_steps_out_of_order_and_of_another_aggregation() -> None:
    sites, aggregation, adverts = entered()
    part = sites.participants[sites.names[0]]
    with pytest.raises(ContractViolation, match="taken once"):
        part.share(sites.roster, adverts)
    with pytest.raises(ContractViolation, match="taken once"):
        part.enter(aggregation.context, aggregation.sealed_for(part.site))
    with pytest.raises(ContractViolation, match="another aggregation"):
        part.unmask("0" * 64, set(sites.names))


def other_identity(sites: Federation, adverts: dict[str, Advert]) -> None:
    name = sites.names[1]
    adverts[name] = Participant.begin(name, sites.terms).advert(Identity.fresh())


def other_round(sites: Federation, adverts: dict[str, Advert]) -> None:
    name = sites.names[1]
    adverts[name] = Participant.begin(name, replace(sites.terms, round=2)).advert(sites.identities[name])


def swapped_keys(sites: Federation, adverts: dict[str, Advert]) -> None:
    name = sites.names[1]
    adverts[name] = replace(adverts[name], encryption=RoundKeys.fresh().public[0])


def own_key_replaced(sites: Federation, adverts: dict[str, Advert]) -> None:
    name = sites.names[0]
    adverts[name] = Participant.begin(name, sites.terms).advert(sites.identities[name])


def own_key_missing(sites: Federation, adverts: dict[str, Advert]) -> None:
    del adverts[sites.names[0]]


def key_twice(sites: Federation, adverts: dict[str, Advert]) -> None:
    one, two = sites.names[1:3]
    keys = sites.participants[one].keys
    adverts[two] = sites.identities[two].advertise(sites.terms.study, 1, two, keys)


def too_few(sites: Federation, adverts: dict[str, Advert]) -> None:
    del adverts[sites.names[1]], adverts[sites.names[2]]


def stranger(sites: Federation, adverts: dict[str, Advert]) -> None:
    adverts["stranger"] = Participant.begin("stranger", sites.terms).advert(Identity.fresh())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (other_identity, "not signed by its identity"),
        (other_round, "not signed by its identity"),
        (swapped_keys, "not signed by its identity"),
        (own_key_replaced, "the key that this site gave"),
        (own_key_missing, "the key that this site gave"),
        (key_twice, "one key twice"),
        (too_few, "2 sites, 3 are needed"),
        (stranger, "did not take part"),
    ],
)
def test_keys_that_are_not_in_order(change: Callable[[Federation, dict[str, Advert]], None], text: str) -> None:
    sites = federation(4, 1)
    adverts = {n: p.advert(sites.identities[n]) for n, p in sites.begin().items()}
    change(sites, adverts)
    with pytest.raises((ContractViolation, Refused), match=text):
        sites.participants[sites.names[0]].share(sites.roster, adverts)


def test_a_roster_too_small_for_what_it_should_tolerate() -> None:
    sites = federation(3, 1)
    adverts = {n: p.advert(sites.identities[n]) for n, p in sites.begin().items()}
    with pytest.raises(BadInput, match="fewer than a third"):
        sites.participants[sites.names[0]].share(sites.roster, adverts)


@pytest.mark.parametrize("change", ["flipped", "of another", "missing", "own"])
def test_sealed_shares_that_were_changed(change: str) -> None:
    sites = federation(4, 1)
    adverts = {n: p.advert(sites.identities[n]) for n, p in sites.begin().items()}
    aggregation = Aggregation(sites.terms, sites.roster, adverts, 8)
    for name, part in sites.participants.items():
        aggregation.take_shares(name, part.share(sites.roster, adverts))
    a, b, c, _ = sites.names
    sealed = aggregation.sealed_for(a)
    match change:
        case "flipped":
            sealed[b] = bytes([sealed[b][0] ^ 1, *sealed[b][1:]])
        case "of another":
            sealed[b] = sealed[c]
        case "missing":
            del sealed[b], sealed[c]
        case _:
            sealed[a] = sealed[b]
    with pytest.raises((ContractViolation, Refused), match=r"changed on the way|needed|this site itself"):
        sites.participants[a].enter(aggregation.context, sealed)


# -- what the server refuses --------------------------------------------------------------------------------


def test_the_server_takes_each_answer_once_and_whole() -> None:
    sites, aggregation, _ = entered()
    a, b = sites.names[:2]
    with pytest.raises(ContractViolation, match="just the other sites"):
        aggregation.take_shares(a, {b: b"x"})
    with pytest.raises(ContractViolation, match="uint64"):
        aggregation.fold(a, np.zeros(8))  # type: ignore[arg-type]
    aggregation.fold(a, np.zeros(8, np.uint64))
    with pytest.raises(ContractViolation, match="not asked for"):
        aggregation.fold(a, np.zeros(8, np.uint64))
    with pytest.raises(ContractViolation, match="that were asked for"):
        aggregation.take_unmask(a, {b: bytes(33)}, {})
    with pytest.raises(ContractViolation, match="0 sites gave their shares, 3 are needed"):
        aggregation.finish()


def test_a_wrong_share_of_a_masking_key_is_found() -> None:
    sites, aggregation, _ = entered()
    a, b, c, d = sites.names
    for name in (a, b, c):
        vector = np.zeros(8, np.uint64)
        sites.participants[name].mask(vector)
        aggregation.fold(name, vector)
    for name in (a, b, c):
        seeds, keys = sites.participants[name].unmask(aggregation.context, {a, b, c})
        aggregation.take_unmask(name, seeds, {d: bytes(32) + b"\x01"} if name == a else keys)
    with pytest.raises(ContractViolation, match=r"secret do not give one|do not give that key"):
        aggregation.finish()


# -- keys on disk -------------------------------------------------------------------------------------------


def test_an_identity_is_made_once_and_readable_by_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "state" / "identity.key"
    first = Identity.at(path, create=True)
    assert Identity.at(path, create=True).public == first.public
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_text("no key")
    with pytest.raises(EnvironmentProblem, match="P-384 key in OpenSSH form"):
        Identity.at(path)


def test_a_saved_state_that_cannot_be_read() -> None:
    for text in ("", "{}", '{"site": 1}'):
        with pytest.raises(ContractViolation, match="cannot be read"):
            Participant.load(text)
