"""GRPO with every annotator's own reward: a reward function for TRL.

The data set has the columns ``prompt`` and ``annotator_id``. TRL calls a reward
function with ``prompts``, ``completions`` and every other column, one entry per
completion, and wants a list of floats.

    from trl import GRPOTrainer
    reward = make_reward(fitted.model, fitted, base, tokenizer)
    GRPOTrainer(model=policy, reward_funcs=reward, train_dataset=prompts).train()

A new annotator is adapted first: pass what ``lore.adapt`` returned as ``users``.

References:
    TRL, GRPO Trainer, "Using a custom reward function"
    (https://huggingface.co/docs/trl/grpo_trainer).
"""

from collections.abc import Callable

import numpy as np

import lore_jax as lore
from lore_jax import hf


def make_reward(
    model: lore.RewardModel,
    users,
    base,
    tokenizer=None,
    *,
    column: str = "annotator_id",
    **settings,
) -> Callable[..., list[float]]:
    """A function of prompts, completions and columns that returns the users' rewards.

    Args:
        model: the reward model.
        users: what ``fit`` or ``adapt`` returned for named users.
        base: the loaded model that made the features.
        tokenizer: of the base.
        column: of the data set, with the users' names.
        **settings: of ``hf.embed``.
    """

    def lore_reward(prompts, completions, **columns) -> list[float]:
        if column not in columns:
            raise ValueError(f"the data set has no column {column!r}: {list(columns)}")
        # Two strings or two lists of messages; either way the completion comes second.
        texts = [prompt + answer for prompt, answer in zip(prompts, completions)]
        features = hf.embed(texts, base, tokenizer, **settings)
        rows = np.arange(len(texts))
        rewards = lore.score_rows(model, users, features, columns[column], rows)
        return np.asarray(rewards, np.float64).tolist()

    return lore_reward
