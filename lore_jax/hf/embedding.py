"""Texts → a feature table, by a model of transformers or sentence-transformers."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from lore_jax import _checks
from lore_jax.hf.table import ResumableTable, batches, longest_first, write_array
from lore_jax.hf.text_model import TextModel, load_parts
from lore_jax.hf.texts import check_text, text_key


def embed(
    texts: Sequence[Any],
    model: Any,
    tokenizer: Any = None,
    *,
    kind: Literal["reward", "language", "sentence"] | None = None,
    folder: Any = None,
    dtype: Literal["auto", "bfloat16", "float16", "float32"] | None = None,
    device: str | None = None,
    revision: str | None = None,
    max_length: int = 4096,
    padding_side: Literal["left", "right"] | None = None,
    batch_tokens: int = 16384,
    batch_size: int = 64,
    progress: Callable[..., Any] | None = None,
) -> np.ndarray:
    """Features of texts: hidden states of a model that reads them.

    | `kind` | features |
    |---|---|
    | "reward" | input of the linear head of a sequence classification model |
    | "language" | last hidden state of the text's last token |
    | "sentence" | what `SentenceTransformer.encode` returns |

    The head of a reward model is checked on the first batch: features · head + bias are
    the model's own logits. Models are loaded from safetensors, without code of theirs.

    A list of messages is rendered by the chat template of the tokenizer, once. A string
    is read as it is. A text of more than `max_length` tokens loses its beginning, so
    that the response stays. Batches hold texts of similar length, longest first.

    Args:
      texts: M strings or lists of chat messages that end with the response.
      model: a name on the hub, a folder, a model of transformers, or a
        `SentenceTransformer`.
      tokenizer: likewise; None is the model's own.
      kind: None is "sentence" for a `SentenceTransformer`, "reward" for a model with a
        sequence classification head, and "language" for every other one.
      folder: keeps the table, `features.npy`, with what it is of, and continues it
        where an earlier call was stopped; also the reward head as `head.npy`
        float32[D, J]. Not with "sentence".
      dtype: what the model computes in; "auto" is the checkpoint's, None is bfloat16 on
        an accelerator and float32 on a CPU.
      device: "cuda", "cpu", …; None takes an accelerator if there is one.
      revision: branch, tag or commit on the hub. These three are for a name or folder;
        a model that was loaded stays as it is, in evaluation mode.
      max_length: tokens of the longest text; the model's own limit where that is less.
      padding_side: None is the tokenizer's own.
      batch_tokens: most tokens of a batch, padding included.
      batch_size: most texts of a batch.
      progress: `tqdm.tqdm`, or what takes `total`, `initial` and `desc` like it.

    Returns:
      float[M, D], bfloat16 from a bfloat16 model, which is exact, and float32
      otherwise; memory-mapped with `folder`.

    Raises:
      ValueError: the checkpoint lacks its head, the head's check fails, a text is empty
        or messages meet a tokenizer without chat template, or `folder` holds a table of
        something else.
      TypeError: a text is neither a string nor a list of messages.
      ImportError: a package that is needed is not installed.
      OSError: there is no such model, or no safetensors of it.

    Example:
      >>> from lore_jax import hf
      >>> texts = ["The sky is blue.", "The sky is green."]
      >>> features = hf.embed(texts, "my-reward-model")  # doctest: +SKIP
    """
    if isinstance(texts, str):
        raise TypeError("texts must be a sequence of texts, got one string")
    texts = [check_text(text, f"texts[{i}]") for i, text in enumerate(texts)]
    if not texts:
        raise ValueError("texts must hold at least one text, got none")
    for name, value in (("batch_tokens", batch_tokens), ("batch_size", batch_size)):
        _checks.check_count(value, name)
    if kind not in (None, "reward", "language", "sentence"):
        raise ValueError(
            f"kind must be 'reward', 'language', 'sentence' or None, got {kind!r}"
        )
    if kind == "sentence" or _is_sentence_model(model):
        if folder is not None:
            raise ValueError("folder is not supported for a SentenceTransformer")
        return _encode(texts, model, device, revision, batch_size, progress)
    model, tokenizer = load_parts(
        model, tokenizer, kind, dtype=dtype, device=device, revision=revision
    )
    reader = TextModel(
        model, tokenizer, kind, max_length=max_length, padding_side=padding_side
    )
    ids = [reader.tokens(text) for text in texts]
    lengths = np.array([len(tokens) for tokens in ids])
    order = longest_first(lengths)
    table = None
    if folder is not None:
        table = ResumableTable(
            folder,
            _identity(reader, texts),
            order,
            reader.num_features,
            "bfloat16" if reader.dtype == "bfloat16" else "float32",
        )
        if reader.weight is not None:
            write_array(table.folder / "head.npy", reader.weight)
    done = 0 if table is None else table.done
    found = np.empty(
        (len(ids) if table is None else 0, reader.num_features), np.float32
    )
    bar = progress and progress(total=len(ids), initial=done, desc="embed")
    for step, rows in enumerate(batches(lengths, done, batch_tokens, batch_size)):
        values = reader.features(batch := [ids[row] for row in rows])
        if step == 0 and reader.weight is not None:
            reader.check_head(batch, values)
        if table is None:
            found[rows] = values
        else:
            table.write(values)
        if bar:
            bar.update(len(rows))
    if bar:
        bar.close()
    if table is not None:
        return table.values
    return found.astype(jnp.bfloat16) if reader.dtype == "bfloat16" else found


def _identity(reader: TextModel, texts: Sequence[Any]) -> dict[str, Any]:
    """What decides the numbers of a table."""
    config, template = reader.model.config, str(reader.tokenizer.chat_template)
    few = [x.detach().flatten()[:8].float().cpu() for x in reader.model.parameters()]
    return {
        "model": config.name_or_path,
        "commit": getattr(config, "_commit_hash", None),
        "weights": _digest(x.numpy().tobytes() for x in few),
        "kind": reader.kind,
        "model_dtype": reader.dtype,
        "max_length": reader.max_length,
        "template": _digest([template.encode()]),
        "texts": _digest(text_key(text).encode() for text in texts),
    }


def _digest(parts: Iterable[bytes]) -> str:
    total = hashlib.blake2b(digest_size=16)
    for part in parts:
        total.update(b"%d:" % len(part) + part)
    return total.hexdigest()


def _is_sentence_model(model: Any) -> bool:
    return any(base.__name__ == "SentenceTransformer" for base in type(model).__mro__)


def _encode(texts, model, device, revision, batch_size, progress) -> np.ndarray:
    """float32[M, D] by sentence-transformers, which pads and batches by itself."""
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("texts must be strings for a SentenceTransformer")
    if not _is_sentence_model(model):
        try:
            from sentence_transformers import SentenceTransformer  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ImportError(
                "kind='sentence' needs the package sentence-transformers: "
                "pip install sentence-transformers"
            ) from error
        model = SentenceTransformer(
            str(model),
            device=device,
            revision=revision,
            trust_remote_code=False,
            model_kwargs={"use_safetensors": True},
        )
    return np.asarray(
        model.encode(
            list(texts),
            batch_size=batch_size,
            show_progress_bar=bool(progress),
            convert_to_numpy=True,
        ),
        np.float32,
    )
