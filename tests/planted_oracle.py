"""Exact posterior means under a Dirichlet, in NumPy: two samplers that share no code.

    PYTHONPATH=. python tests/planted_oracle.py --rank 5 20 --pairs 5 20 100

compares the default adaptation, with a prior learned from as many other users, with
the exact posterior mean on planted populations (V known, vertex margins of sd 3), in
points of expected accuracy and of log-loss on further pairs.

    PYTHONPATH=. python tests/planted_oracle.py --coverage

measures how often 90 % intervals of weights and of margins cover the truth, at the
settings that `fit` chooses, beside those of the exact posterior's covariance. It prints
a Markdown table.
"""

import argparse
import functools
import math
import time

import numpy as np
from scipy import special


@functools.lru_cache
def _log_gamma_quantiles(alpha):
    x = np.linspace(-8, 8, 8001)
    log_u = special.log_ndtr(x)
    small = (log_u + special.gammaln(alpha + 1)) / alpha
    upper = special.gammainccinv(alpha, special.ndtr(-x))
    with np.errstate(divide="ignore"):
        log_g = np.where(small < -30, small, np.log(np.maximum(upper, 1e-300)))
    return x, log_g


def to_simplex(x, alpha):
    """Standard normal [..., K] to Dirichlet(alpha), through gamma quantiles."""
    log_g = np.interp(x, *_log_gamma_quantiles(alpha))
    g = np.exp(log_g - log_g.max(-1, keepdims=True))
    return g / g.sum(-1, keepdims=True)


def log_likelihood(z, p):
    """z [U, P, K], p [U, C, K] → [U, C]."""
    return -np.logaddexp(0, -(p @ z.transpose(0, 2, 1))).sum(-1)


def elliptical_slice(z, alpha, **sampler):
    """Posterior draws' mean [U, K], by elliptical slice sampling (Murray, 2010)."""
    return elliptical_moments(z, alpha, **sampler)[0]


def elliptical_moments(z, alpha, *, chains=4, steps=1000, burn=300, seed=0):
    """Posterior draws' mean [U, K] and covariance [U, K, K], by the same sampler."""
    rng = np.random.default_rng(seed)
    shape = (len(z), chains, z.shape[2])
    x = rng.normal(size=shape)
    value = log_likelihood(z, to_simplex(x, alpha))
    total = np.zeros(shape)
    square = np.zeros((len(z), shape[2], shape[2]))
    for step in range(burn + steps):
        other = rng.normal(size=shape)
        level = value - rng.exponential(size=value.shape)
        angle = rng.uniform(0, 2 * np.pi, value.shape)
        low, high = angle - 2 * np.pi, angle.copy()
        moving = np.ones(value.shape, bool)
        new = x.copy()
        while moving.any():
            users = np.flatnonzero(moving.any(1))
            turn = angle[users, :, None]
            tried = x[users] * np.cos(turn) + other[users] * np.sin(turn)
            got = log_likelihood(z[users], to_simplex(tried, alpha))
            accept = moving[users] & (got > level[users])
            new[users] = np.where(accept[..., None], tried, new[users])
            value[users] = np.where(accept, got, value[users])
            moving[users] &= ~accept
            low = np.where(moving & (angle < 0), angle, low)
            high = np.where(moving & (angle >= 0), angle, high)
            angle = np.where(moving, rng.uniform(low, high), angle)
        x = new
        if step >= burn:
            p = to_simplex(x, alpha)
            total += p
            square += p.transpose(0, 2, 1) @ p
    mean = (total / steps).mean(1)
    return mean, square / (steps * chains) - mean[:, :, None] * mean[:, None]


def importance_sampling(z, alpha, **sampler):
    """Posterior mean [U, K], prior draws weighted by their likelihood."""
    return importance_moments(z, alpha, **sampler)[0]


def importance_moments(z, alpha, *, draws=20000, seed=0):
    """Posterior mean [U, K] and covariance [U, K, K], by the same sampler."""
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(z.shape[2], alpha), draws)
    means, covariances = [], []
    for mine in z:
        logs = -np.logaddexp(0, -(p @ mine.T)).sum(1)
        share = np.exp(logs - logs.max())
        share /= share.sum()
        means.append(share @ p)
        covariances.append((p - means[-1]).T @ (share[:, None] * (p - means[-1])))
    return np.array(means), np.array(covariances)


def population(rng, alpha, rank, pairs, users, new_pairs=400, margin=3.0):
    """(truth [U, K], chosen pairs' z [U, P, K], unsigned new z [U, Q, K])."""
    p = rng.dirichlet(np.full(rank, alpha), users)
    z = rng.normal(size=(users, pairs, rank)) * margin
    m = np.einsum("upk,uk->up", z, p)
    z *= np.where(rng.random(m.shape) < special.expit(m), 1, -1)[..., None]
    return p, z, rng.normal(size=(users, new_pairs, rank)) * margin


def expected_accuracy(truth, weights, new):
    """Expected accuracy of each user on new pairs, in points."""
    right = special.expit(np.einsum("uqk,uk->uq", new, truth))
    m = np.einsum("uqk,uk->uq", new, weights)
    hit = np.where(m > 0, right, 1 - right)
    return 100 * np.where(m == 0, 0.5, hit).mean(1)


def expected_log_loss(truth, new, probability):
    """Expected log-loss of each user on new pairs."""
    right = special.expit(np.einsum("uqk,uk->uq", new, truth))
    return -(right * np.log(probability) + (1 - right) * np.log1p(-probability)).mean(1)


def weights_coverage(truth, centre, covariance):
    """Share of weights [U, K] in centre ± 1.645 deviations, in points, per user."""
    deviation = np.sqrt(np.maximum(np.einsum("ukk->uk", covariance), 0))
    return 100 * (np.abs(truth - centre) <= 1.645 * deviation + 1e-6).mean(1)


def margins_coverage(truth, centre, variance):
    """Share of margins [U, Q] in centre ± 1.645 deviations, in points, per user."""
    deviation = np.sqrt(np.maximum(variance, 0))
    return 100 * (np.abs(truth - centre) <= 1.645 * deviation + 1e-6).mean(1)


def coverage(truth, centre, covariance, new):
    """(weights, margins): the coverage of 90 % intervals, in points, per user."""
    m = [np.einsum("uqk,uk->uq", new, p) for p in (truth, centre)]
    variance = np.einsum("uqk,ukl,uql->uq", new, covariance, new)
    weights = weights_coverage(truth, centre, covariance)
    return weights, margins_coverage(*m, variance)


def learned_prior(rng, alpha, rank, pairs, users, **grids):
    """The prior that `fit_prior` learns with V known, from other users."""
    import jax

    import lore_jax as lore

    _, z, _ = population(rng, alpha, rank, pairs, users, new_pairs=0)
    fitted = lore.fit_prior(
        np.eye(rank, dtype=np.float32),
        lore.Preferences.from_ragged(list(z.astype(np.float32))),
        key=jax.random.key(int(rng.integers(2**31))),
        search=lore.PriorSearch(**grids),
    )
    return fitted.model.prior


def drawn_prior(rng, alpha, rank, num_atoms=200, concentration=10.0):
    """The true population's prior as draws: for tests that need not learn one."""
    import lore_jax as lore

    return lore.Prior(
        atoms=rng.dirichlet(np.full(rank, alpha), num_atoms).astype(np.float32),
        log_weights=np.full(num_atoms, -math.log(num_atoms), np.float32),
        concentration=np.float32(concentration),
        tempering=np.float32(0),
    )


def compare(alpha, rank, pairs, *, users=400, seed=0, grids=None, **sampler):
    """One row of the table: means and the paired difference in accuracy."""
    import lore_jax as lore

    rng = np.random.default_rng([seed, rank, pairs, round(10 * alpha)])
    prior = learned_prior(rng, alpha, rank, pairs, users, **(grids or {}))
    truth, z, new = population(rng, alpha, rank, pairs, users)
    prefs = lore.Preferences.from_ragged(list(z.astype(np.float32)))
    eye = np.eye(rank, dtype=np.float32)
    ours = lore.adapt(lore.RewardModel(eye, prior), prefs).weights
    exact = elliptical_slice(z, alpha, seed=seed, **sampler)
    gains = [expected_accuracy(truth, w, new) for w in (exact, ours, truth)]
    difference = gains[1] - gains[0]
    return {
        "alpha": alpha,
        "rank": rank,
        "pairs": pairs,
        "exact": gains[0].mean(),
        "adapt": gains[1].mean(),
        "truth": gains[2].mean(),
        "difference": difference.mean(),
        "error": difference.std() / math.sqrt(users),
        "kappa": float(prior.concentration),
        "decay": float(prior.decay),
        "gamma": float(prior.tempering),
    }


def fit_known(alpha, rank, pairs, users, *, seed=0, **grids):
    """`fit_prior` on planted users with V known: its prior."""
    import jax

    import lore_jax as lore

    rng = np.random.default_rng([seed, rank, pairs, round(10 * alpha)])
    _, z, _ = population(rng, alpha, rank, pairs, users, new_pairs=0)
    prefs = lore.Preferences.from_ragged(list(z.astype(np.float32)))
    search = lore.PriorSearch(**grids)
    eye, key = np.eye(rank, dtype=np.float32), jax.random.key(seed)
    return lore.fit_prior(eye, prefs, key=key, search=search).model.prior


def coverage_row(prior, alpha, rank, pairs, *, users=400, seed=1, **sampler):
    """Coverage of users' weights and margins at one number of pairs, V known."""
    import lore_jax as lore

    rng = np.random.default_rng([seed, rank, pairs, round(10 * alpha)])
    truth, z, new = population(rng, alpha, rank, pairs, users, new_pairs=50)
    prefs = lore.Preferences.from_ragged(list(z.astype(np.float32)))
    eye = np.eye(rank, dtype=np.float32)
    ours = lore.posterior(lore.RewardModel(eye, prior), prefs, covariance=True)
    mean, covariance = elliptical_moments(z, alpha, seed=seed, **sampler)
    rows = {
        "exact": (mean, covariance),
        "weights": (ours.weights, ours.covariance),
        "mean": (ours.mean, ours.covariance),
    }
    row = {"pairs": pairs}
    for name, (centre, cov) in rows.items():
        row[name] = [x.mean() for x in coverage(truth, centre, cov, new)]
    for name, cov in (("exact_deviation", covariance), ("deviation", ours.covariance)):
        row[name] = np.sqrt(np.einsum("ukk->uk", cov)).mean()
    return row


def learned_margins_coverage(
    alpha, rank, *, pairs=40, users=400, features=30, seed=0, **grids
):
    """`fit` learns V too: (prior, coverage of new users' margins per count)."""
    import jax

    import lore_jax as lore

    rng = np.random.default_rng([seed, rank, features, round(10 * alpha)])
    basis = rng.normal(size=(features, rank)) * 3 / math.sqrt(features)

    def draw(users, pairs):
        p = rng.dirichlet(np.full(rank, alpha), users)
        x = rng.normal(size=(users, pairs, features))
        m = np.einsum("upd,dk,uk->up", x, basis, p)
        sign = np.where(rng.random(m.shape) < special.expit(m), 1, -1)
        return p, x * sign[..., None]

    def pairs_of(x):
        return lore.Preferences.from_ragged(list(x.astype(np.float32)))

    recipe = lore.Marginal(search=lore.Search(**grids))
    key = jax.random.key(seed)
    fitted = lore.fit(
        pairs_of(draw(users, pairs)[1]), rank=rank, key=key, recipe=recipe
    )
    model = fitted.model
    learned = np.asarray(model.basis, np.float64)
    out = {}
    for count in (1, 3, 10, 40):
        p, x = draw(users, count)
        new = rng.normal(size=(users, 50, features))
        got = lore.posterior(model.replace(basis=learned), pairs_of(x), covariance=True)
        z = new @ learned / model.temperature
        variance = np.einsum("uqk,ukl,uql->uq", z, got.covariance, z)
        centre = np.einsum("uqk,uk->uq", z, got.weights)
        truth = np.einsum("uqd,dk,uk->uq", new, basis, p)
        out[count] = margins_coverage(truth, centre, variance).mean()
    return model.prior, out


def _settings(prior):
    names = "concentration", "decay", "tempering"
    return " ".join(f"{float(getattr(prior, name)):g}" for name in names)


def print_coverage(settings):
    """Markdown tables of the coverage at the settings that `fit` chooses."""
    grids = {} if settings.gamma is None else {"temperings": (settings.gamma,)}
    print("| alpha | K | fit κ δ γ | pairs | exact | at `weights` | at `mean` | sd |")
    print("|---|---|---|---|---|---|---|---|")
    for alpha in settings.alpha:
        for rank in settings.rank:
            prior = fit_known(alpha, rank, settings.fit_pairs, settings.users, **grids)
            for pairs in settings.pairs:
                row = coverage_row(
                    prior,
                    alpha,
                    rank,
                    pairs,
                    users=settings.users,
                    steps=settings.steps,
                )
                parts = (
                    "{:.1f} / {:.1f}".format(*row[x])
                    for x in ("exact", "weights", "mean")
                )
                print(
                    f"| {alpha:g} | {rank} | {_settings(prior)} | {pairs} | "
                    + " | ".join(parts)
                    + f" | {row['deviation']:.3f} (exact {row['exact_deviation']:.3f})"
                    " |",
                    flush=True,
                )
    print("\n| alpha | K | fit κ δ γ | margins, V learned: 1 | 3 | 10 | 40 |")
    print("|---|---|---|---|---|---|---|")
    for alpha in settings.alpha:
        for rank in settings.rank:
            prior, out = learned_margins_coverage(
                alpha, rank, users=settings.users, **grids
            )
            values = " | ".join(f"{x:.1f}" for x in out.values())
            print(f"| {alpha:g} | {rank} | {_settings(prior)} | {values} |", flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--coverage", action="store_true")
    parser.add_argument("--rank", type=int, nargs="+")
    parser.add_argument("--pairs", type=int, nargs="+")
    parser.add_argument("--alpha", type=float, nargs="+")
    parser.add_argument("--users", type=int, default=400)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--fit-pairs", type=int, default=40)
    parser.add_argument("--gamma", type=float, help="the only γ of fit's grid")
    settings = parser.parse_args()
    usual = {"rank": [5, 20], "pairs": [5, 20, 100], "alpha": [0.1, 0.3, 1, 10]}
    if settings.coverage:
        usual = {"rank": [2, 5, 20], "pairs": [1, 3, 10, 40], "alpha": [0.3, 1]}
    for name, values in usual.items():
        if getattr(settings, name) is None:
            setattr(settings, name, values)
    if settings.coverage:
        print_coverage(settings)
        return
    for rank in settings.rank:
        for alpha in settings.alpha:
            for pairs in settings.pairs:
                start = time.perf_counter()
                row = compare(
                    alpha, rank, pairs, users=settings.users, steps=settings.steps
                )
                row["seconds"] = time.perf_counter() - start
                print("  ".join(f"{k} {v:.4g}" for k, v in row.items()), flush=True)


if __name__ == "__main__":
    main()
