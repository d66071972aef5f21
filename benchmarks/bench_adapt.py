"""Adaptation of new users: one JSON line a case.

    python -m benchmarks.bench_adapt [--quick] [--torch] [--compare old.json]

- raw: from features, U=2,000 × 10 pairs, D=4096, K=5, over one `features @ V`.
- projected: users/s where features already are projected, against 500 jitted, vmapped
  optax Adam steps on the same arrays (on a CPU on at most 8,192 of the users, scaled).
  `kernel` is the pure solver on z[U, P, K] in one program, `adapt` the public call with
  everything around it.
- uneven: most users with 3 pairs, some with 3,000, over an even population of as many
  users and pairs.
- serving: one user, and the programs that batches of 1 … 10,000 users compile.
- store: a user more, 3 pairs more and three users read, of 1,000,000 over of 1,000.

The kernels are `lore_jax._solve.simplex` and `lore_jax._posterior.table`, internals:
there is no public step below `adapt_users`.

Typical output (2 idle CPU cores, jax 0.10.2, one --quick run; ratios of two such runs
differ by about 10 %):

    raw default      U=2,000          27 ms   1.14 of one read
    raw ml           U=2,000          29 ms   1.23 of one read
    adapt default    U=100,000 K=5   403,000 users/s   42 times Adam
    adapt ml         U=100,000 K=5   454,000 users/s   47 times Adam
    adapt default    U=8,192 K=20    117,000 users/s   20 times Adam
    adapt ml         U=8,192 K=20     28,000 users/s   4.8 times Adam
    uneven default   U=5,000          30 ms   1.54 times an even population
    uneven ml        U=5,000          23 ms   1.19 times an even population
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import lore_jax as lore
from benchmarks import measure
from lore_jax._backend import tuning
from lore_jax._posterior.table import posterior_mean
from lore_jax._solve import simplex
from lore_jax.prior import make_atoms

ADAM_STEPS = 500
# On a CPU the rate is that of a cache-sized batch.
ADAM_USERS = {True: 8192, False: 1 << 20}
METHODS = {
    "default": lore.PosteriorMean(),
    "ml": lore.MaximumLikelihood(),
    "map": lore.MAP(0.3),
}


def make_prior(rank: int) -> lore.Prior:
    """The atoms of a fitted prior, refined and tempered like one."""
    atoms = make_atoms(jax.random.key(0), rank, lore.Search().num_atoms)
    return lore.Prior(
        atoms=atoms,
        log_weights=jnp.full(len(atoms), -np.log(len(atoms)), jnp.float32),
        concentration=jnp.float32(20.0),
        tempering=jnp.float32(0.3),
    )


def make_users(counts, width: int, *, seed: int = 0, sd: float = 3.0, put=jnp.asarray):
    """Choices of Dirichlet(0.3) users, margins of `sd` under every direction.

    The planted reward reads the first min(width, 8) features only; `put` says where
    the features live, and the rest of them is drawn there.
    """
    rng = np.random.default_rng(seed)
    user = np.repeat(np.arange(len(counts)), counts)
    seen = min(width, 8)
    x = rng.standard_normal((len(user), seen), np.float32) * np.float32(sd)
    truth = rng.dirichlet(np.full(seen, 0.3), len(counts)).astype(np.float32)
    margin = np.einsum("nk,nk->n", x, truth[user])
    chosen_first = rng.random(len(user)) < 1 / (1 + np.exp(-margin))
    x = put(x * np.where(chosen_first, 1, -1).astype(np.float32)[:, None])
    rest = len(user), width - seen
    if put is np.asarray:
        x = np.concatenate(
            [x, rng.standard_normal(rest, np.float32) * sd], 1, dtype="f4"
        )
    elif width > seen:
        noise = jax.random.normal(jax.random.key(seed), rest) * sd
        x = jnp.concatenate([x, noise], axis=1)
    rows = np.arange(len(user))
    return lore.Preferences.from_pairs(x, rows, None, user, len(counts))


def adam_users(z, logits):
    """Plain Adam on the logits of every user: z[U, P, K] → weights[U, K]."""
    optimiser = optax.adam(0.5)

    def loss(logits, z):
        return jnp.mean(jax.nn.softplus(-z @ jax.nn.softmax(logits)))

    def user(z, logits):
        def step(carry, _):
            logits, state = carry
            updates, state = optimiser.update(jax.grad(loss)(logits, z), state)
            return (optax.apply_updates(logits, updates), state), None

        start = logits, optimiser.init(logits)
        return jax.nn.softmax(lax.scan(step, start, length=ADAM_STEPS)[0][0])

    return jax.vmap(user)(z, logits)


def default_kernel(z, weight, prior):
    """What the default method computes, from z[U, P, K] to weights[U, K]."""
    mean = posterior_mean(z, weight, None, prior, unit_weights=True)
    power = jnp.sum(weight, axis=1, keepdims=True) ** -prior.tempering
    barrier = prior.concentration * mean
    return simplex.maximum_a_posteriori(z, power * weight, barrier, start=mean).weights


def kernels(rank: int):
    """name → jitted (z, weight) → weights."""
    prior = make_prior(rank)
    alpha = jnp.full((1, rank), 0.3)
    return {
        "default": jax.jit(lambda z, w: default_kernel(z, w, prior)),
        "ml": jax.jit(lambda z, w: simplex.maximum_likelihood(z, w).weights),
        "map": jax.jit(
            lambda z, w: (
                simplex.maximum_a_posteriori(
                    z, w, jnp.broadcast_to(alpha, (len(z), rank))
                ).weights
            )
        ),
    }


def raw(num_users, num_pairs, width, rank, seconds):
    """From features to weights, over one read of the same features."""
    prefs = make_users(np.full(num_users, num_pairs), width, sd=0.1)
    basis = jax.random.normal(jax.random.key(0), (width, rank))
    read = jax.jit(functools.partial(jnp.matmul, precision=measure.PRECISION))
    model = lore.RewardModel(basis, make_prior(rank))
    calls = {"read": lambda: read(prefs.features, basis)}
    for name in ("default", "ml"):
        calls[name] = functools.partial(lore.adapt, model, prefs, method=METHODS[name])
    calls["predict"] = lambda: lore.predict_proba(model, prefs, prefs)
    result = measure.interleave(calls, seconds=seconds)
    shape = dict(U=num_users, P=num_pairs, D=width, K=rank, dtype="float32")
    for name in ("default", "ml", "predict"):
        row = dict(
            case=f"raw {name}",
            **shape,
            **result[name],
            users_per_s=num_users / result[name]["median_s"],
            ratio_to_read=result[name]["median_s"] / result["read"]["median_s"],
        )
        if name == "predict":
            seconds = result["default"]["median_s"]
            row["ratio_to_adapt"] = row["median_s"] / seconds
        yield row


def projected(
    num_users, num_pairs, rank, seconds, names=tuple(METHODS), what=("kernel", "adapt")
):
    """Users per second on projected features, against Adam."""
    prefs = make_users(np.full(num_users, num_pairs), rank)
    z = prefs.features.reshape(num_users, num_pairs, rank)
    weight = jnp.ones((num_users, num_pairs))
    few = min(num_users, ADAM_USERS[tuning().branches])
    adam = jax.jit(adam_users)
    part, start = z[:few], jnp.zeros((few, rank))
    calls = {"adam": lambda: adam(part, start)}
    model = lore.RewardModel(jnp.eye(rank), make_prior(rank))
    pure = kernels(rank)
    for name in names:
        calls[f"kernel {name}"] = functools.partial(pure[name], z, weight)
        calls[f"adapt {name}"] = functools.partial(
            lore.adapt, model, prefs, method=METHODS[name]
        )
    calls = {n: c for n, c in calls.items() if n.split()[0] in ("adam", *what)}
    result = measure.interleave(calls, repeats=9, seconds=seconds)
    adam_rate = few / result["adam"]["median_s"]
    shape = dict(U=num_users, P=num_pairs, K=rank, dtype="float32")
    yield dict(case="projected adam", **shape, **result["adam"], users_per_s=adam_rate)
    for name in list(calls)[1:]:
        rate = num_users / result[name]["median_s"]
        row = dict(case=f"projected {name}", **shape, **result[name], users_per_s=rate)
        row["ratio_over_adam"] = rate / adam_rate
        kernel = result.get(name.replace("adapt", "kernel"))
        if name.startswith("adapt"):
            if kernel is not None:
                row["ratio_to_kernel"] = row["median_s"] / kernel["median_s"]
            row["peak_over_input"] = _over(measure.peak_bytes(calls[name]), z.nbytes)
        else:
            fn = pure[name.removeprefix("kernel ")]
            row.update(measure.temporaries(fn, z, weight))
        yield row


def _over(value, size):
    return None if value is None else value / size


def uneven(num_users, rank, seconds, longest=3000):
    """Most with 3 pairs and one in 1,000 with 3,000, over as many even ones."""
    many = max(1, num_users // 1000)
    counts = np.full(num_users, 3)
    counts[:many] = longest
    total = counts.sum()
    even = np.full(num_users, total // num_users)
    even[: total - even.sum()] += 1
    model = lore.RewardModel(jnp.eye(rank), make_prior(rank))
    calls = {}
    for kind, values in (("uneven", counts), ("even", even)):
        prefs = make_users(values, rank)
        for name in ("default", "ml"):
            calls[f"{kind} {name}"] = functools.partial(
                lore.adapt, model, prefs, method=METHODS[name]
            )
    result = measure.interleave(calls, repeats=7, seconds=seconds)
    for name in ("default", "ml"):
        own, other = result[f"uneven {name}"], result[f"even {name}"]
        yield dict(
            case=f"uneven {name}",
            **dict(U=num_users, N=int(total), K=rank, dtype="float32"),
            **own,
            ratio_to_even=own["median_s"] / other["median_s"],
        )


def serving(width, rank, seconds, largest=10_000):
    """Batches as they arrive: NumPy features, sizes that vary."""
    rng = np.random.default_rng(0)
    basis = jax.random.normal(jax.random.key(0), (width, rank))
    model = lore.RewardModel(basis, make_prior(rank))
    read = jax.jit(functools.partial(jnp.matmul, precision=measure.PRECISION))

    def batch(size):
        return make_users(rng.integers(1, 40, size), width, sd=0.1, put=np.asarray)

    one = batch(1)
    for name in ("default", "ml"):
        adapt = functools.partial(lore.adapt, model, method=METHODS[name])
        with measure.COMPILATIONS.counted() as compiled:
            for size in np.unique(np.geomspace(1, largest, 24).astype(int)):
                adapt(batch(size))
        calls = {
            "read": lambda: read(one.features, basis),
            "call": lambda adapt=adapt: adapt(one),
        }
        result = measure.interleave(calls, repeats=100, seconds=seconds)
        overhead = result["call"]["median_s"] - result["read"]["median_s"]
        yield dict(
            case=f"serving {name}",
            **dict(U=1, D=width, K=rank, dtype="float32"),
            **{k: v for k, v in result["call"].items() if k != "programs"},
            overhead_s=overhead,
            programs_1_to_10000=compiled["programs"],
        )


def store(sizes, rank, seconds):
    """Adding a user and observing 3 pairs in a `UserStore`, small and large."""
    model = lore.RewardModel(np.eye(rank, dtype=np.float32), make_prior(rank))
    table = np.random.default_rng(0).standard_normal((64, rank), np.float32)
    stores, calls = {}, {}
    for size in sizes:
        stores[size] = lore.UserStore(model)
        stores[size].add([f"u{i}" for i in range(size)])
    names = (f"new{i}" for i in itertools.count())
    pairs = lore.Preferences.from_pairs(table, [0, 1, 2], [3, 4, 5], ["u7"] * 3)
    for size, one in stores.items():
        calls[f"add {size}"] = lambda one=one: one.add([next(names)])
        calls[f"observe {size}"] = lambda one=one: one.observe(pairs)
        calls[f"read {size}"] = lambda one=one: one.weights(["u1", "u2", "u7"])
    result = measure.interleave(calls, repeats=50, seconds=seconds)
    for what in ("add", "observe", "read"):
        small = result[f"{what} {sizes[0]}"]["median_s"]
        for size in sizes:
            row = result[f"{what} {size}"]
            ratio = row["median_s"] / small
            yield dict(
                case=f"store {what}", U=size, K=rank, **row, ratio_to_small=ratio
            )


def eager_torch(num_users, num_pairs, width, rank):
    """The published adaptation, eager PyTorch: a Python loop over users.

    Written from the paper's description: every user holds its own [P, D] differences
    and its own logits, and 500 Adam steps at T = 100 go through all of x · V · p.
    """
    import torch

    prefs = make_users(np.full(num_users, num_pairs), width, sd=0.1)
    users = torch.tensor(np.asarray(prefs.features)).reshape(num_users, -1, width)
    basis = torch.randn(width, rank)

    def run():
        for x in users:
            logits = torch.randn(rank, requires_grad=True)
            adam = torch.optim.Adam([logits], lr=0.5)
            for _ in range(ADAM_STEPS):
                margin = x @ basis @ torch.softmax(logits, 0) / 100
                loss = torch.nn.functional.softplus(-margin).mean()
                adam.zero_grad()
                loss.backward()
                adam.step()

    result = measure.timed(run, 3, 0)
    shape = dict(U=num_users, P=num_pairs, D=width, K=rank, dtype="float32")
    rate = num_users / result["median_s"]
    yield dict(case="eager PyTorch loop", **shape, **result, users_per_s=rate)


def cases(size: str, torch: bool = False):
    """Rows of one size: "tiny" (a smoke test), "quick" or "full"."""
    if size == "tiny":  # one shape of chunk, so that each method compiles once
        yield from raw(30, 4, 64, 3, 0.0)
        yield from projected(40, 4, 3, 0.0, ("default", "ml"), ("adapt",))
        yield from uneven(50, 3, 0.0, longest=30)
        yield from serving(16, 3, 0.0, largest=8)
        yield from store((20, 200), 3, 0.0)
    elif size == "quick":  # compiling, about 5 s a program, is most of its time
        yield from raw(2000, 10, 4096, 5, 3.0)
        yield from projected(100_000, 10, 5, 3.0, ("default", "ml"), ("adapt",))
        yield from projected(8_192, 10, 20, 3.0, ("default", "ml"), ("adapt",))
        yield from uneven(5_000, 5, 2.0)
        yield from store((1_000, 1_000_000), 5, 1.0)
        if not tuning().branches:  # sizes that an accelerator is for
            yield from raw(40_000, 10, 4096, 5, 3.0)
            yield from projected(1_000_000, 10, 5, 3.0, ("default", "ml"))
            yield from projected(100_000, 10, 20, 3.0, ("default", "ml"))
    else:
        yield from raw(2000, 10, 4096, 5, 20.0)
        for users, rank in itertools.product((10_000, 100_000, 1_000_000), (5, 20)):
            yield from projected(users, 10, rank, 30.0)
        yield from uneven(200_000, 5, 20.0)
        yield from serving(4096, 5, 5.0)
        yield from store((1_000, 1_000_000), 5, 5.0)
    if torch:
        yield from eager_torch(4 if size == "tiny" else 20, 10, 4096, 5)


if __name__ == "__main__":
    measure.command_line(cases, __doc__)
