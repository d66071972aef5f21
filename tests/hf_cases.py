"""What the tests of `lore_jax.hf` share."""

import numpy as np
import pytest
from fixtures import sources

torch = pytest.importorskip("torch", reason="needs the extra 'hf'")
transformers = pytest.importorskip("transformers", reason="needs the extra 'hf'")


D, K = 16, 3


def some_texts(number=12, seed=0):
    """Conversations of different length, and two strings."""
    rng = np.random.default_rng(seed)
    chats = [
        [
            {"role": "user", "content": sources.sentence(rng)},
            {"role": "assistant", "content": sources.sentence(rng, 1, 30)},
        ]
        for _ in range(number)
    ]
    return [*chats, "A string.", "And another string, a longer one."]


def bert(labels=1, seed=0):
    """An encoder: its head is behind a pooler, and has biases."""
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=262, hidden_size=D, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=512, num_labels=labels,
        initializer_range=0.2, pad_token_id=0,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).eval()
