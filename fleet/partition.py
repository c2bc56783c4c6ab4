"""Partitions: which samples belong to which client.

Every partitioner deals out all samples, each to exactly one client, and depends on nothing but its arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fleet.names import FleetError, parse_count, parse_number, unknown_name

IndexArray = NDArray[np.int64]

PSEUDO_CLIENTS = 8
"""Parts of ``merged-dirichlet`` that make up one client."""


class PartitionError(FleetError):
    """The samples cannot be dealt out as asked."""


def partition_labels(
    labels: ArrayLike, num_clients: int, scheme: str = "iid", seed: int = 0, min_size: int = 1
) -> tuple[IndexArray, ...]:
    """Deal the samples out to the clients.

    ============================  ==================================================================================
    ``iid``                       equal sizes, at random
    ``dirichlet:ALPHA``           each label's samples in proportions drawn from Dir(ALPHA) over the clients: label
                                  *and* quantity skew (Li et al., "Federated Learning on Non-IID Data Silos", 2022)
    ``balanced-dirichlet:ALPHA``  equal sizes; each client draws its own mix of the L labels from Dir(ALPHA L p), p the
                                  labels' shares (Hsu et al., "Measuring the Effects of Non-Identical Data
                                  Distribution", 2019, whose alpha is ALPHA L): label skew without quantity skew
    ``merged-dirichlet:ALPHA``    ``dirichlet:ALPHA`` over eight times as many pseudo-clients, eight of which, drawn at
                                  random, make a client (the way of Co-S2P's authors; how many they merge is our guess)
    ``pathological:CLASSES``      label-sorted shards, CLASSES a client (McMahan et al., 2017); shards never cross
                                  labels, so that no client sees more than CLASSES of them (as in HeteroFL's code)
    ``label-blocks:CLASSES``      consecutive labels, CLASSES a client: client i gets the block i, or with more clients
                                  than blocks a share of block i modulo their number
    ``quantity:SIGMA``            labels at random, sizes proportional to log-normal draws, exp(SIGMA z)
    ============================  ==================================================================================

    Parameters
    ----------
    labels : class of each sample, integers >= 0, [N].
    num_clients : number of parts.
    scheme : one of the above.
    seed : which random deal, >= 0.
    min_size : least number of samples of a client. Where a skewed scheme (not ``pathological``) leaves a client with
        less, it gets random samples of whoever has most.

    Returns
    -------
    Sorted sample indices of each client, ``num_clients`` arrays; disjoint, together 0 to N - 1.

    Raises
    ------
    PartitionError : labels of another kind, unknown scheme, bad parameter, fewer samples than
        ``num_clients * min_size``, or shards that do not work out.
    """
    classes = _check_labels(labels)
    if num_clients < 1:
        raise PartitionError(f"partition: num-clients must be >= 1, got {num_clients!r}")
    if min_size < 0:
        raise PartitionError(f"partition: min-size must be >= 0, got {min_size!r}")
    if seed < 0:
        raise PartitionError(f"partition: seed must be >= 0, got {seed!r}")
    if len(classes) < num_clients * max(min_size, 1):
        raise PartitionError(
            f"partition: {num_clients} clients with at least {max(min_size, 1)} samples each need "
            f"{num_clients * max(min_size, 1)} samples, got {len(classes)}; use fewer clients or a smaller "
            "data.min-size"
        )
    head, parameter = read_scheme(scheme)
    rng = np.random.default_rng(seed)
    parts = _SCHEMES[head][1](classes, num_clients, parameter, rng)
    if head not in ("pathological", "label-blocks"):
        _fill_up(parts, min_size, rng)
    elif (smallest := min(len(part) for part in parts)) < min_size:
        raise PartitionError(
            f"partition {scheme!r}: a client has {smallest} samples, min-size is {min_size}, and moving samples would "
            "give it other labels; use fewer clients, more classes a client, or a smaller data.min-size"
        )
    return tuple(np.sort(part) for part in parts)


def read_scheme(scheme: str) -> tuple[str, float]:
    """Read the name of a partition scheme: its head and its parameter (0 where it takes none).

    Raises
    ------
    PartitionError : unknown scheme or bad parameter.
    """
    head, _, parameter = scheme.partition(":")
    if head not in _SCHEMES:
        raise PartitionError(unknown_name("partition", head, _SCHEMES))
    try:
        return head, _SCHEMES[head][0](scheme, parameter)
    except PartitionError:
        raise
    except FleetError as error:
        raise PartitionError(str(error)) from None


def split_local(
    indices: ArrayLike, labels: ArrayLike, test_ratio: float, seed: int = 0
) -> tuple[IndexArray, IndexArray]:
    """Split one client's samples into a training and a test part with the same label mix.

    The samples, in random order within each label, are laid in a row sorted by label, and every ``1 / test_ratio``-th
    is a test sample: systematic sampling, so each label's share is right to within one sample.

    Parameters
    ----------
    indices : the client's samples, distinct, [n].
    labels : class of *every* sample of the data set, [N].
    test_ratio : fraction of test samples, in [0, 1).
    seed : which random split, >= 0.

    Returns
    -------
    (train_idx, test_idx), each sorted. The test part has ``ceil(n * test_ratio)`` samples, but leaves one to train on;
    it is empty when ``test_ratio`` is 0 or there are fewer than two samples.

    Raises
    ------
    PartitionError : a ratio outside [0, 1), an index outside the data set, or labels of another kind.
    """
    classes = _check_labels(labels)
    chosen = np.asarray(indices, dtype=np.int64)
    if not 0 <= test_ratio < 1:
        raise PartitionError(f"split: test-ratio must lie in [0, 1), got {test_ratio!r}")
    if seed < 0:
        raise PartitionError(f"split: seed must be >= 0, got {seed!r}")
    if len(chosen) and not (chosen.min() >= 0 and chosen.max() < len(classes)):
        raise PartitionError(
            f"split: indices must lie in 0 to {len(classes) - 1}, got {chosen.min()} to {chosen.max()}"
        )
    # The subtraction keeps a product such as 30 * .1 = 3.0000000000000004 from counting as 4.
    num_test = min(ceil(len(chosen) * test_ratio - 1e-9), len(chosen) - 1)
    if num_test <= 0:
        return np.sort(chosen), np.empty(0, np.int64)
    rng = np.random.default_rng(seed)
    row = rng.permutation(chosen)
    row = row[np.argsort(classes[row], kind="stable")]
    is_test = np.zeros(len(row), bool)
    is_test[((np.arange(num_test) + rng.random()) * len(row) / num_test).astype(np.int64)] = True
    return np.sort(row[~is_test]), np.sort(row[is_test])


def label_counts(labels: ArrayLike, parts: Sequence[IndexArray], num_classes: int) -> NDArray[np.int64]:
    """Count the samples of each label at each client.

    Parameters
    ----------
    labels : class of each sample, [N].
    parts : sample indices of each client.
    num_classes : number of classes.

    Returns
    -------
    Counts, [num_clients, num_classes].

    Raises
    ------
    PartitionError : a label >= ``num_classes``, or labels of another kind.
    """
    classes = _check_labels(labels)
    if len(classes) and classes.max() >= num_classes:
        raise PartitionError(f"label counts: labels reach {classes.max()}, but num_classes is {num_classes}")
    return np.stack([np.bincount(classes[part], minlength=num_classes) for part in parts]).astype(np.int64)


def _check_labels(labels: ArrayLike) -> IndexArray:
    classes = np.asarray(labels)
    if classes.ndim != 1 or classes.dtype.kind not in "iu":
        raise PartitionError(f"labels must be integers in one row, got {classes.dtype} of shape {classes.shape}")
    if len(classes) and classes.min() < 0:
        raise PartitionError(f"labels must be >= 0, got {classes.min()}")
    return classes.astype(np.int64)


def _cut(order: IndexArray, shares: NDArray[np.float64]) -> list[IndexArray]:
    """Cut ``order`` [n] into consecutive pieces in proportion to ``shares`` (sum 1)."""
    # Rounding the running sum, not each share, makes the pieces' sizes add up to n.
    ends = np.rint(np.cumsum(shares) * len(order)).astype(np.int64)
    return np.split(order, ends[:-1])


def _iid(classes: IndexArray, num_clients: int, _: float, rng: np.random.Generator) -> list[IndexArray]:
    return np.array_split(rng.permutation(len(classes)), num_clients)


def _dirichlet(classes: IndexArray, num_clients: int, alpha: float, rng: np.random.Generator) -> list[IndexArray]:
    pieces: list[list[IndexArray]] = [[] for _ in range(num_clients)]
    for label in np.unique(classes):
        members = rng.permutation(np.flatnonzero(classes == label))
        for client, piece in enumerate(_cut(members, _draw_dirichlet(np.full(num_clients, alpha), rng))):
            pieces[client].append(piece)
    return [np.concatenate(piece) for piece in pieces]


def _merged_dirichlet(
    classes: IndexArray, num_clients: int, alpha: float, rng: np.random.Generator
) -> list[IndexArray]:
    pseudo = _dirichlet(classes, num_clients * PSEUDO_CLIENTS, alpha, rng)
    dealt = rng.permutation(len(pseudo)).reshape(num_clients, PSEUDO_CLIENTS)
    return [np.concatenate([pseudo[index] for index in mine]) for mine in dealt]


def _balanced_dirichlet(
    classes: IndexArray, num_clients: int, alpha: float, rng: np.random.Generator
) -> list[IndexArray]:
    present, counts = np.unique(classes, return_counts=True)
    left = [list(rng.permutation(np.flatnonzero(classes == label))) for label in present]
    alphas = alpha * len(present) * counts / len(classes)
    sizes = [len(part) for part in np.array_split(np.arange(len(classes)), num_clients)]
    parts = []
    for size in sizes:
        mix = _draw_dirichlet(alphas, rng)
        part: list[int] = []
        while len(part) < size:
            # Labels that ran out leave the mix; where the whole mix ran out, the rest comes in the proportions left.
            stock = np.array([len(members) for members in left])
            weights = np.where(stock > 0, mix, 0)
            weights = weights / weights.sum() if weights.sum() > 1e-12 else stock / stock.sum()
            wanted = rng.multinomial(size - len(part), weights)
            for members, number in zip(left, np.minimum(wanted, stock), strict=True):
                part.extend(members.pop() for _ in range(number))
        parts.append(np.array(part, np.int64))
    return parts


def _pathological(
    classes: IndexArray, num_clients: int, parameter: float, rng: np.random.Generator
) -> list[IndexArray]:
    per_client = int(parameter)
    present, counts = np.unique(classes, return_counts=True)
    num_shards = num_clients * per_client
    if num_shards < len(present):
        raise PartitionError(
            f"partition 'pathological:{per_client}': {num_clients} clients with {per_client} labels each cannot hold "
            f"{len(present)} labels; use at least {ceil(len(present) / num_clients)} labels a client, or more clients"
        )
    if num_shards > len(classes):
        raise PartitionError(
            f"partition 'pathological:{per_client}': {num_shards} shards need as many samples, got {len(classes)}; "
            "use fewer clients or fewer labels a client"
        )
    slots = np.full(num_clients, per_client)
    parts: list[list[IndexArray]] = [[] for _ in range(num_clients)]
    shards = _shards_per_label(counts, num_shards)
    # Labels with the most shards first, each to those with most room: so a client gets a label twice only if it must.
    for label in sorted(rng.permutation(len(present)), key=lambda label: -shards[label]):
        members = rng.permutation(np.flatnonzero(classes == present[label]))
        pending = np.array_split(members, shards[label])
        while pending:
            for client in np.lexsort((rng.random(num_clients), -slots))[: len(pending)]:
                if slots[client] > 0:
                    parts[client].append(pending.pop())
                    slots[client] -= 1
    return [np.concatenate(part) for part in parts]


def _label_blocks(
    classes: IndexArray, num_clients: int, parameter: float, rng: np.random.Generator
) -> list[IndexArray]:
    per_client = int(parameter)
    present = np.unique(classes)
    num_blocks = ceil(len(present) / per_client)
    if num_clients < num_blocks:
        raise PartitionError(
            f"partition 'label-blocks:{per_client}': {len(present)} labels are {num_blocks} blocks, got {num_clients} "
            "clients; use as many clients, or more labels a block"
        )
    parts: list[IndexArray] = [np.empty(0, np.int64)] * num_clients
    for block in range(num_blocks):
        held = np.isin(classes, present[block * per_client : (block + 1) * per_client])
        owners = range(block, num_clients, num_blocks)
        members = rng.permutation(np.flatnonzero(held))
        for client, part in zip(owners, np.array_split(members, len(owners)), strict=True):
            parts[client] = part
    return parts


def _shards_per_label(counts: NDArray[np.int64], num_shards: int) -> NDArray[np.int64]:
    """Give each label one shard, and every further one to the label whose shards are largest (D'Hondt)."""
    shards = np.ones(len(counts), np.int64)
    for _ in range(num_shards - len(counts)):
        shards[np.argmax(counts / shards)] += 1
    return shards


def _quantity(classes: IndexArray, num_clients: int, sigma: float, rng: np.random.Generator) -> list[IndexArray]:
    logs = sigma * rng.standard_normal(num_clients)
    shares = np.exp(logs - logs.max())
    return _cut(rng.permutation(len(classes)), shares / shares.sum())


def _nothing(scheme: str, parameter: str) -> float:
    if parameter:
        raise PartitionError(f"partition {scheme!r}: iid takes no parameter; write 'iid'")
    return 0.0


def _positive(scheme: str, parameter: str) -> float:
    return parse_number(f"partition {scheme!r}", parameter, 0, exclusive=True)


def _not_negative(scheme: str, parameter: str) -> float:
    return parse_number(f"partition {scheme!r}", parameter, 0)


def _count(scheme: str, parameter: str) -> float:
    return parse_count(f"partition {scheme!r}", parameter, 1)


Maker = Callable[[IndexArray, int, float, np.random.Generator], list[IndexArray]]

_SCHEMES: dict[str, tuple[Callable[[str, str], float], Maker]] = {
    "iid": (_nothing, _iid),
    "dirichlet": (_positive, _dirichlet),
    "merged-dirichlet": (_positive, _merged_dirichlet),
    "balanced-dirichlet": (_positive, _balanced_dirichlet),
    "pathological": (_count, _pathological),
    "quantity": (_not_negative, _quantity),
    "label-blocks": (_count, _label_blocks),
}
"""Scheme -> (reader of its parameter, maker of its parts)."""


def _draw_dirichlet(alphas: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Draw from Dir(alphas); a corner of the simplex where alphas are so small that the draw underflows."""
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = rng.dirichlet(alphas)
    if np.isfinite(shares).all() and shares.sum() > 0.5:
        return shares
    return np.eye(len(alphas))[rng.choice(len(alphas), p=alphas / alphas.sum())]


def _fill_up(parts: list[IndexArray], min_size: int, rng: np.random.Generator) -> None:
    """Move random samples from whoever has most until every part has ``min_size``; N is known to suffice."""
    sizes = np.array([len(part) for part in parts])
    while sizes.min() < min_size:
        poorest, richest = int(sizes.argmin()), int(sizes.argmax())
        number = min(min_size - sizes[poorest], sizes[richest] - min_size)
        shuffled = rng.permutation(parts[richest])
        parts[poorest] = np.concatenate([parts[poorest], shuffled[:number]])
        parts[richest] = shuffled[number:]
        sizes[poorest] += number
        sizes[richest] -= number
