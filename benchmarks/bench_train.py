"""One training iteration at the memory limit: one JSON line a case.

    python -m benchmarks.bench_train [--quick] [--torch] [--compare old.json]

Every iteration stands over the sum of its two reads, one jitted `features @ V` and the
fastest of four jitted back-projections, that took turns with it: `ratio_to_reads`.
`roofline` is the share of the measured copy bandwidth at which the two reads that an
iteration needs went by. `fused products` projects and back-projects block by block, as
an iteration on differences could.

The iterations are `lore_jax._train.steps` with those of `published` and `marginal`,
internals: `fit` does not expose a single step.

Typical output (2 idle CPU cores, jax 0.10.2, M = N = 48,000, D=4096, K=5, U=4,800):

    fused products of 1000 rows   221 ms   1.08 of the two reads
    iteration alternating         196 ms   0.96
    iteration default             190 ms   0.93

`project` widens 5 columns to 8, so that an iteration may take less than the two plain
products. The reads go by at a third of the copy bandwidth: on two cores the products
are bound by arithmetic, so a block that is still in cache saves next to nothing.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import lore_jax as lore
from benchmarks import measure
from lore_jax._pairs.pack import pack
from lore_jax._train import coordinates, marginal, published, steps
from lore_jax.prior import make_atoms

STEPS = 3  # iterations in one compiled program, as `fit` scans them
_dot = functools.partial(jnp.matmul, precision=measure.PRECISION)


def make_problem(M, N, D, K, U, *, differences=None, seed=0):
    """N pairs of U users over M rows; differences (N = M) without a rejected row."""
    rng = np.random.default_rng(seed)
    features = jax.random.normal(jax.random.key(seed), (M, D))
    if differences if differences is not None else N == M:
        chosen, rejected = np.arange(N), None
    else:
        chosen = rng.integers(M, size=N)
        rejected = (chosen + rng.integers(1, M, size=N)) % M
    return lore.Preferences.from_pairs(
        features, chosen, rejected, np.arange(N) * U // N, U
    )


def blocks(features, rows=1000):
    """features float[M, D] as float[B, rows, D]; M must be a multiple."""
    rows = next(
        r for r in range(min(rows, len(features)), 0, -1) if not len(features) % r
    )
    return features.reshape(-1, rows, features.shape[1])


def scanned(features, g):
    """featuresᵀ · g accumulated over blocks of rows."""

    def add(total, block):
        x, g = block
        return total + _dot(g.T, x), None

    x = blocks(features)
    start = jnp.zeros((g.shape[1], features.shape[1]))
    return lax.scan(add, start, (x, g.reshape(*x.shape[:2], -1)))[0].T


def fused(rows, features, basis):
    """Projection and back-projection of each block of rows while it is in cache."""

    def add(total, x):
        return total + _dot(jnp.tanh(_dot(x, basis)).T, x), None

    start = jnp.zeros(basis.shape[::-1])
    return lax.scan(add, start, blocks(features, rows))[0].T


def pulled_back(features, g):
    """The library's own: what differentiating `lore.project` does."""
    basis = jnp.zeros((features.shape[1], g.shape[1]))
    return jax.vjp(functools.partial(lore.project, features), basis)[1](g)[0]


BACK_PROJECTIONS = {
    "back plain": jax.jit(lambda x, g: _dot(x.T, g)),
    "back transposed": jax.jit(lambda x, g: _dot(g.T, x).T),
    "back scanned": jax.jit(scanned),
    "back vjp of project": jax.jit(pulled_back),
}
_read = jax.jit(_dot)
FUSED = {
    f"fused products of {rows} rows": jax.jit(functools.partial(fused, rows))
    for rows in (64, 256, 1000)
}


class Iteration:
    """Calls that advance one trainer STEPS iterations; its state is donated."""

    def __init__(self, state, problem, parts):
        self.state, self.problem, self.parts = state, problem, parts

    def __call__(self):
        self.state, metrics = steps.run(
            self.state, self.problem, steps=self.parts, num_steps=STEPS
        )
        return metrics

    def memory(self):
        """Bytes of temporaries of the compiled program."""
        return measure.temporaries(
            *(steps.run, self.state, self.problem),
            steps=self.parts,
            num_steps=STEPS,
        )


def iterations(prefs, rank):
    """name → Iteration, for the published alternating form and the default."""
    recipe = lore.PublishedAlternating(num_steps=1000, prior=None)
    trainer = published.make_trainer(recipe)
    params = lore.init_params(
        jax.random.key(1),
        num_users=prefs.num_users,
        num_features=prefs.num_features,
        rank=rank,
    )
    bare = prefs.replace(ids=None, group=None, order=None, offsets=None)
    bare = jax.tree.map(jnp.asarray, bare)
    problem = published.PublishedProblem(bare, jnp.zeros(prefs.num_features))
    alternating = Iteration(trainer.init(params), problem, trainer.steps)
    atoms = make_atoms(jax.random.key(2), rank, lore.Search().num_atoms)
    base = jnp.full(len(atoms), 1 / len(atoms))
    made = coordinates.make_coordinates(
        coordinates.measure(prefs), 1.0, jnp.float32, prefs.num_features
    )
    problem = marginal.make_problem(prefs.features, pack(prefs), atoms, base, made)
    optimiser = marginal.make_optimiser(0.03, 1000)
    settings = marginal.Settings(*map(jnp.float32, (1e-3, 0.3, 1.0, 1.0, 500.0)))
    state = marginal.init(jax.random.key(3), problem, 0.1, optimiser)
    data = marginal.MarginalInputs(problem, settings)
    default = Iteration(state, data, marginal.make_steps(optimiser))
    return {"alternating": alternating, "default": default}


def against_reads(
    M, N, D, K, U, seconds, *, case="iteration", bandwidth=None, fusions=tuple(FUSED)
):
    """Both trainers' iterations over the two reads of the same table."""
    prefs = make_problem(M, N, D, K, U)
    x = prefs.features
    basis = jax.random.normal(jax.random.key(3), (D, K))
    g = jax.random.normal(jax.random.key(4), (M, K))
    calls = {"read": functools.partial(_read, x, basis)}
    calls |= {name: functools.partial(f, x, g) for name, f in BACK_PROJECTIONS.items()}
    if case == "iteration":
        calls |= {name: functools.partial(FUSED[name], x, basis) for name in fusions}
    trainers = iterations(prefs, K)
    calls.update(trainers)
    result = measure.interleave(calls, seconds=seconds)
    fastest = min(BACK_PROJECTIONS, key=lambda name: result[name]["median_s"])
    reads = result["read"]["median_s"] + result[fastest]["median_s"]
    shape = dict(M=M, N=N, D=D, K=K, U=U, dtype="float32")
    for name in calls:
        if case != "iteration" or name in trainers:
            continue
        row = dict(case=name, **shape, **result[name])
        if name in FUSED:
            row["ratio_to_reads"] = row["median_s"] / reads
        yield row
    for name, trainer in trainers.items():
        row = dict(case=f"{case} {name}", **shape, **result[name])
        for key in ("median_s", "min_s"):
            row[key] /= STEPS
        row["ratio_to_reads"] = row["median_s"] / reads
        row["fastest_back"] = fastest
        if bandwidth:
            row["roofline"] = 2 * x.nbytes / row["median_s"] / bandwidth
        row.update(trainer.memory())
        row["temp_over_features"] = row["temp_bytes"] / x.nbytes
        program = row["argument_bytes"] + row["temp_bytes"]
        row["program_over_features"] = program / x.nbytes
        peak = measure.peak_bytes(trainer)
        if peak is not None:
            row["peak_over_features"] = 1 + peak / x.nbytes
        yield row


def scaling(base, seconds, letters="MNDKU"):
    """One letter at a time, everything else at `base`."""
    grids = {
        "M": [base["M"] // 4, base["M"]],
        "N": [base["M"], base["M"] * 4, base["M"] * 16],
        "D": [base["D"] // 4, base["D"]],
        "K": [2, 5, 10, 20],
        "U": [base["U"] // 100, base["U"], base["U"] * 10],
    }
    for letter in letters:
        for value in grids[letter]:
            shape = {**base, letter: max(1, value)}
            if letter == "M":
                shape["N"] = value
            yield from against_reads(**shape, seconds=seconds, case=f"by {letter}:")


def eager_torch(M, N, D, K, U):
    """Both published loops in eager PyTorch, from the paper's description.

    One iteration computes N×U logits and picks each pair's column, as published.
    """
    import torch

    prefs = make_problem(M, N, D, K, U, differences=True)
    x = torch.tensor(np.asarray(prefs.features))
    user = torch.tensor(prefs.user, dtype=torch.long)
    place = torch.arange(N)
    basis = torch.randn(D, K, requires_grad=True)
    logits = torch.randn(U, K, requires_grad=True)
    both = torch.optim.Adam([basis, logits], lr=0.5)
    on_w = torch.optim.Adam([logits], lr=0.5)
    on_v = torch.optim.Adam([basis], lr=0.5)

    def descend(optimiser):
        rewards = x @ basis @ torch.softmax(logits, 1).T / 100
        loss = torch.nn.functional.softplus(-rewards[place, user]).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    forms = {"joint": [both], "alternating": [on_w, on_v]}
    calls = {
        name: functools.partial(lambda steps: [descend(s) for s in steps] and None, s)
        for name, s in forms.items()
    }
    result = measure.interleave(calls, repeats=3, seconds=0)
    for name in forms:
        shape = dict(M=M, N=N, D=D, K=K, U=U, dtype="float32")
        yield dict(case=f"eager PyTorch {name}", **shape, **result[name])


def cases(size: str, torch: bool = False):
    """Rows of one size: "tiny" (a smoke test), "quick" or "full"."""
    bandwidth = measure.copy_bandwidth(1 if size == "tiny" else 1024)
    yield dict(case="copy", bytes_per_s=bandwidth)
    run = functools.partial(against_reads, bandwidth=bandwidth)
    if size == "tiny":
        yield from run(64, 64, 16, 3, 8, 0.0)
        yield from run(64, 200, 16, 3, 8, 0.0, case="pairs over a table:")
        yield from scaling(dict(M=32, N=32, D=16, K=3, U=4), 0.0, "U")
    elif size == "quick":
        best = list(FUSED)[-1:]  # The others were slower wherever they were tried.
        yield from run(48_000, 48_000, 4096, 5, 4800, 6.0, fusions=best)
    else:
        for rank in (5, 20):
            yield from run(48_000, 48_000, 4096, rank, 4800, 20.0)
            for pairs in (48_001, 1_000_000):
                yield from run(
                    *(48_000, pairs, 4096, rank, 4800, 20.0), case="pairs over a table:"
                )
        base = dict(M=24_000, N=24_000, D=2048, K=5, U=2400)
        yield from scaling(base, 4.0)
    if torch:
        if size == "full":
            yield from eager_torch(48_000, 48_000, 4096, 5, 4800)
        else:
            yield from eager_torch(64, 64, 16, 3, 8)


if __name__ == "__main__":
    measure.command_line(cases, __doc__)
