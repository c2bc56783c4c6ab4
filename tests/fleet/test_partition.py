"""Partitions deal out everything exactly once, in the way their scheme promises."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.names import FleetError
from fleet.partition import PartitionError, label_counts, partition_labels, split_local

SKEWED = [
    "iid",
    "dirichlet:0.1",
    "dirichlet:1e-6",
    "dirichlet:10",
    "balanced-dirichlet:0.1",
    "merged-dirichlet:0.1",
    "quantity:0",
    "quantity:2",
]
BALANCED = np.repeat(np.arange(10), 200)


@st.composite
def labels_and_clients(draw):
    labels = np.array(draw(st.lists(st.integers(0, 6), min_size=1, max_size=120)))
    min_size = draw(st.integers(0, min(4, len(labels))))
    num_clients = draw(st.integers(1, max(1, len(labels) // max(min_size, 1))))
    return labels, num_clients, min_size


@given(case=labels_and_clients(), scheme=st.sampled_from(SKEWED), seed=st.integers(0, 1000))
def test_parts_are_sorted_disjoint_complete_large_enough_and_the_same_for_the_same_seed(case, scheme, seed):
    labels, num_clients, min_size = case
    parts = partition_labels(labels, num_clients, scheme, seed, min_size)
    assert len(parts) == num_clients
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    assert all((np.diff(part) > 0).all() and part.dtype == np.int64 for part in parts)
    assert min(len(part) for part in parts) >= min_size
    again = partition_labels(labels, num_clients, scheme, seed, min_size)
    assert all(np.array_equal(one, other) for one, other in zip(parts, again, strict=True))


@given(
    labels=st.lists(st.integers(0, 6), min_size=60, max_size=200).map(np.array),
    num_clients=st.integers(7, 12),
    per_client=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_pathological_parts_are_complete_and_hold_no_more_labels_than_asked(labels, num_clients, per_client, seed):
    parts = partition_labels(labels, num_clients, f"pathological:{per_client}", seed)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    assert all(len(np.unique(labels[part])) <= per_client for part in parts)


@pytest.mark.parametrize("seed", range(5))
def test_pathological_clients_of_balanced_classes_hold_exactly_as_many_labels_as_asked(seed):
    parts = partition_labels(BALANCED, 10, "pathological:2", seed)
    assert [len(np.unique(BALANCED[part])) for part in parts] == [2] * 10
    assert {len(part) for part in parts} == {200}


def test_another_seed_deals_out_otherwise():
    for scheme in [*SKEWED, "pathological:2"]:
        one, other = (partition_labels(BALANCED, 10, scheme, seed) for seed in (0, 1))
        assert any(not np.array_equal(a, b) for a, b in zip(one, other, strict=True)), scheme


@pytest.mark.parametrize("scheme", ["iid", "balanced-dirichlet:0.3"])
def test_balanced_schemes_give_sizes_that_differ_by_one_at_most(scheme):
    assert np.ptp([len(part) for part in partition_labels(BALANCED, 7, scheme)]) <= 1


@pytest.mark.parametrize("scheme", ["dirichlet", "balanced-dirichlet"])
def test_label_skew_grows_as_alpha_falls(scheme):
    def mean_largest_share(alpha: float) -> float:
        shares = []
        for seed in range(5):
            counts = label_counts(BALANCED, partition_labels(BALANCED, 10, f"{scheme}:{alpha}", seed, 1), 10)
            shares.append((counts.max(1) / counts.sum(1)).mean())
        return float(np.mean(shares))

    nearly_uniform, mild, strong = (mean_largest_share(alpha) for alpha in (1000, 1, 0.05))
    assert nearly_uniform < 0.15 < mild < strong
    assert strong > 0.6


def test_a_client_of_a_merged_dirichlet_is_eight_pseudo_clients_and_so_less_skewed_than_one():
    parts = partition_labels(BALANCED, 10, "merged-dirichlet:0.1", 3, 0)
    pseudo = {tuple(part) for part in partition_labels(BALANCED, 80, "dirichlet:0.1", 3, 0) if len(part)}
    for part in parts:
        inside = [mine for mine in pseudo if set(mine) <= set(part.tolist())]
        assert sum(map(len, inside)) == len(part)
        assert len(inside) <= 8

    def mean_largest_share(scheme: str) -> float:
        counts = label_counts(BALANCED, partition_labels(BALANCED, 10, scheme, 3, 1), 10)
        return float((counts.max(1) / counts.sum(1)).mean())

    assert mean_largest_share("merged-dirichlet:0.1") < 0.8 * mean_largest_share("dirichlet:0.1")


def test_dirichlet_shares_of_a_label_have_the_mean_and_variance_of_their_distribution():
    alpha, num_clients = 0.5, 5
    shares = np.concatenate(
        [
            label_counts(BALANCED, partition_labels(BALANCED, num_clients, f"dirichlet:{alpha}", seed, 0), 10).T / 200
            for seed in range(60)
        ]
    )
    mean = 1 / num_clients
    variance = mean * (1 - mean) / (alpha * num_clients + 1)
    assert abs(shares.mean() - mean) < 1e-9
    assert abs(shares.var() - variance) < 0.1 * variance


def test_quantity_skew_has_the_configured_spread_of_sizes():
    labels = np.zeros(200_000, int)
    logs = np.log([len(part) for part in partition_labels(labels, 1000, "quantity:1", 0)])
    assert abs(logs.std() - 1) < 0.1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"num_clients": 2001}, "use fewer clients"),
        ({"num_clients": 100, "min_size": 21}, "need 2100 samples, got 2000"),
        ({"num_clients": 0}, "num-clients"),
        ({"scheme": "dirichelet:1"}, "Did you mean 'dirichlet'"),
        ({"scheme": "dirichlet:0"}, "a number > 0"),
        ({"scheme": "dirichlet"}, "got ''"),
        ({"scheme": "balanced-dirichlet:x"}, "got 'x'"),
        ({"scheme": "merged-dirichlet:0"}, "merged-dirichlet:0.*a number > 0"),
        ({"scheme": "iid:3"}, "takes no parameter"),
        ({"scheme": "quantity:-1"}, "a number >= 0"),
        ({"scheme": "pathological:0"}, "a whole number >= 1"),
        ({"scheme": "pathological:1.5"}, "a whole number >= 1"),
        ({"scheme": "pathological:1", "num_clients": 5}, "at least 2 labels a client"),
        ({"scheme": "pathological:201", "num_clients": 10}, "2010 shards"),
        (
            {"scheme": "pathological:2", "num_clients": 10, "labels": np.array([0] * 1000 + [1] * 3), "min_size": 100},
            "min",
        ),
        ({"seed": -1}, "seed"),
        ({"min_size": -1}, "min-size"),
        ({"labels": np.zeros((3, 2), int)}, "in one row"),
        ({"labels": np.zeros(30)}, "integers"),
        ({"labels": np.array([0, -1] * 20)}, ">= 0"),
    ],
)
def test_what_cannot_be_dealt_out_is_an_error_that_says_why(arguments, expected):
    with pytest.raises(PartitionError, match=expected):
        partition_labels(**({"labels": BALANCED, "num_clients": 10} | arguments))


def test_a_partition_error_is_a_fleet_error_and_a_value_error():
    assert issubclass(PartitionError, FleetError)
    assert issubclass(PartitionError, ValueError)


@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=80).map(np.array),
    test_ratio=st.floats(0, 0.95),
    seed=st.integers(0, 100),
)
def test_local_split_is_complete_disjoint_sorted_and_leaves_something_to_train_and_test_on(labels, test_ratio, seed):
    indices = np.random.default_rng(seed).permutation(len(labels))[: max(1, len(labels) // 2)]
    train, test = split_local(indices, labels, test_ratio, seed)
    assert sorted([*train, *test]) == sorted(indices)
    assert (np.diff(train) > 0).all()
    assert (np.diff(test) > 0).all()
    assert len(train) >= 1
    assert (len(test) >= 1) == (len(indices) >= 2 and test_ratio > 1e-6) or test_ratio <= 1e-6


@given(labels=st.lists(st.integers(0, 4), min_size=10, max_size=200).map(np.array), seed=st.integers(0, 100))
def test_local_split_has_every_label_in_proportion_to_within_one_sample(labels, seed):
    _, test = split_local(np.arange(len(labels)), labels, 0.25, seed)
    share = len(test) / len(labels)
    for label in np.unique(labels):
        assert abs((labels[test] == label).sum() - share * (labels == label).sum()) < 1 + 1e-9


def test_local_split_has_the_asked_number_of_test_samples():
    assert len(split_local(np.arange(30), np.zeros(30, int), 0.1)[1]) == 3
    assert len(split_local(np.arange(1797), np.zeros(1797, int), 0.2)[1]) == 360


def test_local_split_without_a_test_ratio_or_of_one_sample_has_no_test_part():
    assert len(split_local(np.arange(10), np.zeros(10, int), 0.0)[1]) == 0
    assert len(split_local([3], np.zeros(10, int), 0.5)[1]) == 0
    assert len(split_local([], np.zeros(10, int), 0.5)[0]) == 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"test_ratio": 1.0}, "test-ratio"),
        ({"test_ratio": -0.1}, "test-ratio"),
        ({"indices": [10]}, "0 to 9"),
        ({"seed": -1}, "seed"),
    ],
)
def test_a_local_split_that_cannot_be_made_is_an_error(arguments, expected):
    with pytest.raises(PartitionError, match=expected):
        split_local(**({"indices": [1, 2], "labels": np.zeros(10, int), "test_ratio": 0.5} | arguments))


def test_label_counts_are_samples_by_client_and_class():
    counts = label_counts([0, 1, 1, 3], (np.array([0, 1]), np.array([2, 3]), np.array([], int)), 4)
    np.testing.assert_array_equal(counts, [[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]])


def test_a_label_beyond_the_number_of_classes_is_an_error():
    with pytest.raises(PartitionError, match="reach 3"):
        label_counts([0, 3], (np.array([0, 1]),), 3)
