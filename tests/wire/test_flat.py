"""Frozen dataclasses <-> flat keys."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from wire.flat import ConfigError, cast_scalar, from_flat, known_keys, nearest, require, require_choice, to_flat


@dataclass(frozen=True)
class Inner:
    """A nested table."""

    step_size: float = 0.5

    def __post_init__(self) -> None:
        """Check."""
        require(self.step_size > 0, "step-size", self.step_size, "> 0")


@dataclass(frozen=True)
class Outer:
    """A table of every scalar kind."""

    num_rounds: int = 3
    is_fast: bool = False
    name: str = "x"
    inner: Inner = Inner()


def test_flattening_and_building_are_inverse():
    value = Outer(7, True, "y", Inner(0.25))
    assert to_flat(value, "a.") == {"a.num-rounds": 7, "a.is-fast": True, "a.name": "y", "a.inner.step-size": 0.25}
    assert from_flat(Outer, to_flat(value, "a."), "a.") == value
    assert from_flat(Outer, {}) == Outer()


def test_known_keys_carry_their_types():
    assert known_keys(Outer) == {"num-rounds": int, "is-fast": bool, "name": str, "inner.step-size": float}


def test_a_choice_names_the_nearest_and_looks_for_it_only_where_it_is_wrong(monkeypatch):
    with pytest.raises(ConfigError, match=r"rule: got 'mediam', expected 'mean' or 'median'; did you mean 'median'\?"):
        require_choice("rule", "mediam", ("mean", "median"))
    monkeypatch.setattr("wire.flat.nearest", lambda word, known: pytest.fail("a search for nothing"))
    require_choice("rule", "median", ("mean", "median"))


def test_an_unknown_key_names_the_nearest_known_one():
    with pytest.raises(ConfigError, match=r"unknown key 'inner.stepsize'; did you mean 'inner.step-size'\?"):
        from_flat(Outer, {"inner.stepsize": 1.0})


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("num-rounds", 3.0, r"expected int \(a whole number\), got float 3\.0"),
        ("num-rounds", True, r"expected int \(a whole number\), got bool True"),
        ("is-fast", 1, r"expected bool \(true or false\), got int 1"),
        ("name", 5, r"expected str \(a text\), got int 5"),
        ("inner.step-size", "0.5", r"expected float \(a number\), got str '0\.5'"),
        ("inner.step-size", float("nan"), "expected a finite number"),
        ("inner.step-size", float("inf"), "expected a finite number"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_both_types(key, value, expected):
    with pytest.raises(ConfigError, match=f"config: {key}: {expected}"):
        from_flat(Outer, {key: value})


def test_an_integer_is_a_fine_float():
    assert cast_scalar("a", 1, float) == 1.0
    assert isinstance(cast_scalar("a", 1, float), float)


def test_a_value_out_of_range_is_named_with_its_table():
    with pytest.raises(ConfigError, match=r"^config: inner\.step-size: got -1\.0, expected > 0$"):
        from_flat(Outer, {"inner.step-size": -1})


def test_nothing_is_suggested_where_nothing_is_near():
    assert nearest("zzzz", ["abc"]) == ""
