"""Lower bounds of one user's optimum in float64 NumPy, without the library's code.

Minimises over p in the simplex

    F(p) = Σ_n weight[n] (softplus(m[n]) − label[n] m[n]) − Σ_k barrier[k] log p[k]

with m = z·p, by damped Newton steps on a smoothed loss τ·softplus(m/τ) and a
log-barrier μ, both lowered in turn. For every q in [0, 1] the concave dual

    D(q) = Σ_n weight[n] H(q[n]) + min_p (p·g(q) − Σ_k barrier[k] log p[k]),
    g(q) = Σ_n weight[n] (1 − label[n] − q[n]) z[n],   H the entropy of a coin,

is at most F at every p, so the result does not rest on the method that found it.
"""

import numpy as np


def entropy(q):
    """−q log q − (1 − q) log(1 − q), with 0 log 0 = 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = [np.where(x > 0, x * np.log(x), 0) for x in (q, 1 - q)]
    return -terms[0] - terms[1]


def objective(z, weight, label, barrier, p):
    """F at p, normalised first: float64[U]."""
    p = np.asarray(p, np.float64)
    p = p / p.sum(-1, keepdims=True)
    m = np.einsum("upk,uk->up", z, p)
    loss = (weight * (np.logaddexp(0, m) - label * m)).sum(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where(barrier > 0, barrier * np.log(p), 0)
    return loss - logs.sum(-1)


def dual(z, weight, label, barrier, q):
    """D(q): float64[U]."""
    g = np.einsum("up,upk->uk", weight * (1 - label - q), z)
    return (weight * entropy(q)).sum(-1) + _smallest(g, barrier)


def _smallest(g, barrier):
    """min_p p·g − Σ b log p, from below: λ + Σ b (1 − log(b / (g − λ))), best λ."""
    total = barrier.sum(-1)
    floor = g.min(-1)
    # Σ b / (g − λ) = 1 lies between, because the smallest g alone gives at most Σ b.
    low, high = floor - np.maximum(total, 1e-300), floor
    for _ in range(200):
        middle = (low + high) / 2
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(barrier > 0, barrier / (g - middle[:, None]), 0)
        up = ratio.sum(-1) < 1
        low, high = np.where(up, middle, low), np.where(up, high, middle)
    slack = g - low[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(barrier > 0, barrier * (1 - np.log(barrier / slack)), 0)
    return np.where(total > 0, low + terms.sum(-1), floor)


def _sigmoid(x):
    return (1 + np.tanh(x / 2)) / 2


def bounds(z, weight, label=None, barrier=None, *, rtol=1e-5, atol=1e-9):
    """(lower, upper) bound of min F: float64[U] each, max(rtol F, atol) apart at best.

    Args:
        z: float[U, P, K], divided by the temperature.
        weight: float[U, P].
        label: float[U, P] or None.
        barrier: float[U, K] or None.
        rtol: relative to the upper bound.
        atol: where a user may stop as well.
    """
    z, weight = np.asarray(z, np.float64), np.asarray(weight, np.float64)
    users, _, rank = z.shape
    label = np.ones(weight.shape) if label is None else np.asarray(label, np.float64)
    zero = np.zeros((users, rank))
    barrier = zero if barrier is None else np.asarray(barrier, np.float64)
    size = np.maximum(np.abs(z).max((1, 2)), 1e-300)
    scale = size * weight.sum(-1) + barrier.sum(-1)
    p = np.full((users, rank), 1 / rank)
    upper = objective(z, weight, label, barrier, p)
    lower = dual(z, weight, label, barrier, 1 - label)
    smoothing, centring = np.maximum(size, 1), scale / rank
    for _ in range(60):
        todo = np.flatnonzero(upper - lower > np.maximum(rtol * np.abs(upper), atol))
        if not len(todo):
            break
        part = [x[todo] for x in (z, weight, label, barrier, smoothing, centring)]
        p[todo] = _centre(*part, p[todo])
        m = np.einsum("upk,uk->up", part[0], p[todo])
        # The dual of the smoothed loss is one of the loss.
        for tau in (smoothing[todo][:, None], 1.0):
            found = dual(*part[:4], _sigmoid(-m / tau))
            lower[todo] = np.maximum(lower[todo], found)
        for face in (p[todo], np.where(p[todo] < 1e-7, 0, p[todo])):
            found = objective(*part[:4], face)
            upper[todo] = np.minimum(upper[todo], found)
        smoothing = np.maximum(smoothing / 3, 1)
        centring = centring / 5
    return lower, upper


def _centre(z, weight, label, barrier, tau, mu, p):
    """Damped Newton: min Σ w (τ softplus(m/τ) − y m) − Σ (b + μ) log p, Σ p = 1."""
    rank, tau = z.shape[2], tau[:, None]
    pull = barrier + mu[:, None]

    def value(p):
        m = np.einsum("upk,uk->up", z, p)
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.where(p > 0, np.log(p), -np.inf)
        loss = weight * (tau * np.logaddexp(0, m / tau) - label * m)
        return loss.sum(-1) - (pull * logs).sum(-1)

    now = value(p)
    for _ in range(40):
        m = np.einsum("upk,uk->up", z, p)
        q = _sigmoid(m / tau)
        slope = np.einsum("up,upk->uk", weight * (q - label), z) - pull / p
        bend = weight * q * (1 - q) / tau
        # In dx = dp / p, which keeps the system as well scaled as it can be.
        zp = z * p[:, None]
        system = np.einsum("up,upk,upl->ukl", bend, zp, zp)
        system += pull[:, :, None] * np.eye(rank)
        unit = np.sqrt(np.einsum("ukk->uk", system))
        system /= unit[:, :, None] * unit[:, None]
        rhs = np.stack([-p * slope, -p], -1) / unit[:, :, None]
        found = np.linalg.solve(system + 1e-15 * np.eye(rank), rhs) / unit[:, :, None]
        a, b = (p * found[:, :, 0], p * found[:, :, 1])
        dp = a - b * (a.sum(-1) / b.sum(-1))[:, None]
        descent = -(slope * dp).sum(-1)
        if (descent <= 0.01 * mu).all():
            break
        with np.errstate(divide="ignore", invalid="ignore"):
            reach = np.where(dp < 0, -p / dp, np.inf).min(-1)
        step = np.minimum(1, 0.95 * reach)
        for _ in range(40):
            new = p + step[:, None] * dp
            new = new / new.sum(-1, keepdims=True)
            better = value(new) <= now - 0.1 * step * descent
            if better.all():
                break
            step = np.where(better, step, step / 2)
        p = np.where(better[:, None], new, p)
        now = np.where(better, value(p), now)
        if not better.any():
            break
    return p
