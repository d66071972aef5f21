"""From a model that TRL's ``RewardTrainer`` saved to rewards of every user.

    python -m experiments.recipes.reward_trainer reward_model pairs.jsonl --out mine

The pairs have the columns ``annotator_id``, ``chosen``, ``rejected`` and, for explicit
prompts, ``prompt``. ``RewardTrainer`` ends a plain text with the end-of-sequence token,
so the features of strings are read there, too.
"""

import argparse
from pathlib import Path

import jax

import lore_jax as lore
from lore_jax import hf


def fit_users(reward_model, pairs, out, *, rank=2, seed=0, user="annotator_id", **fit):
    """Embeds, fits and saves.

    Args:
        reward_model: folder that ``RewardTrainer.save_model`` wrote.
        pairs: a data set in one of TRL's preference formats.
        out: folder that gets the feature table and the fit; a stopped run continues.
        rank: K.
        seed: of the fit.
        user: column of the users' names.
        **fit: of ``lore.fit``.

    Returns:
        What ``lore.fit`` returned.
    """
    from transformers import AutoTokenizer

    found = hf.from_dataset(pairs, user)
    end = AutoTokenizer.from_pretrained(reward_model).eos_token
    texts = [
        text if not isinstance(text, str) or text.endswith(end) else text + end
        for text in found.texts
    ]
    out = Path(out)
    features = hf.embed(texts, reward_model, folder=out)
    prefs = found.preferences(features)
    fitted = lore.fit(prefs, rank=rank, key=jax.random.key(seed), **fit)
    lore.save(out / "fit.safetensors", fitted)
    return fitted


if __name__ == "__main__":
    import datasets

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reward_model")
    parser.add_argument("pairs", help="JSON lines")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows = datasets.load_dataset("json", data_files=args.pairs, split="train")
    print(fit_users(args.reward_model, rows, args.out))
