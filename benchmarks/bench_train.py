"""One training iteration at the memory limit: one JSON line a case.

    python -m benchmarks.bench_train [--quick] [--torch] [--compare old.json]

Every iteration stands over the sum of its two reads, one jitted `features @ V` and the
fastest of four jitted back-projections, that took turns with it: `ratio_to_reads`.
`roofline` is the share of the measured copy bandwidth at which the two reads that an
iteration needs went by. On a CPU `ratio_to_reads_at_once` compares as many iterations
at once as there are cores, at most 4, with as many reads at once: so the search of a
fit trains. `fused products` projects and back-projects block by block, as
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

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import lore_jax as lore
from benchmarks import measure
from lore_jax._backend import on_threads, tuning
from lore_jax._pairs.pack import pack
from lore_jax._pairs.used_rows import aligned_rows
from lore_jax._train import coordinates, marginal, published, resume, steps
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

    def copies(self, count):
        """So many trainers that share the problem."""
        return [
            Iteration(jax.tree.map(jnp.array, self.state), self.problem, self.parts)
            for _ in range(count)
        ]

    def memory(self):
        """Bytes of temporaries of the compiled program."""
        return measure.temporaries(
            *(steps.run, self.state, self.problem),
            steps=self.parts,
            num_steps=STEPS,
        )


def at_once(calls):
    """All calls, each on a thread: as the search of a fit trains on a CPU."""
    return on_threads(lambda call: jax.block_until_ready(call()), calls)


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
    M,
    N,
    D,
    K,
    U,
    seconds,
    *,
    case="iteration",
    bandwidth=None,
    fusions=tuple(FUSED),
    dtype="float32",
):
    """Both trainers' iterations over the two reads of the same table.

    A bfloat16 table is read as the library reads it.
    """
    prefs = lore.store_as(make_problem(M, N, D, K, U), dtype)
    prefs = prefs.replace(features=aligned_rows(prefs.features))
    x, M = prefs.features, len(prefs.features)
    plain = dtype == "float32"
    products = BACK_PROJECTIONS
    if not plain:
        products = {"back vjp of project": products["back vjp of project"]}
    basis = jax.random.normal(jax.random.key(3), (D, K))
    g = jax.random.normal(jax.random.key(4), (M, K))
    calls = {"read": functools.partial(_read if plain else lore.project, x, basis)}
    calls |= {name: functools.partial(f, x, g) for name, f in products.items()}
    if case == "iteration":
        calls |= {name: functools.partial(FUSED[name], x, basis) for name in fusions}
    trainers = iterations(prefs, K)
    calls.update(trainers)
    several = min(tuning(x).threads, 4) if jax.default_backend() == "cpu" else 1
    if several > 1:
        copies = {name: [calls[name]] * several for name in ("read", *products)}
        copies |= {name: trainer.copies(several) for name, trainer in trainers.items()}
        for name, each in copies.items():
            calls[f"{name} at once"] = functools.partial(at_once, each)
    result = measure.interleave(calls, seconds=seconds)
    fastest = min(products, key=lambda name: result[name]["median_s"])
    reads = result["read"]["median_s"] + result[fastest]["median_s"]
    shape = dict(M=M, N=N, D=D, K=K, U=U, dtype=dtype)
    for name in calls:
        if case != "iteration" or name in trainers or "at once" in name:
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
        if several > 1:
            together = {k: x["median_s"] for k, x in result.items() if "at once" in k}
            both = together["read at once"] + together[f"{fastest} at once"]
            row["at_once"] = several
            row["ratio_to_reads_at_once"] = together[f"{name} at once"] / STEPS / both
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


def torch_device():
    """The device that JAX works on, as PyTorch names it."""
    import torch

    if jax.default_backend() == "gpu":
        if not torch.cuda.is_available():
            raise SystemExit("--torch needs a PyTorch with CUDA beside JAX on a GPU")
        return torch.device("cuda")
    return torch.device("cpu")


def torch_problem(M, N, D, K, U):
    """(features, rows, user, V, logits) of `make_problem`, in PyTorch.

    `rows` are those of both sides of the pairs, or None where the features are
    differences.
    """
    import torch

    prefs, device = make_problem(M, N, D, K, U), torch_device()
    columns = [
        None if x is None else torch.tensor(x, dtype=torch.long, device=device)
        for x in (prefs.chosen, prefs.rejected, prefs.user)
    ]
    x = torch.tensor(np.asarray(prefs.features), device=device)
    basis = torch.randn(D, K, device=device, requires_grad=True)
    logits = torch.randn(U, K, device=device, requires_grad=True)
    rows = None if prefs.rejected is None else columns[:2]
    return x, rows, columns[2], basis, logits


def waiting(call):
    """`call`, and then a wait for the device."""
    import torch

    def run():
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return run


def eager_torch(M, N, D, K, U):
    """Both published loops in eager PyTorch, from the paper's description.

    One iteration computes N×U logits and picks each pair's column, as published.
    """
    import torch

    x, _, user, basis, logits = torch_problem(M, N, D, K, U)
    place = torch.arange(N, device=x.device)
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
        name: waiting(functools.partial(lambda steps: [descend(s) for s in steps], s))
        for name, s in forms.items()
    }
    result = measure.interleave(calls, repeats=3, seconds=0)
    for name in forms:
        shape = dict(M=M, N=N, D=D, K=K, U=U, dtype="float32")
        yield dict(case=f"eager PyTorch {name}", **shape, **result[name])


def competent_step(M, N, D, K, U):
    """The alternating step in PyTorch as it should be: two reads of the features.

    Each pair takes its user's weights, W descends on the projection of this step, and V
    on the same projection with the new weights. What lies between the two products is
    compiled by `torch.compile`.
    """
    import torch

    x, rows, user, basis, logits = torch_problem(M, N, D, K, U)
    on_w = torch.optim.Adam([logits], lr=0.5, fused=True)
    on_v = torch.optim.Adam([basis], lr=0.5, fused=True)

    @torch.compile
    def loss_of(projected, logits):
        if rows is not None:
            projected = projected[rows[0]] - projected[rows[1]]
        margin = (projected * torch.softmax(logits, 1)[user]).sum(1) / 100
        return torch.nn.functional.softplus(-margin).mean()

    def step():
        projected = x @ basis
        on_w.zero_grad()
        loss_of(projected.detach(), logits).backward()
        on_w.step()
        on_v.zero_grad()
        loss_of(projected, logits.detach()).backward()
        on_v.step()

    return waiting(step)


def beside_torch(M, N, D, K, U, seconds):
    """The published alternating iteration over the competent one in PyTorch."""
    import torch

    torch.set_float32_matmul_precision("highest")  # As JAX multiplies here.
    ours = iterations(make_problem(M, N, D, K, U), K)["alternating"]
    theirs = competent_step(M, N, D, K, U)
    calls = {"ours": ours, "theirs": lambda: [theirs() for _ in range(STEPS)] and None}
    result = measure.interleave(calls, seconds=seconds)
    shape = dict(M=M, N=N, D=D, K=K, U=U, dtype="float32")
    for name, case in (
        ("theirs", "compiled PyTorch alternating"),
        ("ours", "iteration alternating beside it"),
    ):
        row = dict(case=case, **shape, **result[name])
        for key in ("median_s", "min_s"):
            row[key] /= STEPS
        if name == "ours":
            theirs_s = result["theirs"]["median_s"]
            row["ratio_over_torch"] = result["ours"]["median_s"] / theirs_s
        yield row


def planted_problem(M, N, D, K, U, seed=0):
    """`make_problem`'s pairs, chosen by users of a planted basis."""
    prefs = make_problem(M, N, D, K, U, differences=False, seed=seed)
    rng = np.random.default_rng(seed + 1)
    basis = rng.normal(size=(D, K)).astype(np.float32) * (2 / D) ** 0.5
    weights = rng.dirichlet(np.full(K, 0.3), U).astype(np.float32)
    proj = np.asarray(lore.project(prefs.features, basis))
    z = proj[prefs.chosen] - proj[prefs.rejected]
    margin = (z * weights[prefs.user]).sum(1)
    swap = rng.random(N) > 1 / (1 + np.exp(-margin))
    columns = np.where(
        swap, (prefs.rejected, prefs.chosen), (prefs.chosen, prefs.rejected)
    )
    return lore.Preferences.from_pairs(prefs.features, *columns, prefs.user, U)


def whole_fit(M, N, D, K, U):
    """A default fit with its search, over the reads that its trainings need.

    The search is counted as it runs: so many steps of so many columns. What a step of
    these columns must cost is measured: one projection and one back-projection.
    """
    prefs, counted = planted_problem(M, N, D, K, U), collections.Counter()
    original = resume.train

    def counting(state, problem, *, num_steps, **settings):
        columns = int(np.prod(state.theta.shape)) // state.theta.shape[-2]
        counted[columns] += num_steps
        return original(state, problem, num_steps=num_steps, **settings)

    def fit():
        counted.clear()
        return lore.fit(prefs, rank=K, key=jax.random.key(0)).model.basis

    resume.train = counting
    try:
        result = measure.timed(fit, repeats=3, seconds=0)
    finally:
        resume.train = original
    x, back = aligned_rows(prefs.features), BACK_PROJECTIONS["back vjp of project"]
    calls = {"read": functools.partial(_read, x, jnp.ones((D, K)))}
    for columns in counted:
        v, g = jnp.ones((D, columns)), jnp.ones((len(x), columns))
        calls[columns] = lambda v=v, g=g: (lore.project(x, v), back(x, g))
    cost = measure.interleave(calls, repeats=5, seconds=20.0)
    needed = sum(n * cost[columns]["median_s"] for columns, n in counted.items())
    row = dict(case="whole default fit", **dict(M=M, N=N, D=D, K=K, U=U), **result)
    row["reads_of_search"] = round(needed / cost["read"]["median_s"])
    row["ratio_to_search"] = row["median_s"] / needed
    row["steps_by_columns"] = {str(k): v for k, v in sorted(counted.items())}
    yield row


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
        yield from whole_fit(20_000, 20_000, 512, 5, 1000)
    if torch:
        small, large = (64, 64, 16, 3, 8), (48_000, 48_000, 4096, 5, 4800)
        shape, seconds = (small, 0.0) if size == "tiny" else (large, 6.0)
        yield from beside_torch(*shape, seconds)
        yield from eager_torch(*shape)


if __name__ == "__main__":
    measure.command_line(cases, __doc__)
