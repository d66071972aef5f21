"""Reward-model embeddings: conversations → a memory-mapped feature table.

The feature of a text is the hidden state of its last real token under a
sequence-classification reward model, so that ``features @ head`` is the model's own
reward, with ``head`` the model's classification weights. That identity is checked on
the first batch of every run, with that batch's padding, and a run that fails it stops.

The chat template is applied once, and it alone adds special tokens. Batches hold texts
of similar length, longest first, so that memory runs out at once or never. Rows are
finished in that order; a marker beside the table, replaced atomically, counts them, and
a killed run continues there.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.prepared import digest
from experiments.stored import load_array, load_features, read_json, write_array
from experiments.texts import TextIndex
from lore_jax.hf.table import ResumableTable, batches, longest_first
from lore_jax.hf.text_model import TextModel, check_logits, load_parts, render

DEFAULT_MODEL = "Skywork/Skywork-Reward-Llama-3.1-8B-v0.2"
SENTINEL = "\u2060response\u2060"
TEMPLATE_SECONDS = 10.0  # for one text; a template is a program of the model's author


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """How to embed.

    Attributes:
        model: name on the hub, or a folder.
        revision: branch, tag or commit on the hub.
        device: "cuda", "cpu", …; None takes a GPU if there is one.
        model_dtype: "bfloat16" or "float32", what the model computes in.
        table_dtype: "bfloat16" or "float32", what the table stores.
        max_length: longest text in tokens; longer ones lose their beginning.
        batch_tokens: tokens of a batch, padding included.
        batch_size: most texts in a batch.
        padding_side: "left", "right", or None for the tokenizer's own.
        save_seconds: least time between two markers.
    """

    model: str = DEFAULT_MODEL
    revision: str | None = None
    device: str | None = None
    model_dtype: str = "bfloat16"
    table_dtype: str = "bfloat16"
    max_length: int = 4096
    batch_tokens: int = 16384
    batch_size: int = 64
    padding_side: str | None = None
    save_seconds: float = 30.0

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        for name in ("model_dtype", "table_dtype"):
            if getattr(self, name) not in ("bfloat16", "float32"):
                raise ValueError(
                    f"{name} must be 'bfloat16' or 'float32', "
                    f"got {getattr(self, name)!r}"
                )
        if self.padding_side not in (None, "left", "right"):
            raise ValueError(f"padding_side must be left or right: {self.padding_side}")
        for name in ("max_length", "batch_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    def identity(self) -> dict:
        """The settings that decide the numbers in the table."""
        names = ("model", "revision", "model_dtype", "table_dtype", "max_length")
        return {name: getattr(self, name) for name in names}


class RewardModel(TextModel):
    """A sequence-classification model with one output, and its tokenizer.

    Attributes:
        head: float32[D], its weights.
    """

    def __init__(self, model, tokenizer, config: EmbedConfig) -> None:
        """Wrap a loaded model.

        Raises:
            ValueError: if the model has no single-output linear head, or the tokenizer
                no chat template, or one that is too long.
        """
        if not tokenizer.chat_template:
            raise ValueError(f"the tokenizer of {config.model} has no chat template")
        super().__init__(
            model,
            tokenizer,
            "reward",
            max_length=config.max_length,
            padding_side=config.padding_side,
        )
        if self.weight.shape[1] != 1:
            raise ValueError(
                f"the head has {self.weight.shape[1]} outputs, expected one"
            )
        self.config, self.head = config, self.weight[:, 0]

    @classmethod
    def load(cls, config: EmbedConfig) -> "RewardModel":
        """Load model and tokenizer, from safetensors alone and without their code.

        Raises:
            ValueError: if the checkpoint lacks weights, above all the head: a language
                model loaded this way gets a random one.
        """
        parts = load_parts(
            config.model,
            kind="reward",
            dtype=config.model_dtype,
            device=config.device,
            revision=config.revision,
        )
        return cls(*parts, config)

    def render(self, messages: Sequence[dict]) -> str:
        """The text that the model reads: the chat template, applied once.

        Raises:
            ValueError: if the template takes too long, or adds too much.
        """
        return render(self.tokenizer, messages, TEMPLATE_SECONDS)

    def response(self, messages: Sequence[dict]) -> str:
        """What the template makes of the last message's content alone."""
        text = self.render(messages)
        last = {**messages[-1], "content": SENTINEL}
        before, found, after = self.render([*messages[:-1], last]).partition(SENTINEL)
        if not found or not (text.startswith(before) and text.endswith(after)):
            return text
        return text[len(before) : len(text) - len(after)]

    def check_head(self, batch: Sequence[np.ndarray], features: np.ndarray) -> float:
        """Stop unless ``features @ head`` are the model's own logits.

        Returns:
            The relative RMS error.

        Raises:
            ValueError: with the first few values of both.
        """
        return check_logits(self, batch, features, self.head[:, None], self.bias)


def embed_texts(reward: RewardModel, texts: TextIndex, folder) -> np.ndarray:
    """Write the feature table of ``texts`` into ``folder``, or continue it.

    Args:
        reward: the model.
        texts: M distinct texts.
        folder: gets ``features.npy``, ``features.json`` and ``head.npy``.

    Returns:
        The table [M, D], memory-mapped.

    Raises:
        ValueError: if the folder holds a table of other texts or another model, or one
            whose finished rows have changed, if two texts are the same to the model,
            or the head's check fails.
    """
    from tqdm import tqdm

    config, folder = reward.config, Path(folder)
    ids = [reward.tokens(m) for m in tqdm(texts.messages, "tokens", disable=None)]
    _refuse_equal(ids)
    lengths = np.array([len(i) for i in ids])
    table = ResumableTable(
        folder,
        start_marker(reward, texts),
        longest_first(lengths),
        len(reward.head),
        config.table_dtype,
        save_seconds=config.save_seconds,
    )
    table.notes["at_max_length"] = int((lengths == config.max_length).sum())
    write_array(folder / "head.npy", reward.head)
    center, fresh = None, table.done == 0
    sizes = config.batch_tokens, config.batch_size
    with tqdm(
        total=len(ids), initial=table.done, desc="embed", disable=None
    ) as progress:
        for rows in batches(lengths, table.done, *sizes):
            values = reward.features(batch := [ids[row] for row in rows])
            if center is None:
                table.notes["head_error"] = reward.check_head(batch, values)
                center = _center(folder, config, values, fresh=fresh)
            table.write(values - center)
            progress.update(len(rows))
    return load_features(folder)


def is_complete(folder, config: EmbedConfig, texts: TextIndex) -> bool:
    """Whether a folder's table of these texts is done, so that no model is needed."""
    path = Path(folder) / "features.json"
    if not path.exists():
        return False
    found = read_json(path)
    wanted = {**config.identity(), "texts": texts.fingerprint(), "done": len(texts)}
    if any(found.get(name) != value for name, value in wanted.items()):
        return False
    return len(load_features(folder)) == len(texts)


def start_marker(reward: RewardModel, texts: TextIndex) -> dict:
    """What identifies a table: the model, its template, the texts."""
    return {
        **reward.config.identity(),
        "commit": getattr(reward.model.config, "_commit_hash", None),
        "template": digest(str(reward.tokenizer.chat_template))[:16],
        "texts": texts.fingerprint(),
    }


def _center(folder: Path, config: EmbedConfig, values: np.ndarray, *, fresh: bool):
    """What to subtract before rounding: every pair cancels it, and bits are saved.

    A model that computes in bfloat16 is stored exactly, with nothing subtracted.
    """
    if config.table_dtype == config.model_dtype or config.table_dtype == "float32":
        return np.float32(0)
    path = folder / "center.npy"
    if fresh:
        write_array(path, values.mean(0, dtype=np.float64).astype(np.float32))
    return load_array(path)


def _refuse_equal(ids: Sequence[np.ndarray]) -> None:
    first: dict[bytes, int] = {}
    for row, tokens in enumerate(ids):
        if (other := first.setdefault(tokens.tobytes(), row)) != row:
            raise ValueError(
                f"texts {other} and {row} differ, but not to the model: the template "
                "or the tokenizer drops the difference, or max_length cuts it off"
            )
