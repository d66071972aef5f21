"""RewardBench 2 with the mixtures of users, also of users who were adapted later.

    python -m experiments.recipes.bench_users fit.safetensors base rows.jsonl ann bob

The rows are those of ``allenai/reward-bench-2``. `experiments.reward_bench` is the full
command; this is its core with `hf.embed`.
"""

import argparse
import json
from pathlib import Path

import numpy as np

import lore_jax as lore
from experiments.reward_bench import evaluate, read_prompts
from experiments.texts import TextIndex
from lore_jax import hf


def bench(rows, model, users, names, base, tokenizer=None, **settings) -> dict:
    """{user: {subset: score}}, with the population's mixture first.

    Args:
        rows: of the benchmark.
        model: the reward model.
        users: what ``fit`` or ``adapt`` returned.
        names: which users are scored.
        base: the model that made the features, as in ``hf.embed``.
        tokenizer: of the base.
        **settings: of ``hf.embed``.
    """
    texts = TextIndex()
    prompts = read_prompts(rows, texts)
    features = hf.embed(texts.messages, base, tokenizer, **settings)
    mean = np.full((1, model.rank), 1 / model.rank)
    if model.prior is not None:
        mean = np.asarray(model.prior.mean)[None]
    (population,) = np.asarray(lore.score(model, mean, features))
    table = {"population": evaluate(prompts, population)}
    every = np.arange(len(texts))[None]
    for name in names:
        rewards = lore.score_rows(model, users, features, [name], every)
        table[str(name)] = evaluate(prompts, np.asarray(rewards)[0])
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for argument in ("fit", "base", "rows"):
        parser.add_argument(argument)
    parser.add_argument("users", nargs="*")
    args = parser.parse_args()
    fitted = lore.load(args.fit)
    lines = Path(args.rows).read_text(encoding="utf-8").splitlines()
    table = bench(map(json.loads, lines), fitted.model, fitted, args.users, args.base)
    print(json.dumps(table, indent=2))
