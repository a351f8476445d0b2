"""The training objectives of an encoder, in terms of its embeddings.

Shapes: Q [query, d] and Z [train, d] are embeddings, member [group, train] is 0/1, r and f are
[query, group].
"""

from __future__ import annotations

import torch

TINY = 1e-25


def group_scores(
    s: torch.Tensor, member: torch.Tensor, pooling: str, temperature: float
) -> torch.Tensor:
    """Pools f [query, group] from scores s [query, train], differentiably, like `pool_scores`.

    A softmax within a group only needs the same shift in numerator and denominator, so all groups
    share one exponential per example.
    """
    if pooling == "sum":
        return s @ member.T
    if pooling == "mean":
        return s @ member.T / member.sum(1).clamp(min=1)
    logits = (s.abs() if pooling == "softmax-abs" else s) / temperature
    e = torch.exp(logits - logits.detach().amax(1, keepdim=True))  # [query, train]
    norm = e @ member.T
    f = (e * s) @ member.T / norm.clamp(min=TINY)
    if bool((norm < TINY).any()):  # a group far below its row's maximum gets its own shift
        rows = []
        for g in range(len(member)):
            inside = member[g] > 0
            a = torch.softmax(logits[:, inside], dim=1)
            rows.append((a * s[:, inside]).sum(1))
        f = torch.stack(rows, dim=1)
    return f


def ranking_loss(
    f: torch.Tensor, r: torch.Tensor, low: float = 0.1, high: float = 5.0
) -> tuple[torch.Tensor, int]:
    """Computes the summed weighted pairwise ranking loss, and the number of pairs r_i > r_j.

    -sum over pairs with r_i > r_j of w_ij log sigmoid(f_i - f_j), where w_ij is 0 if
    r_i - r_j < `low`, else min(r_i - r_j, `high`) (arXiv 2505.18513, eq. 6; the public code has
    low = 0 and high = 10). NaN in r excludes that (query, group).
    """
    dr = r[:, :, None] - r[:, None, :]  # [query, group, group]
    df = f[:, :, None] - f[:, None, :]
    above = dr > 0  # False for NaN
    weight = torch.where(above & (dr >= low), dr.clamp(max=high), 0.0)
    loss = (weight * torch.nn.functional.softplus(-df)).sum()
    return loss, int(above.sum())


def kernel_loss(s: torch.Tensor, t: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
    """Sums 1 - Pearson(s_q, t_q) over queries, for s and t [query, train].

    With additive pooling and random groups, the correlation of group scores equals the correlation
    of rows, so this loss maximises the student's LDS on its teacher. `keep` bool [query, train]
    excludes pairs (such as an example with itself).
    """
    w = torch.ones_like(s) if keep is None else keep.to(s.dtype)
    n = w.sum(1, keepdim=True).clamp(min=1)
    s = (s - (s * w).sum(1, keepdim=True) / n) * w
    t = (t - (t * w).sum(1, keepdim=True) / n) * w
    dot = (s * t).sum(1)
    # eps keeps the gradient of a constant row finite; such a row counts as uncorrelated.
    size = torch.sqrt((s * s).sum(1) * (t * t).sum(1) + 1e-20)
    return (1 - dot / size).sum()
