# SPDX-License-Identifier: Apache-2.0
"""Strategies against Flower's own classes, over three rounds; where ours differ on purpose, that is undone first."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import (
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedTrimmedAvg,
    FedYogi,
    Krum,
    MultiKrum,
)
from flwr.supercore.task_identity import TaskIdentity
from numpy.typing import NDArray

from fedneuro.server.strategies import build_strategy
from tests.server.test_strategies import study_of

Floats = NDArray[np.float32]
SITES = 7


@pytest.fixture(autouse=True)
def identity() -> Iterator[None]:
    """Flower's messages ask which task they belong to."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    yield
    for name in ("_task_id", "_run_id", "_node_id"):
        setattr(TaskIdentity, name, None)


def replies_of(number: int, model: Floats) -> list[tuple[Floats, int]]:
    rng = np.random.default_rng(number)
    return [(model + rng.normal(0.3, 1.0, model.shape).astype(np.float32), 10 * (i + 1)) for i in range(SITES)]


def flower_round(strategy: Any, number: int, replies: Sequence[tuple[Floats, int]]) -> Floats:
    messages = []
    for node, (array, size) in enumerate(replies):
        request = Message(RecordDict(), dst_node_id=node + 1, message_type="train")
        records: dict[str, Any] = {
            "arrays": ArrayRecord({"w": Array(array)}), "metrics": MetricRecord({"num-examples": size}),
        }  # fmt: skip
        messages.append(Message(RecordDict(records), reply_to=request))
    found, _ = strategy.aggregate_train(number, messages)
    return np.asarray(found["w"].numpy(), np.float32)


def start(strategy: Any, model: Floats) -> None:
    """What Flower's ``configure_train`` remembers of the model that goes out."""
    remembered: Any = {"w": model}
    if isinstance(strategy, FedAvgM):
        remembered = ArrayRecord({"w": Array(model)})
    setattr(strategy, "current_arrays", remembered)  # noqa: B010 - its type differs between the classes


ADAPTIVE: dict[str, Any] = {"eta": 0.1, "beta_1": 0.8, "tau": 1e-2}
MOMENTUM: dict[str, Any] = {"server_learning_rate": 0.5, "server_momentum": 0.8}
KEYS: dict[str, Any] = {"learning_rate": 0.1, "momentum": 0.8, "adaptivity": 1e-2}


@pytest.mark.parametrize(
    ("name", "keys", "flower", "equal"),
    [
        ("fedavg", {}, FedAvg(), False),
        ("fedavgm", {"momentum": 0.8, "learning_rate": 0.5}, FedAvgM(**MOMENTUM), False),
        ("fedadam", KEYS | {"second_moment": 0.95}, FedAdam(**ADAPTIVE, beta_2=0.95), False),
        ("fedyogi", KEYS | {"second_moment": 0.95}, FedYogi(**ADAPTIVE, beta_2=0.95), False),
        ("fedadagrad", KEYS | {"momentum": 0.0}, FedAdagrad(eta=0.1, tau=1e-2), False),
        ("trimmed_mean", {"trim": 0.3}, FedTrimmedAvg(beta=0.3), False),
        ("median", {}, FedMedian(), False),
        ("krum", {"byzantine": 2}, Krum(num_malicious_nodes=2), False),
        # Flower weighs those that Multi-Krum keeps by their own count; Blanchard's mean, and ours, is even.
        ("krum", {"keep": 3}, MultiKrum(num_malicious_nodes=1, num_nodes_to_select=3), True),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_three_rounds_as_flower(name: str, keys: dict[str, Any], flower: Any, *, equal: bool) -> None:
    ours, model = build_strategy(study_of(name, **keys)), np.linspace(-1, 1, 50, dtype=np.float32)
    for number in (1, 2, 3):
        replies = [(array, 1 if equal else size) for array, size in replies_of(number, model)]
        if number == 1 and hasattr(flower, "v_t"):
            flower.v_t = {"w": np.full_like(model, flower.tau**2)}  # Reddi et al. begin at τ², Flower at 0
        if isinstance(flower, FedAdam):  # Flower's correction of the start, with round + 1, is not in the paper
            correction = np.sqrt(1 - flower.beta_2 ** (number + 1)) / (1 - flower.beta_1 ** (number + 1))
            flower.eta = 0.1 / correction
        start(flower, model)
        expected = flower_round(flower, number, replies)
        ours.begin({"w": model}, [size for _, size in replies])
        for array, size in replies:
            ours.fold({"w": array}, size)
        found = np.asarray(ours.finish()["w"], np.float32)
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)
        model = found
