"""Hugging Face in and out: data sets, embeddings, reward heads; the extra `hf`.

`import lore_jax` does not import this package. torch, transformers and datasets are
imported when a function needs them.
"""

from lore_jax.hf.datasets import PreferenceTexts as PreferenceTexts
from lore_jax.hf.datasets import from_dataset as from_dataset
from lore_jax.hf.embedding import embed as embed
from lore_jax.hf.export import export_head as export_head
from lore_jax.hf.export import load_head as load_head
