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

import contextlib
import dataclasses
import hashlib
import inspect
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from experiments.stored import (
    load_array,
    load_features,
    read_json,
    view_table,
    write_array,
    write_json,
)
from experiments.tables import digest
from experiments.texts import TextIndex

DEFAULT_MODEL = "Skywork/Skywork-Reward-Llama-3.1-8B-v0.2"
TEMPLATE_DATE = "26 Jul 2024"  # some templates print today's date unless given one
SENTINEL = "\u2060response\u2060"
SAFE = {"trust_remote_code": False}  # No code of a repository runs,
SAFE_MODEL = {**SAFE, "use_safetensors": True}  # and no pickle is opened.
BLOCK = 4096  # rows read at a time
# A template is a program of the model's author: bounds of its size, of what it adds to
# a conversation (characters), and of its time.
TEMPLATE_SIZE, TEMPLATE_ADDS, TEMPLATE_SECONDS = 100_000, 20_000, 10.0


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


class RewardModel:
    """A sequence-classification model with a linear head, and its tokenizer."""

    def __init__(self, model, tokenizer, config: EmbedConfig) -> None:
        """Wrap a loaded model.

        Raises:
            ValueError: if the model has no single-output linear head ``score``, or the
                tokenizer no chat template, or one of more than ``TEMPLATE_SIZE``.
        """
        weight = getattr(getattr(model, "score", None), "weight", None)
        if weight is None:
            raise ValueError(
                f"{type(model).__name__} has no linear head `score`; load a reward "
                "model through AutoModelForSequenceClassification"
            )
        if weight.shape[0] != 1:
            raise ValueError(f"the head has {weight.shape[0]} outputs, expected one")
        if not tokenizer.chat_template:
            raise ValueError(f"the tokenizer of {config.model} has no chat template")
        if (size := len(str(tokenizer.chat_template))) > TEMPLATE_SIZE:
            raise ValueError(
                f"the chat template of {config.model} has {size} characters, expected "
                f"at most {TEMPLATE_SIZE}"
            )
        self.model, self.tokenizer, self.config = model.eval(), tokenizer, config
        self.head = weight.detach().float().cpu().numpy()[0]
        bias = getattr(model.score, "bias", None)
        self.bias = 0.0 if bias is None else float(bias.detach()[0])
        self.base = getattr(model, model.base_model_prefix)
        self.takes_positions = "position_ids" in inspect.signature(
            self.base.forward
        ).parameters  # fmt: skip
        self.side = config.padding_side or tokenizer.padding_side
        self.pad = self._padding_token()

    @classmethod
    def load(cls, config: EmbedConfig) -> "RewardModel":
        """Load model and tokenizer, from safetensors alone and without their code.

        Raises:
            ValueError: if the checkpoint lacks weights, above all the head: a language
                model loaded this way gets a random one.
        """
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
        model, info = AutoModelForSequenceClassification.from_pretrained(
            config.model,
            revision=config.revision,
            dtype=getattr(torch, config.model_dtype),
            output_loading_info=True,
            **SAFE_MODEL,
        )
        if missing := sorted(info["missing_keys"]):
            raise ValueError(
                f"{config.model} is not a trained reward model: its checkpoint lacks "
                f"{missing[:4]}"
            )
        tokenizer = AutoTokenizer.from_pretrained(
            config.model, revision=config.revision, **SAFE
        )
        return cls(model.to(device), tokenizer, config)

    def render(self, messages: Sequence[dict]) -> str:
        """The text that the model reads: the chat template, applied once.

        Raises:
            ValueError: if the template takes too long, or adds too much.
        """
        with time_limit(TEMPLATE_SECONDS, "the chat template"):
            text = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, date_string=TEMPLATE_DATE
            )
        said = sum(len(message["content"]) for message in messages)
        if len(text) > 2 * said + TEMPLATE_ADDS + TEMPLATE_ADDS // 20 * len(messages):
            raise ValueError(
                f"the chat template makes {len(text)} characters of {said} in "
                f"{len(messages)} messages"
            )
        return text

    def response(self, messages: Sequence[dict]) -> str:
        """What the template makes of the last message's content alone."""
        text = self.render(messages)
        last = {**messages[-1], "content": SENTINEL}
        before, found, after = self.render([*messages[:-1], last]).partition(SENTINEL)
        if not found or not (text.startswith(before) and text.endswith(after)):
            return text
        return text[len(before) : len(text) - len(after)]

    def tokens(self, messages: Sequence[dict]) -> np.ndarray:
        """int32[L] token ids of a conversation, cut at the front if too long."""
        ids = self.tokenizer(self.render(messages), add_special_tokens=False)
        ids = np.asarray(ids["input_ids"], np.int32)
        if not len(ids):
            raise ValueError(f"a text has no tokens: {messages!r}")
        if len(ids) <= (limit := self.config.max_length):
            return ids
        begins = int(ids[0] == self.tokenizer.bos_token_id)
        return np.concatenate([ids[:begins], ids[len(ids) - limit + begins :]])

    def inputs(self, batch: Sequence[np.ndarray]) -> dict:
        """Padded model inputs on the model's device."""
        import torch

        length = max(map(len, batch))
        ids = np.full((len(batch), length), self.pad, np.int64)
        mask = np.zeros((len(batch), length), np.int64)
        for row, tokens in enumerate(batch):
            start = length - len(tokens) if self.side == "left" else 0
            ids[row, start : start + len(tokens)] = tokens
            mask[row, start : start + len(tokens)] = 1
        arrays = {"input_ids": ids, "attention_mask": mask}
        if self.takes_positions:  # else left padding would shift absolute positions
            arrays["position_ids"] = np.maximum(mask.cumsum(1) - 1, 0)
        device = next(self.model.parameters()).device
        return {name: torch.from_numpy(a).to(device) for name, a in arrays.items()}

    def features(self, batch: Sequence[np.ndarray]) -> np.ndarray:
        """float32[B, D] hidden state of every text's last real token."""
        import torch

        inputs = self.inputs(batch)
        with torch.inference_mode():
            hidden = self.base(**inputs).last_hidden_state
            length = inputs["attention_mask"].shape[1]
            last = inputs["attention_mask"].flip(1).argmax(1)
            hidden = hidden[torch.arange(len(batch)), length - 1 - last]
        return hidden.float().cpu().numpy()

    def check_head(self, batch: Sequence[np.ndarray], features: np.ndarray) -> float:
        """Stop unless ``features @ head`` are the model's own logits.

        Returns:
            The relative RMS error.

        Raises:
            ValueError: with the first few values of both.
        """
        import torch

        with torch.inference_mode():
            logits = self.model(**self.inputs(batch)).logits[:, 0].float().cpu().numpy()
        ours = features.astype(np.float64) @ self.head + self.bias
        scale = max(np.sqrt(np.mean(logits.astype(np.float64) ** 2)), 1e-6)
        error = float(np.sqrt(np.mean((ours - logits) ** 2)) / scale)
        bound = 1e-3 if self.config.model_dtype == "float32" else 2e-2
        if not error <= bound:
            raise ValueError(
                f"features @ head differs from the model's own logits by {error:.2g} "
                f"of their size (allowed {bound:.2g}): {ours[:4]} against "
                f"{logits[:4]}. The head is not the one the model uses, or the model "
                "pools another token than the last real one"
            )
        return error

    def _padding_token(self) -> int:
        """A padding token that the model's own pooling cannot take for text."""
        tokenizer, config = self.tokenizer, self.model.config
        options = (config.pad_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
        known = [token for token in options if token is not None]
        clear = [token for token in known if token != tokenizer.eos_token_id]
        pad = (clear or known or [tokenizer.eos_token_id])[0]
        if pad is None:
            raise ValueError("the tokenizer has no token to pad with")
        config.pad_token_id = pad
        return int(pad)


@contextlib.contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Raises `ValueError` in a body that takes longer; in the main thread of POSIX."""
    main = threading.current_thread() is threading.main_thread()
    if not (main and hasattr(signal, "setitimer")):
        yield
        return

    def late(*_):
        raise ValueError(f"{what} takes more than {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


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
    folder.mkdir(parents=True, exist_ok=True)
    marker = start_marker(reward, texts)
    ids = [reward.tokens(m) for m in tqdm(texts.messages, "tokens", disable=None)]
    _refuse_equal(ids)
    lengths = np.array([len(i) for i in ids])
    marker["at_max_length"] = int((lengths == config.max_length).sum())
    order = np.lexsort((np.arange(len(ids)), -lengths))
    shape = (len(texts), len(reward.head))
    bits = np.uint16 if config.table_dtype == "bfloat16" else np.float32
    done, rows_digest = _resume(folder, marker, order, bits)
    path = folder / "features.npy"
    if done:
        stored = np.lib.format.open_memmap(path, "r+")
    else:  # The marker goes first: it would call rows of the new table finished.
        (folder / "features.json").unlink(missing_ok=True)
        stored = np.lib.format.open_memmap(path, "w+", dtype=bits, shape=shape)
    table = view_table(stored, config.table_dtype)
    write_array(folder / "head.npy", reward.head)
    saved, first = time.monotonic(), True
    with tqdm(total=len(ids), initial=done, desc="embed", disable=None) as progress:
        while done < len(ids):
            size = max(1, config.batch_tokens // lengths[order[done]])
            rows = order[done : done + min(size, config.batch_size)]
            values = reward.features(batch := [ids[row] for row in rows])
            if first:
                marker["head_error"] = reward.check_head(batch, values)
                center = _center(folder, config, values, fresh=done == 0)
                first = False
            table[rows] = values - center
            rows_digest.update(stored[rows].tobytes())
            done += len(rows)
            progress.update(len(rows))
            if done == len(ids) or time.monotonic() - saved >= config.save_seconds:
                stored.flush()  # the rows first, then the claim that they are there
                found = {"done": done, "rows_digest": rows_digest.hexdigest()}
                write_json(folder / "features.json", {**marker, **found})
                saved = time.monotonic()
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
    """What identifies a table: the model, its template, the texts, the shape."""
    return {
        **reward.config.identity(),
        "commit": getattr(reward.model.config, "_commit_hash", None),
        "template": digest(str(reward.tokenizer.chat_template))[:16],
        "texts": texts.fingerprint(),
        "dtype": reward.config.table_dtype,
        "rows": len(texts),
        "features": len(reward.head),
    }


def _resume(folder: Path, marker: dict, order: np.ndarray, bits):
    """(rows that an earlier run of the very same table has done, their digest).

    The digest is of the rows' bytes in the order in which they were finished, so that
    a marker beside another table, or a table that was begun again, is noticed.
    """
    path, total = folder / "features.json", hashlib.blake2b(digest_size=16)
    if not path.exists() or not (folder / "features.npy").exists():
        return 0, total
    found = read_json(path)
    keys = set(marker) - {"at_max_length"}
    if changed := sorted(k for k in keys if found.get(k) != marker[k]):
        raise ValueError(
            f"{folder} holds a feature table of something else: "
            + ", ".join(f"{k} {found.get(k)!r} → {marker[k]!r}" for k in changed)
            + "; use another folder, or delete this one's features.json"
        )
    done, stored = found.get("done"), load_array(folder / "features.npy", mmap_mode="r")
    shape = (marker["rows"], marker["features"])
    good = type(done) is int and 0 <= done <= shape[0] and stored.dtype == bits
    if good and stored.shape == shape:
        for start in range(0, done, BLOCK):
            total.update(stored[order[start : min(start + BLOCK, done)]].tobytes())
    if total.hexdigest() != found.get("rows_digest") or stored.shape != shape:
        raise ValueError(
            f"{folder}: features.npy is not the table whose {done} rows features.json "
            "calls done; delete features.json to begin again"
        )
    return done, total


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
