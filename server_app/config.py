"""The run config: flat kebab-case keys <-> frozen dataclasses. Everything a run can be told is a field here."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from strategies import LOOPS, STRATEGIES
from strategies.loop import LoopConfig, in_force
from strategies.robust import RobustConfig
from strategies.setting import DeploymentConfig
from wire.check import Limits
from wire.flat import (
    ConfigError,
    Scalar,
    cast_scalar,
    from_flat,
    kind_name,
    known_keys,
    nearest,
    require,
    require_choice,
    to_flat,
)
from wire.message import CompressionConfig, DataConfig, ModelConfig, TrainConfig


@dataclass(frozen=True)
class FleetConfig:
    """Who the simulated clients are.

    Attributes
    ----------
    name : ``uniform``, ``linear:SIGMA``, ``two-tier``, ``jetson-16``, ``long-tail`` or a TOML file; ``none`` in
        deployment, where the clock is the wall.
    noise : relative standard deviation of durations.
    drop_out_ratio : share of the requests that are never answered.
    """

    name: str = "linear:5"
    noise: float = 0.02
    drop_out_ratio: float = 0.0

    def __post_init__(self) -> None:
        """Check every range."""
        require(0 <= self.noise < 1, "noise", self.noise, "in [0, 1)")
        require(0 <= self.drop_out_ratio < 1, "drop-out-ratio", self.drop_out_ratio, "in [0, 1)")


@dataclass(frozen=True)
class EvaluationConfig:
    """What is evaluated, where and how often.

    Attributes
    ----------
    where : ``central`` (the server's held-out set), ``federated`` (each client's own test part) or ``both``.
    every : rounds between two evaluations; the last round is always evaluated.
    own_classes : on clients, only the classes that a client has are possible answers: its identity is known there.
    own_statistics : on clients, BatchNorm's statistics are re-estimated on the client's own training images before its
        test (HeteroFL's static batch normalisation): a merge of unequal widths fits no sub-model's.
    family_every : rounds between two evaluations of the sub-models in use.
    calibration : share of the held-out set kept, unlabelled, for re-estimating BatchNorm statistics.
    """

    where: str = "central"
    every: int = 1
    own_classes: bool = False
    own_statistics: bool = False
    family_every: int = 5
    calibration: float = 0.2

    def __post_init__(self) -> None:
        """Check every range."""
        require_choice("where", self.where, ("central", "federated", "both"))
        require(self.every >= 1, "every", self.every, ">= 1")
        require(self.family_every >= 1, "family-every", self.family_every, ">= 1")
        require(0 < self.calibration < 1, "calibration", self.calibration, "in (0, 1)")


@dataclass(frozen=True)
class RunConfig:
    """One run.

    Attributes
    ----------
    strategy : the method; its own settings are the keys ``STRATEGY.*``.
    num_rounds, num_clients, seed : of the run.
    transport : ``grid`` (Flower's engines) or ``local`` (a pool of processes, without Flower's engine).
    num_workers : client processes of this machine; 0 for as many as cores. With ``transport=local`` a single one is
        this process itself.
    reply_timeout_s : a client that takes longer, on the wall, has failed.
    keep_checkpoints : newest checkpoints kept.
    run_dir : folder of this run; chosen below ``results/`` when empty.
    resume : checkpoint, or folder of a run, to continue.
    """

    strategy: str = "adaptcl"
    num_rounds: int = 40
    num_clients: int = 10
    seed: int = 0
    transport: str = "grid"
    num_workers: int = 0
    reply_timeout_s: float = 600.0
    keep_checkpoints: int = 2
    run_dir: str = ""
    resume: str = ""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    loop: LoopConfig = LoopConfig()
    fleet: FleetConfig = FleetConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    compression: CompressionConfig = CompressionConfig()
    robust: RobustConfig = RobustConfig()
    deployment: DeploymentConfig = DeploymentConfig()
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        """Check every range."""
        require(
            self.strategy in STRATEGIES,
            "strategy",
            self.strategy,
            f"one of {', '.join(STRATEGIES)}{nearest(self.strategy, STRATEGIES)}",
        )
        require(self.num_rounds >= 1, "num-rounds", self.num_rounds, ">= 1")
        require(self.num_clients >= 1, "num-clients", self.num_clients, ">= 1")
        require(self.seed >= 0, "seed", self.seed, ">= 0")
        require(self.transport in ("grid", "local"), "transport", self.transport, "'grid' or 'local'")
        require(self.num_workers >= 0, "num-workers", self.num_workers, ">= 0")
        require(self.reply_timeout_s > 0, "reply-timeout-s", self.reply_timeout_s, "> 0")
        require(self.keep_checkpoints >= 1, "keep-checkpoints", self.keep_checkpoints, ">= 1")
        require(
            self.loop.preset in ("", *LOOPS),
            "loop.preset",
            self.loop.preset,
            f"one of {', '.join(LOOPS)}, or nothing{nearest(self.loop.preset, LOOPS)}",
        )


@dataclass(frozen=True)
class Config:
    """A run and the settings of its method.

    Attributes
    ----------
    run : what every run has.
    method : instance of the strategy's ``Config``.
    preset : instance of the ``Config`` of ``loop.preset``; None without.
    """

    run: RunConfig = field(default_factory=RunConfig)
    method: Any = None
    preset: Any = None

    def flat(self) -> dict[str, Scalar]:
        """Every key in force, the chosen strategy's and the loop preset's only."""
        preset = to_flat(self.preset, self.run.loop.preset + ".") if self.preset is not None else {}
        return to_flat(self.run) | to_flat(self.method, self.run.strategy + ".") | preset


def parse(flat: Mapping[str, Any]) -> Config:
    """Read a run config; absent keys take their defaults.

    Raises
    ------
    ConfigError
        If a key is unknown, a value has the wrong type or range, or settings of the loop contradict each other.
        Settings of other strategies are checked as well.
    """
    every = _all_keys()
    for key, value in flat.items():
        if key not in every:
            raise ConfigError(f"config: unknown key {key!r}{nearest(key, every)}")
        if every[key] is int and isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ConfigError(f"config: {key}: got {value!r}, expected a whole number of at most 64 bits")
    general = {key: value for key, value in flat.items() if key in known_keys(RunConfig)}
    run = from_flat(RunConfig, general)
    methods: dict[str, Any] = {}
    for name, kind in STRATEGIES.items():
        own = {key: value for key, value in flat.items() if key.startswith(name + ".")}
        methods[name] = from_flat(kind.Config, own, name + ".")
    preset = run.strategy if run.strategy in LOOPS else run.loop.preset
    if preset:
        run = replace(run, loop=in_force(run.loop, preset, methods[preset], run.num_clients))
    run.loop.check(run.num_clients, "" if run.compression.kind == "none" else "compression")
    return Config(run, methods[run.strategy], methods.get(preset))


def parse_overrides(words: list[str]) -> dict[str, Scalar]:
    """``["num-rounds=20", "strategy=heterofl"]`` -> typed values.

    Raises
    ------
    ConfigError
        If a word is no ``key=value``, the key is unknown, or the value has the wrong type.
    """
    every = _all_keys()
    flat: dict[str, Scalar] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise ConfigError(f"config: expected key=value, got {word!r}")
        if key not in every:
            raise ConfigError(f"config: unknown key {key!r}{nearest(key, every)}")
        flat[key] = _read(key, text, every[key])
    return flat


def _read(key: str, text: str, kind: type) -> Scalar:
    if kind is str:
        return text.strip("'\"")
    try:
        # JSON's words and numbers, and what people write as well: True, .5
        value = json.loads(text.lower() if kind is bool else text)
    except json.JSONDecodeError:
        try:
            value = float(text)
        except ValueError:
            raise ConfigError(f"config: {key}: expected {kind_name(kind)}, got {text!r}") from None
    return cast_scalar(key, value, kind)


def defaults() -> dict[str, Scalar]:
    """Every key there is, with its default: the content of ``[tool.flwr.app.config]``."""
    flat = to_flat(RunConfig())
    for name, kind in STRATEGIES.items():
        flat |= to_flat(kind.Config(), name + ".")
    return flat


def absolute(config: Config, base: Path) -> Config:
    """Paths made absolute, relative to ``base``: clients and server run in other directories."""
    data, run = config.run.data, config.run
    kind, colon, path = data.name.partition(":")
    if colon and kind in ("npz", "folder"):
        data = replace(data, name=f"{kind}:{join(base, path)}")
    data = replace(data, dir=str(join(base, data.dir)))
    fleet = run.fleet
    if fleet.name.endswith(".toml"):
        fleet = replace(fleet, name=str(join(base, fleet.name)))
    run_dir, resume = (str(join(base, path)) if path else "" for path in (run.run_dir, run.resume))
    return replace(config, run=replace(run, data=data, fleet=fleet, run_dir=run_dir, resume=resume))


def join(base: Path, path: str) -> Path:
    """``path`` made absolute, relative to ``base``; a ``~`` in front is the home folder."""
    return Path(os.path.normpath(base / Path(path).expanduser()))


def _all_keys() -> dict[str, type]:
    every = known_keys(RunConfig)
    for name, kind in STRATEGIES.items():
        every |= known_keys(kind.Config, name + ".")
    return every


def as_toml(flat: Mapping[str, Scalar]) -> str:
    """Flat keys as TOML lines; dotted keys become tables by TOML's own rule."""
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in flat.items())


if __name__ == "__main__":
    print(as_toml(defaults()), end="")
