# SPDX-License-Identifier: Apache-2.0
"""Unsafe layers and losses are named with reason and remedy, and replaced where a fixer knows how."""

import pytest
import torch
from torch import nn

from fedneuro.privacy.dpsgd import check_loss, check_network, fix, validators
from fedneuro.privacy.dpsgd.validators import findings, opacus_objections, twice_registered
from fedneuro.privacy.errors import BadInput


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (nn.BatchNorm2d(4), "mix patients.*; use InstanceNorm or GroupNorm"),
        (nn.SyncBatchNorm(4), "mix patients"),
        (nn.LazyBatchNorm2d(), "mix patients"),
        (nn.InstanceNorm3d(4, track_running_stats=True), "running statistics.*; set track_running_stats=False"),
        (nn.LazyConv2d(3, 1), "first patient it sees; give its size"),
        (nn.MultiheadAttention(4, 2), "attend to each other; set batch_first=True"),
    ],
)
def test_unsafe_layers_are_named(layer: nn.Module, text: str) -> None:
    network = nn.Sequential(nn.Identity(), nn.ModuleDict({"inner": layer}))
    kind = type(layer).__name__
    with pytest.raises(BadInput, match=rf"layer 1\.inner is {kind}: .*{text}"):
        check_network(network)


def test_safe_layers_pass() -> None:
    shared = nn.Conv2d(4, 4, 1)
    check_network(
        nn.Sequential(
            shared,
            shared,
            nn.InstanceNorm2d(4),
            nn.GroupNorm(2, 4),
            nn.LayerNorm(4),
            nn.Dropout(),
            nn.PReLU(),
            nn.MultiheadAttention(4, 2, batch_first=True),
        )
    )


def test_how_many_more_there_are() -> None:
    with pytest.raises(BadInput, match=r"layer 0 is BatchNorm1d: .* \(and 2 more\)"):
        check_network(nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2), nn.BatchNorm1d(2)))


def test_fixed_networks_pass_and_keep_patients_apart() -> None:
    inner = nn.Sequential(nn.InstanceNorm2d(6, affine=True, track_running_stats=True))
    network = nn.Sequential(nn.Conv2d(1, 6, 1), nn.BatchNorm2d(6), inner).train()
    nn.init.constant_(next(inner.parameters()), 3.0)
    assert fix(network) is network
    assert not list(findings(network))
    assert isinstance(network[1], nn.GroupNorm) and (network[1].num_groups, network[1].num_channels) == (2, 6)
    assert inner[0].running_mean is None and bool((next(inner.parameters()) == 3).all())
    images = torch.randn(3, 1, 4, 4)
    torch.testing.assert_close(network(images)[:1], network(images[:1]))
    assert isinstance(fix(nn.BatchNorm3d(32)), nn.GroupNorm)


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0])), "CrossEntropyLoss: class weights.*couples patients"),
        (nn.CrossEntropyLoss(reduction="sum"), 'reduction="sum" is not a mean'),
    ],
)
def test_losses_that_couple_patients_are_named(loss: nn.Module, text: str) -> None:
    with pytest.raises(BadInput, match=text):
        check_loss(loss)


def test_monais_batch_losses_are_named() -> None:
    from monai.losses.dice import DiceCELoss, DiceLoss

    with pytest.raises(BadInput, match="batch=True couples patients; set batch=False"):
        check_loss(DiceLoss(batch=True))
    with pytest.raises(BadInput, match=r"its part dice.*batch=True"):
        check_loss(DiceCELoss(batch=True))
    check_loss(DiceLoss())
    check_loss(nn.CrossEntropyLoss())


def test_opacus_gives_a_second_opinion(monkeypatch: pytest.MonkeyPatch) -> None:
    """It sees BatchNorm too; where it sees something that the register lets pass, the network is refused."""
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)).eval()
    assert [text[:10] for text in opacus_objections(network)] == ["layer 1: B"]
    assert opacus_objections(nn.Sequential(nn.Conv2d(1, 2, 1), nn.GroupNorm(1, 2), nn.LSTM(2, 2))) == []
    monkeypatch.setattr(validators, "VALIDATORS", [])
    with pytest.raises(BadInput, match="Opacus' validator objects to the network: layer 1: BatchNorm"):
        check_network(network)


def test_modules_under_two_names_are_found() -> None:
    shared = nn.Linear(2, 2)
    assert twice_registered(nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})) == ["b.0"]
    assert twice_registered(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) == []
