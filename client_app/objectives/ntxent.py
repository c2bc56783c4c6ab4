"""The supervised NT-Xent loss (Sohn 2016; Khosla et al. 2020) as AdaSplit uses it: each positive pair its own term."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

FAR = -1e30
"""Stands for minus infinity, whose logarithms have no gradients."""


def has_positive_pair(labels: Tensor) -> bool:
    """Whether two samples share a label."""
    return bool((torch.bincount(labels) > 1).any())


def nt_xent(projections: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Mean over positive pairs (p, q) of -log(exp(s_pq) / (exp(s_pq) + sum over negatives n of p of exp(s_pn))).

    With s_pq = cos(z_p, z_q) / temperature; pairs are ordered, so (p, q) and (q, p) are two terms. Zero where no two
    samples share a label.

    Parameters
    ----------
    projections : z [batch, features].
    labels : int64 [batch].
    temperature : tau > 0.
    """
    z = functional.normalize(projections, dim=1)
    similarity = z @ z.T / temperature
    is_same = labels[:, None] == labels[None, :]
    is_positive = is_same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    against = similarity.masked_fill(is_same, FAR).logsumexp(dim=1, keepdim=True)
    terms = torch.logaddexp(similarity, against) - similarity
    return terms[is_positive].mean() if bool(is_positive.any()) else projections.sum() * 0.0
