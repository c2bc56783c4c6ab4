"""The run config: every key works, every mistake is named."""

from __future__ import annotations

import tomllib

import pytest

from server_app.config import absolute, as_toml, defaults, parse, parse_overrides
from strategies import LOOPS, STRATEGIES
from tests.runs import tiny_run
from wire.flat import ConfigError, kebab, to_flat


def test_every_default_parses_back_to_itself():
    flat = defaults()
    for name, kind in STRATEGIES.items():
        config = parse({**flat, "strategy": name})
        assert config.method == kind.Config()
        expected = {k: v for k, v in {**flat, "strategy": name}.items() if k in config.flat()}
        if name in LOOPS:
            expected |= {"loop.preset": name}
            expected |= {f"loop.{kebab(k)}": v for k, v in kind.Config().loop_settings(config.run.num_clients).items()}
        assert config.flat() == expected
        assert parse(config.flat()) == config
        assert {**config.flat(), **to_flat(kind.Config(), name + ".")} == config.flat()


@pytest.mark.parametrize("key", defaults())
def test_every_key_can_be_written_on_the_command_line(key):
    value = defaults()[key]
    text = value if isinstance(value, str) else str(value).lower()
    assert parse_overrides([f"{key}={text}"]) == {key: value}


def test_the_resolved_config_is_toml_that_parses_back(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(as_toml(defaults()))
    assert tomllib.loads(path.read_text())["loop"]["quorum"] == 0


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({"num-roundz": 3}, r"unknown key 'num-roundz'; did you mean 'num-rounds'\?"),
        ({"adaptcl.pruning-intervall": 3}, r"did you mean 'adaptcl.pruning-interval'\?"),
        ({"strategy": "adaptlc"}, r"strategy: got 'adaptlc', expected one of .*did you mean 'adaptcl'\?"),
        ({"num-rounds": "3"}, r"num-rounds: expected int \(a whole number\), got str '3'"),
        ({"num-rounds": 0}, "num-rounds: got 0, expected >= 1"),
        ({"num-clients": 0}, "num-clients: got 0"),
        ({"train.learning-rate": True}, r"train\.learning-rate: expected float \(a number\), got bool True"),
        ({"train.learning-rate": -0.1}, r"train\.learning-rate: got -0\.1, expected > 0"),
        ({"train.momentum": 1.0}, r"train\.momentum: got 1\.0, expected in \[0, 1\)"),
        ({"train.augment": "blur"}, r"train\.augment: got 'blur', expected 'none' or 'flip-shift'"),
        ({"loop.mixing-rate": 0.0}, r"loop\.mixing-rate: got 0\.0"),
        ({"loop.quorum": 11, "num-clients": 10}, "loop.quorum=11: only 10 clients take part"),
        ({"loop.staleness": "linear"}, "loop.*staleness.*'linear'.*'constant', 'polynomial:A' or 'hinge:A:B'"),
        ({"fleet.noise": float("nan")}, "fleet.noise: expected a finite number"),
        ({"evaluation.where": "moon"}, r"evaluation\.where: got 'moon'"),
        ({"data.test-ratio": 1.0}, r"data\.test-ratio: got 1\.0"),
        ({"compression.kind": "zip"}, r"compression\.kind: got 'zip', expected 'none' or 'dgc'"),
        ({"adaptcl.rates.alpha": 0.0}, r"adaptcl\.rates\.alpha: got 0"),
        ({"strategy": "fedavg", "heterofl.rates": "1,2"}, r"heterofl\.rates: got '1,2'"),
        ({"heterofl.assignment": "random"}, r"heterofl\.assignment: got 'random'"),
        ({"transport": "pigeon"}, "transport: got 'pigeon'"),
        ({"seed": 10**21}, r"seed: got 10{21}, expected a whole number of at most 64 bits"),
        ({"train.batch-size": 2**63}, r"train\.batch-size: got \d+, expected a whole number of at most 64 bits"),
        ({"data.seed": -1}, r"data\.seed: got -1, expected >= 0"),
    ],
)
def test_a_bad_key_or_value_is_named_with_what_was_expected(flat, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse(flat)
    assert str(caught.value).startswith("config: ")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("num-rounds", "expected key=value, got 'num-rounds'"),
        ("num-rouds=3", "did you mean 'num-rounds'"),
        ("num-rounds=three", r"num-rounds: expected int \(a whole number\), got 'three'"),
        ("num-rounds=3.5", r"num-rounds: expected int \(a whole number\), got float 3\.5"),
        ("data.download=yes", r"data\.download: expected bool \(true or false\), got 'yes'"),
        ("train.learning-rate=NaN", "expected a finite number"),
    ],
)
def test_a_bad_word_on_the_command_line_is_named(word, message):
    with pytest.raises(ConfigError, match=message):
        parse_overrides([word])


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("train.learning-rate=.5", 0.5),
        ("train.learning-rate=1.", 1.0),
        ("train.learning-rate=1e-3", 0.001),
        ("model.exits=True", True),
        ("model.exits=false", False),
        ("strategy='fedavg'", "fedavg"),
    ],
)
def test_values_are_read_as_people_write_them(word, value):
    assert list(parse_overrides([word]).values()) == [value]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model.name": "resnet19"}, "unknown model 'resnet19', did you mean 'resnet1?8'"),
        ({"data.name": "digit"}, "Did you mean 'digits'"),
        ({"fleet.name": "unifrom"}, "Did you mean 'uniform'"),
        ({"data.partition": "dirichlet"}, "partition 'dirichlet': expected a number > 0, got ''"),
        (
            {"num-clients": 400, "data.min-size": 2},
            r"400 clients with at least 2 samples each need 800 samples, got \d+",
        ),
        ({"data.max-test": 3}, r"data\.max-test: the held-out set has 3 examples, expected at least 4"),
    ],
)
def test_what_only_shows_when_the_run_is_built_stops_it_before_training(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        tiny_run(tmp_path / "run", **settings)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_paths_become_absolute_and_names_stay_names(tmp_path):
    flat = {"data.name": "npz:a.npz", "data.dir": "d", "fleet.name": "f/x.toml", "run-dir": "r", "resume": "/abs/old"}
    run = absolute(parse(flat), tmp_path).run
    assert run.data.name == f"npz:{tmp_path / 'a.npz'}"
    assert run.data.dir == str(tmp_path / "d")
    assert run.fleet.name == str(tmp_path / "f" / "x.toml")
    assert (run.run_dir, run.resume) == (str(tmp_path / "r"), "/abs/old")
    named = absolute(parse({"data.name": "package.module:function", "fleet.name": "linear:5"}), tmp_path).run
    assert (named.data.name, named.fleet.name, named.run_dir) == ("package.module:function", "linear:5", "")
