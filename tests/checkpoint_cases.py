"""A fit to save, and ways to damage its file."""

import json

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

import lore_jax as lore
from lore_jax.io import files
from lore_jax.preferences import Ids
from lore_jax.results import History


def make_fit(num_users=4, num_features=5, *, pruned=False, names=True, seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    wide = lore.RewardParams(normal(num_features, 7), normal(num_users, 7))
    kept = jnp.array([0, 2, 6])
    params = lore.RewardParams(wide.basis[:, kept], wide.logits[:, kept])
    users = np.array(["Ünal", "b c", "", "zoe"][:num_users])
    prior = lore.Prior(
        atoms=jnp.eye(3),
        log_weights=jnp.full(3, -np.log(3), jnp.float32),
        concentration=jnp.asarray(np.inf, jnp.float32),
        tempering=jnp.asarray(0.25, jnp.float32),
        decay=jnp.asarray(0.5, jnp.float32),
    )
    return lore.Fitted(
        model=lore.RewardModel(params.basis, prior, temperature=100.0),
        weights=params.weights,
        logits=params.logits,
        history=History(
            loss=abs(normal(6)),
            weights_norm=abs(normal(6)),
            basis_norm=abs(normal(6)),
            selection=({"log_loss": 0.5, "chosen": True}, {"log_loss": float("inf")}),
        ),
        unpruned=wide if pruned else None,
        kept=kept if pruned else None,
        recipe=lore.PublishedAlternating(num_steps=6, prune=pruned),
        ids=Ids(users, np.array(["row 0", "row 1"])) if names else None,
    )


def rewrite(path, arrays=None, drop=(), record=None, **changes):
    """Saves the file again with other arrays, metadata and record.

    A record is a text, or values by their place in the file's own; `...` is none.
    """
    with safetensors.safe_open(path, framework="numpy") as file:
        metadata = {**file.metadata(), **changes}
        held = {name: file.get_tensor(name) for name in file.keys()}
    held.update(arrays or {})
    held = {name: x for name, x in held.items() if name not in drop}
    if isinstance(record, str):
        metadata["record"], record = record, None
    for place, value in (record or {}).items():
        tree = json.loads(metadata["record"])
        *parents, last = place.split(".")
        fields = tree["fields"]
        for name in parents:
            fields = fields[name]["fields"]
        fields[last] = value
        if value is ...:
            del fields[last]
        metadata["record"] = json.dumps(tree)
    metadata = {n: x for n, x in metadata.items() if n not in ("digest", *drop)}
    files.write_record(path, held, metadata)


NAN, INFINITY = np.float32("nan"), np.float32("inf")
