"""What the split methods share: the cut, what clients are told, the average of client halves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pruning.groups import Layout
from pruning.merge import AggregateResult, MaskedMean
from pruning.spec import FULL
from strategies.setting import Setting
from wire.activations import ActivationError
from wire.flat import ConfigError, Scalar
from wire.message import Report
from wire.smashed import SmashedStep, unpack_upload
from zoo.cut import CutError, CutModel, cut_model, smashed_shape


@dataclass(frozen=True)
class Halves:
    """A cut model, from shapes alone.

    Attributes
    ----------
    layer : behind which it is cut.
    cut : the model without storage, cut.
    shape : of one sample's activations at the cut.
    num_classes : logits.
    client_keys : entries of the client's half.
    """

    layer: str
    cut: CutModel
    shape: tuple[int, ...]
    num_classes: int
    client_keys: frozenset[str]

    @property
    def sample_bytes(self) -> int:
        """One sample's activations in fp32: what the server holds, and the most that travels."""
        return 4 * torch.Size(self.shape).numel()

    def client_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The client's half of a state."""
        return {key: tensor for key, tensor in state.items() if key in self.client_keys}

    def unpack(self, companions: Mapping[str, Tensor], num_steps: int, step_size: int) -> tuple[SmashedStep, ...]:
        """The steps of an upload; ``ActivationError`` if it is not what it should be, or more than was asked for."""
        return unpack_upload(companions, self.shape, self.num_classes, num_steps, step_size)

    def check_weights(self, state: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
        """Raise ``ConfigError`` unless a report holds exactly the client's half."""
        missing, extra = self.client_keys - state.keys(), state.keys() - self.client_keys
        if missing or extra:
            raise ConfigError(f"report: missing entries {sorted(missing)}, unexpected entries {sorted(extra)}")
        for key, tensor in state.items():
            if tensor.shape != like[key].shape:
                expected = tuple(like[key].shape)
                raise ConfigError(f"report: {key!r} should have shape {expected}, got {tuple(tensor.shape)}")
            if not bool(torch.isfinite(tensor).all()):
                raise ConfigError(f"report: {key!r} holds NaN or infinity")


def halves_of(setting: Setting, layer: str) -> Halves:
    """Cut the run's model.

    Raises
    ------
    ConfigError
        If it cannot be cut there.
    """
    if setting.network is None or not setting.image_shape:
        raise ConfigError("split learning needs Setting.network and Setting.image_shape, got none")
    try:
        cut = cut_model(setting.network, layer)
    except CutError as error:
        raise ConfigError(f"config: {error}") from error
    shape = smashed_shape(cut.client, setting.image_shape)
    with torch.no_grad():
        num_classes = cut.server.eval()(torch.empty(2, *shape, device="meta")).shape[1]
    return Halves(layer, cut, shape, num_classes, frozenset(cut.client.state_dict()))


def check_split(setting: Setting, name: str, is_averaged: bool = False) -> None:
    """Refuse what makes no sense with split learning, whatever the method.

    Parameters
    ----------
    is_averaged : whether clients' answers meet in a mean of the whole model, which may be a robust one.

    Raises
    ------
    ConfigError
        If answers could be stale, or weights would be compressed or regularised that never travel.
    """
    loop, job = setting.loop, setting.job
    for is_wrong, key, why in (
        (
            loop.max_staleness != 0,
            "loop.max-staleness",
            "rounds that wait for everybody have nothing stale; set 0",
        ),
        (loop.mixing_rate != 1, "loop.mixing-rate", "the server's half is trained, not averaged; set 1"),
        (
            not (is_averaged or setting.robust.is_plain),
            "robust.*",
            "what clients send is trained on, not averaged; leave it out",
        ),
        (job.compression.kind != "none", "compression.kind", "activations have encodings of their own; set none"),
        (job.train.sparsity > 0, "train.sparsity", "the regulariser needs the whole model in one place; set 0"),
    ):
        if is_wrong:
            raise ConfigError(f"config: {key}: not with strategy {name!r}: {why}")


def largest_batch(batch_size: int) -> int:
    """Samples of the largest step that a client makes: a last batch of one example joins the one before."""
    return batch_size + 1


def count_of(report: Report, name: str, local_epochs: int) -> int:
    """A number of steps that a client has to say.

    Raises
    ------
    ActivationError
        If it is missing, no whole number, negative, or more than its examples are good for in a round.
    """
    value = report.metrics.get(name, -1.0)
    if not (float(value).is_integer() and 0 <= value <= local_epochs * max(1, report.num_examples)):
        got = "nothing" if name not in report.metrics else f"{value:g}"
        raise ActivationError(f"report: {name}: got {got}, expected a number of steps")
    return int(value)


def common_settings(setting: Setting, halves: Halves, partition_id: int, rate: float) -> dict[str, Scalar]:
    """What every request to a client of a split model says."""
    return {
        "cut": halves.layer,
        "seed": setting.job.seed,
        "partition": partition_id,
        "learning-rate": rate,
        "labels": halves.num_classes,
    }


def average(halves: Halves, state: Mapping[str, Tensor]) -> MaskedMean:
    """A running mean of client halves."""
    return MaskedMean(halves.client_state(state), Layout(()))


def add_half(mean: MaskedMean, half: Mapping[str, Tensor], weight: float) -> None:
    """Add one client's half to a running mean."""
    mean.add(dict(half), FULL, weight)


def merged(state: dict[str, Tensor], num_clients: int) -> AggregateResult:
    """A merge that was no mean: ``num_clients`` took part in all of it."""
    holders = {key: torch.tensor(float(num_clients)) for key in state}
    return AggregateResult(state, holders, holders, float(num_clients), num_clients)
