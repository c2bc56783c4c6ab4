"""Attackers in a run: what they do to the mean, and that the robust merges bear them."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import pytest

from client_app import handler as client
from client_app.handler import handle
from strategies import STRATEGIES
from strategies.base import RunStoppedError
from strategies.robust import RobustConfig
from tests.runs import read_rows, select, tiny_run
from wire.flat import ConfigError
from wire.message import Instruction, Report

ATTACKERS = (1, 4)
RUN = {"num-clients": 8, "num-rounds": 6, "train.learning-rate": 0.1, "data.max-train": 800}
ROBUST = {
    "trimmed-mean": {"robust.centre": "trimmed-mean", "robust.trim-ratio": 0.25},
    "median": {"robust.centre": "median"},
}


class Attack:
    """Spoils the answers of the attackers, who also claim ``claims`` times the examples they have."""

    def __init__(self, kind: str, claims: int) -> None:
        self.kind, self.claims = kind, claims

    def __call__(self, instruction: Instruction) -> Report:
        if instruction.partition_id not in ATTACKERS or instruction.action != "train":
            return handle(instruction)
        if self.kind == "label-flipped":
            return self._flipped(instruction)
        report = handle(instruction)
        factor = {"scaled": 50.0, "sign-flipped": -5.0}[self.kind]
        state = {
            key: instruction.state[key] + factor * (tensor - instruction.state[key])
            if tensor.is_floating_point()
            else tensor
            for key, tensor in report.state.items()
        }
        return replace(report, state=state, num_examples=self.claims * report.num_examples)

    def _flipped(self, instruction: Instruction) -> Report:
        honest = client.job_examples

        def flipped(job, partition_id):
            train, test, num_classes = honest(job, partition_id)
            return replace(train, y=num_classes - 1 - train.y), test, num_classes

        client.job_examples = flipped
        try:
            report = handle(instruction)
        finally:
            client.job_examples = honest
        return replace(report, num_examples=self.claims * report.num_examples)


def accuracy(folder, attack: str, claims: int = 10, **settings) -> float:
    """Of the last model; a run may stop early because the attack has ruined all that is trained."""
    with suppress(RunStoppedError):
        tiny_run(folder, Attack(attack, claims) if attack else handle, **{**RUN, **settings})
    rows = read_rows(folder)
    return select(rows, "evaluation", where="central")[-1]["accuracy"]


@pytest.mark.slow
@pytest.mark.parametrize("attack", ["scaled", "sign-flipped", "label-flipped"])
def test_two_attackers_of_eight_ruin_the_mean_and_not_the_robust_merges(attack, tmp_path):
    alone = accuracy(tmp_path / "honest", "", strategy="fedavg")
    assert accuracy(tmp_path / "mean", attack, strategy="fedavg") < alone - 0.2
    for name, settings in ROBUST.items():
        assert accuracy(tmp_path / name, attack, strategy="fedavg", **settings) > alone - 0.12, name


@pytest.mark.slow
@pytest.mark.parametrize("attack", ["scaled", "sign-flipped"])
def test_clipping_bounds_what_long_updates_do_while_weights_are_honest(attack, tmp_path):
    spoiled = accuracy(tmp_path / "mean", attack, claims=1, strategy="fedavg")
    got = accuracy(tmp_path / "clipped", attack, claims=1, strategy="fedavg", **{"robust.clip-factor": 1.0})
    assert got > max(0.75, spoiled + 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ("heterofl", "adaptcl") if name in STRATEGIES])
@pytest.mark.parametrize("attack", ["scaled", "sign-flipped", "label-flipped"])
def test_under_masks_the_robust_merges_bear_every_attack(name, attack, tmp_path):
    """Flipped labels make updates no longer than honest ones: there clipping is left out, and the centre does it."""
    settings = {"strategy": name, "num-rounds": 8}
    clipping = {} if attack == "label-flipped" else {"robust.clip-factor": 2.0}
    assert accuracy(tmp_path / "mean", attack, **settings) < 0.3
    for centre, robust in ROBUST.items():
        got = accuracy(tmp_path / centre, attack, **settings, **clipping, **robust)
        assert got > 0.75, centre


def test_without_attackers_the_default_is_the_plain_mean(tmp_path):
    assert type(RobustConfig().make_mean({}, None)).__name__ == "MaskedMean"  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [{"centre": "krum"}, {"trim_ratio": 0.5}, {"clip_norm": -1.0}, {"clip_factor": -1.0}])
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(ConfigError):
        RobustConfig(**bad)
