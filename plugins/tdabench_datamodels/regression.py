"""Linear regressions of many outcomes on one membership matrix, with cross-validated penalties."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Penalties tried, from almost none to almost complete shrinkage.
RIDGE = np.geomspace(1e-2, 1e4, 25)  # times the mean eigenvalue of X X^T
LASSO = np.geomspace(1.0, 0.02, 12)  # times the smallest penalty at which every weight is 0


def ridge(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns weights [q, n] of y [m, q] on x [m, n], and the predicted share of variance [q].

    Minimises |y - b - x w|^2 + lambda |w|^2 for each outcome. lambda is the best by
    leave-one-out, for which ridge has a closed form: the residual of row i without row i is
    (A y)_i / A_ii, A = (X X^T + lambda I)^-1 with centred X (the intercept's share 1/m included).
    """
    m = len(x)
    xc, yc = x - x.mean(0), y - y.mean(0)
    values, u = np.linalg.eigh(xc @ xc.T)  # [m], [m, m]
    values = values.clip(0)
    seen = u.T @ yc  # [m, q]
    total = np.square(yc * m / max(1, m - 1)).mean(0)  # of the mean without row i
    best = np.full(y.shape[1], np.inf)
    weights = np.zeros((y.shape[1], x.shape[1]))
    for penalty in RIDGE * max(values.mean(), 1e-30):
        shrunk = values / (values + penalty)
        left = yc - u @ (shrunk[:, None] * seen)  # residuals with every row
        leverage = (u**2 @ shrunk) + 1 / m  # [m]
        error = np.square(left / np.maximum(1 - leverage, 1e-12)[:, None]).mean(0)
        better = error < best
        if better.any():
            best = np.where(better, error, best)
            dual = u @ (seen[:, better] / (values + penalty)[:, None])
            weights[better] = dual.T @ xc
    return weights, _explained(best, total)


def lasso(
    x: np.ndarray, y: np.ndarray, folds: int = 5, rng: np.random.Generator | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Minimises |y - b - x w|^2 / 2m + lambda |w|_1, lambda by `folds`-fold CV; see `ridge`."""
    m = len(x)
    rng = rng or np.random.default_rng(0)
    fold = rng.permutation(m) % min(folds, m)
    top = largest_penalty(x, y)  # [q]
    error = np.zeros((len(LASSO), y.shape[1]))
    for f in range(fold.max() + 1):
        held = fold == f
        mean_x, mean_y = x[~held].mean(0), y[~held].mean(0)
        path = lasso_path(x[~held] - mean_x, y[~held] - mean_y, top)
        for i, w in enumerate(path):
            left = y[held] - mean_y - (x[held] - mean_x) @ w.T
            error[i] += np.square(left).sum(0) / m
    best = error.argmin(0)  # [q]
    path = lasso_path(x - x.mean(0), y - y.mean(0), top)
    weights = np.stack([path[i][q] for q, i in enumerate(best)])
    return weights, _explained(error.min(0), y.var(0))


def largest_penalty(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns each outcome's smallest lambda at which every lasso weight is zero: [q]."""
    return np.abs((x - x.mean(0)).T @ (y - y.mean(0))).max(0) / max(1, len(x))


def sparse(x: np.ndarray, y: np.ndarray, share: float) -> np.ndarray:
    """Minimises |y - x w|^2 / 2 + lambda |w|_1 for each of y [m, q], without intercept: [q, n].

    lambda is `share` of each outcome's smallest lambda at which every weight is zero. It is
    approached from above, each solution started from the previous one. As in `lasso_path`, but
    every outcome has its own momentum and end, so that none depends on the others.
    """
    n, q = x.shape[1], y.shape[1]
    size = max(np.linalg.norm(x, 2) ** 2, 1e-30) if x.size else 1.0
    goal = x.T @ y  # [n, q]
    top = np.abs(goal).max(0, initial=0.0)  # [q]
    w = np.zeros((n, q))
    steps = max(1, round(-4 * np.log10(share)))
    for part in np.geomspace(1.0, share, 1 + steps)[1:]:  # at 1 there is nothing yet
        z, t, left = w.copy(), np.ones(q), np.arange(q)
        for _ in range(1000):
            at = z[:, left]
            after = at - (x.T @ (x @ at) - goal[:, left]) / size
            after = np.sign(after) * np.maximum(np.abs(after) - part * top[left] / size, 0.0)
            change = after - w[:, left]
            now = np.where(((at - after) * change).sum(0) > 0, 1.0, t[left])  # overshot: restart
            faster = (1 + np.sqrt(1 + 4 * now**2)) / 2
            z[:, left], w[:, left], t[left] = after + (now - 1) / faster * change, after, faster
            largest = np.abs(after).max(0, initial=1e-30)
            left = left[np.abs(change).max(0, initial=0.0) > 1e-6 * largest]
            if not len(left):
                break
    return w.T


def lasso_path(xc: np.ndarray, yc: np.ndarray, top: np.ndarray) -> list[np.ndarray]:
    """Returns weights [q, n] at each penalty LASSO * top, each started from the previous one.

    Uses accelerated proximal gradient (FISTA with restarts) for all outcomes at once.
    """
    m, n = xc.shape
    step = m / max(np.linalg.norm(xc, 2) ** 2, 1e-30)
    gram_y = xc.T @ yc / m  # [n, q]
    w = np.zeros((n, yc.shape[1]))
    out = []
    for share in LASSO:
        z, t = w, 1.0
        for _ in range(500):
            slope = xc.T @ (xc @ z) / m - gram_y
            after = z - step * slope
            after = np.sign(after) * np.maximum(np.abs(after) - step * share * top, 0.0)
            change = after - w
            if np.abs(change).max(initial=0.0) <= 1e-5 * max(np.abs(after).max(initial=0), 1e-30):
                w = after
                break
            if ((z - after) * change).sum() > 0:  # overshot: restart the momentum
                t = 1.0
            faster = (1 + (1 + 4 * t * t) ** 0.5) / 2
            z, w, t = after + (t - 1) / faster * change, after, faster
        out.append(w.T)
    return out


def _explained(error: np.ndarray, total: np.ndarray) -> np.ndarray:
    return 1 - error / np.where(total > 0, total, 1.0)


@dataclass(frozen=True)
class Prior:
    """Numbers of the prior of `posterior`, in units of the outcomes' standard deviation.

    `agreement` and `spread` are mean and standard deviation of the correlation between prior scores
    and outcomes, `noise` is the share of the variance that members do not explain, and `floor` the
    prior variance of the effect of an example with a score of 0.
    """

    agreement: float = 0.4
    spread: float = 0.15
    noise: float = 0.6
    floor: float = 0.3


def posterior(
    x: np.ndarray, y: np.ndarray, scores: np.ndarray, features: np.ndarray, prior: Prior
) -> np.ndarray:
    """Computes posterior mean weights [q, n] of outcomes y [q, m] on membership x [m, n].

    For each query, with x and y centred over the m rows,

        y = x w + e,   w = a s + d (.) (Z v + u),   d^2 = floor + s^2 / mean(s^2)

    where s is its row of `scores` [q, n], Z are `features` [n, k], and a, u, v and e are
    independent and normal. With b = x s, the variance of e is `noise` var(y), the variance of a
    gives the correlation of b and y the standard deviation `spread` around `agreement`, and u
    and v have one variance, such that x (d (.) (Z v + u)) has the rest of var(y). So in units
    of sd(y) and sd(b)

        cov(y) = noise I + rest G + spread^2 b b^T,   G = x D^1/2 (Z Z^T + I) D^1/2 x^T / (mean
        of its diagonal)

    and w follows from (y - agreement b) by a solution of size m. A query whose outcomes are all
    equal gets weights 0; one whose scores are all equal gets the weights of a prior without scores.
    """
    m = len(x)
    xc = x.astype(np.float64)
    xc -= xc.mean(0)
    z = features.astype(np.float64)
    out = np.zeros(scores.shape)
    for q, (s, outcome) in enumerate(zip(scores.astype(np.float64), y.astype(np.float64))):
        outcome = outcome - outcome.mean()
        sd = float(outcome.std())
        if sd <= 1e-12:
            continue
        power = float(np.square(s).mean())
        s = s / np.sqrt(power) if power > 0 else s
        b = xc @ s
        size = float(b.std())
        agreement, spread = (prior.agreement, prior.spread) if size > 1e-9 else (0.0, 0.0)
        b = b / size if size > 1e-9 else b
        d = np.sqrt(prior.floor + s**2) if power > 0 else np.ones_like(s)
        xd = xc * d
        f = xd @ z  # [m, k]
        gram = f @ f.T + xd @ xd.T
        mean = float(np.trace(gram)) / m
        rest = max(0.0, 1 - prior.noise - agreement**2) / mean if mean > 0 else 0.0
        cov = rest * gram + spread**2 * np.outer(b, b) + prior.noise * np.eye(m)
        a = np.linalg.solve(cov, outcome / sd - agreement * b)
        slope = (agreement + spread**2 * (b @ a)) / size if size > 1e-9 else 0.0
        out[q] = sd * (slope * s + rest * d * (z @ (f.T @ a) + xd.T @ a))
    return out
