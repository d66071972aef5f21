"""A transformers model that turns texts into features, and its tokenizer.

Nothing that is loaded can run code: weights come from safetensors, no code of a
repository is executed, and the chat template is bounded in size, time and output.
"""

import contextlib
import inspect
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from lore_jax.hf.texts import Messages

Kind = Literal["reward", "language"]
SAFE = {"trust_remote_code": False}  # No code of a repository runs,
SAFE_MODEL = {**SAFE, "use_safetensors": True}  # and no pickle is opened.
TEMPLATE_DATE = "26 Jul 2024"  # some templates print today's date unless given one
TEMPLATE_SIZE, TEMPLATE_ADDS, TEMPLATE_SECONDS = 100_000, 20_000, 10.0
DTYPES = ("auto", "bfloat16", "float16", "float32")


class TextModel:
    """Model and tokenizer: texts → tokens → features.

    The feature of a text is the input of the model's last linear layer ("reward"), or
    the hidden state of the text's last token ("language").

    Attributes:
      model: in evaluation mode.
      tokenizer: its tokenizer.
      kind: "reward" or "language".
      max_length: tokens of the longest text; longer ones lose their beginning.
      side: where padding goes, "left" or "right".
      pad: id of the token that pads.
      weight: float32[D, J] of the linear head with J outputs; None of "language".
      bias: float32[J] of the head.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        kind: Kind | None = None,
        *,
        max_length: int = 4096,
        padding_side: str | None = None,
    ):
        """Wraps a loaded model.

        Raises:
          ValueError: "reward" is asked for and the model has no linear head, no token
            can pad, or the chat template has more than `TEMPLATE_SIZE` characters.
        """
        if padding_side not in (None, "left", "right"):
            raise ValueError(
                f"padding_side must be 'left', 'right' or None, got {padding_side!r}"
            )
        layer = head_of(model)
        self.kind: Kind = kind or ("language" if layer is None else "reward")
        if self.kind == "reward" and layer is None:
            raise ValueError(
                f"{type(model).__name__} has no linear head: load a reward model "
                "through AutoModelForSequenceClassification, or say kind='language'"
            )
        check_template(tokenizer)
        self.model, self.tokenizer = model.eval(), tokenizer
        self.base = model.base_model
        self.side = padding_side or tokenizer.padding_side
        self.pad = padding_token(model, tokenizer)
        self.max_length = _longest(model, tokenizer, max_length)
        self._layer = layer if self.kind == "reward" else None
        self.weight, self.bias = None, np.zeros(0, np.float32)
        if self._layer is not None:
            self.weight = _array(self._layer.weight).T
            self.bias = np.zeros(self.weight.shape[1], np.float32)
            if self._layer.bias is not None:
                self.bias = _array(self._layer.bias)
        forward = inspect.signature(self.base.forward).parameters
        self._takes_positions = "position_ids" in forward
        if self._layer is not None:  # The model's own pooling looks for this token.
            text_config(model).pad_token_id = self.pad

    @property
    def num_features(self) -> int:
        """D."""
        if self.weight is not None:
            return self.weight.shape[0]
        return int(text_config(self.model).hidden_size)

    @property
    def dtype(self) -> str:
        """What the model computes in."""
        return str(self.model.dtype).removeprefix("torch.")

    def tokens(self, text: str | Messages) -> np.ndarray:
        """int32[L] ids; a text that is too long loses its beginning.

        The chat template alone adds special tokens to messages; the tokenizer adds
        its own to a string.

        Raises:
          ValueError: the text has no tokens, or messages meet a tokenizer without a
            chat template.
        """
        plain = isinstance(text, str)
        rendered = text if plain else self.render(text)
        found = self.tokenizer(rendered, add_special_tokens=plain, truncation=False)
        ids = np.asarray(found["input_ids"], np.int32)
        if not len(ids):
            raise ValueError(f"a text has no tokens: {text!r}")
        if len(ids) <= self.max_length:
            return ids
        # What begins every text stays.
        first = self.tokenizer.bos_token_id, self.tokenizer.cls_token_id
        begins = int(ids[0] in first)
        return np.concatenate(
            [ids[:begins], ids[len(ids) - self.max_length + begins :]]
        )

    def render(self, messages: Sequence[dict]) -> str:
        """The text that the model reads: the chat template, applied once.

        Raises:
          ValueError: there is no template, it takes too long, or it adds too much.
        """
        return render(self.tokenizer, messages)

    def inputs(self, batch: Sequence[np.ndarray]) -> dict[str, Any]:
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
        if self._takes_positions and self.side == "left":
            # Without them, left padding would shift absolute positions.
            arrays["position_ids"] = np.maximum(mask.cumsum(1) - 1, 0)
        device = next(self.model.parameters()).device
        return {name: torch.from_numpy(a).to(device) for name, a in arrays.items()}

    def features(self, batch: Sequence[np.ndarray]) -> np.ndarray:
        """float32[B, D] features of texts, given as tokens."""
        import torch

        inputs = self.inputs(batch)
        with torch.inference_mode():
            if self._layer is None:
                hidden = self.base(**inputs).last_hidden_state
            else:
                hidden = self._before_head(inputs)
            if hidden.ndim == 3:  # One state per token, not yet pooled.
                length = inputs["attention_mask"].shape[1]
                last = length - 1 - inputs["attention_mask"].flip(1).argmax(1)
                hidden = hidden[torch.arange(len(batch)), last]
        return hidden.float().cpu().numpy()

    def _before_head(self, inputs: dict[str, Any]) -> Any:
        found = []
        layer: Any = self._layer
        hook = layer.register_forward_pre_hook(lambda _, args: found.append(args[0]))
        try:
            self.model(**inputs)
        finally:
            hook.remove()
        return found[-1]

    def check_head(self, batch: Sequence[np.ndarray], features: np.ndarray) -> float:
        """Raises unless features · head + bias are the model's own logits.

        Returns:
          The relative root mean square error.

        Raises:
          ValueError: they differ by more than rounding; the message has a few of both.
        """
        if self.weight is None:
            raise ValueError("a language model has no head to check")
        return check_logits(self, batch, features, self.weight, self.bias)


def check_logits(
    reader: Any, batch: Sequence[np.ndarray], features: np.ndarray, weight, bias
) -> float:
    """Raises unless features · weight + bias are the logits of `reader.model`.

    Args:
      reader: has `model`, `inputs` and `dtype` as `TextModel` does.
      batch: texts as tokens.
      features: float[B, D] of the same texts.
      weight: float[D, J].
      bias: float[J].

    Returns:
      The relative root mean square error.
    """
    import torch

    with torch.inference_mode():
        logits = reader.model(**reader.inputs(batch)).logits.float().cpu().numpy()
    ours = features.astype(np.float64) @ weight + bias
    scale = max(float(np.sqrt(np.mean(logits.astype(np.float64) ** 2))), 1e-6)
    error = float(np.sqrt(np.mean((ours - logits) ** 2))) / scale
    bound = 1e-3 if reader.dtype == "float32" else 2e-2
    if not error <= bound:
        raise ValueError(
            f"features @ head differs from the model's own logits by {error:.2g} of "
            f"their size (allowed {bound:.2g}): {ours[:4].tolist()} against "
            f"{logits[:4].tolist()}. The head is not the one the model uses, or the "
            "model pools another token than the last real one"
        )
    return error


def _array(tensor: Any) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()


def load_parts(
    model: Any,
    tokenizer: Any = None,
    kind: Kind | None = None,
    *,
    dtype: str | None = None,
    device: str | None = None,
    revision: str | None = None,
) -> tuple[Any, Any]:
    """(model, tokenizer) from names, folders or what was loaded before.

    Args:
      model: name on the hub, folder, or a model of transformers.
      tokenizer: likewise; None is the model's own.
      kind: "reward", "language", or None: "reward" for what has a sequence
        classification head.
      dtype: one of `DTYPES`; "auto" is the checkpoint's, None is bfloat16 on an
        accelerator and float32 on a CPU.
      device: where it computes; None takes an accelerator if there is one.
      revision: branch, tag or commit on the hub. All three are for a name or folder.

    Raises:
      ValueError: the checkpoint of a reward model lacks its head.
      OSError: there is no such model, or no safetensors of it.
    """
    import torch
    import transformers

    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype must be one of {DTYPES} or None, got {dtype!r}")
    if hasattr(model, "config"):
        name = model.config.name_or_path
        loaded = {"dtype": dtype, "device": device, "revision": revision}
        if given := [key for key, value in loaded.items() if value is not None]:
            raise ValueError(
                f"{given[0]} is for a model that is loaded by its name; this one is "
                "loaded already"
            )
    else:
        name = str(model)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
        if kind is None:
            found = transformers.AutoConfig.from_pretrained(
                name, revision=revision, **SAFE
            )
            heads = [is_classifier(x) for x in found.architectures or ()]
            kind = "reward" if any(heads) else "language"
        auto = (
            transformers.AutoModelForSequenceClassification
            if kind == "reward"
            else transformers.AutoModel
        )
        model, info = auto.from_pretrained(
            name,
            revision=revision,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            output_loading_info=True,
            **SAFE_MODEL,
        )
        check_loaded(name, info, kind)
        model = model.to(device)
    if tokenizer is None and not name:
        raise ValueError("tokenizer must be given: the model does not say its name")
    if tokenizer is None or isinstance(tokenizer, str):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            tokenizer or name, revision=revision, **SAFE
        )
    return model, tokenizer


def is_classifier(name: str) -> bool:
    """Whether a class of this name has a sequence classification head."""
    return name.endswith("ForSequenceClassification")


def check_loaded(name: str, info: Any, kind: Kind) -> None:
    """Raises `ValueError` where a checkpoint lacks weights that the features need."""
    missing = sorted(info["missing_keys"])
    if kind == "language":  # Poolers are often missing and not used.
        missing = [key for key in missing if "pooler" not in key]
    if missing:
        what = "a trained reward model" if kind == "reward" else "complete"
        raise ValueError(f"{name} is not {what}: its checkpoint lacks {missing[:4]}")


def text_config(model: Any) -> Any:
    """The part of a model's configuration that is about text."""
    return model.config.get_text_config()


def head_of(model: Any) -> Any:
    """The last linear layer of a sequence classification model, or None."""
    if not is_classifier(type(model).__name__):
        return None
    name = head_name(model)
    return None if name is None else model.get_submodule(name)


def head_name(model: Any) -> str | None:
    """Name of the linear layer outside the base that gives the logits, or None."""
    import torch

    inside = {id(module) for module in model.base_model.modules()}
    found = None
    for name, module in model.named_modules():
        linear = isinstance(module, torch.nn.Linear) and id(module) not in inside
        if linear and module.out_features == model.config.num_labels:
            found = name
    return found


def padding_token(model: Any, tokenizer: Any) -> int:
    """A token that a model's own pooling cannot take for text.

    Raises:
      ValueError: the tokenizer has none.
    """
    options = (
        text_config(model).pad_token_id,
        tokenizer.pad_token_id,
        tokenizer.unk_token_id,
    )
    known = [token for token in options if token is not None]
    clear = [token for token in known if token != tokenizer.eos_token_id]
    pad = (clear or known or [tokenizer.eos_token_id])[0]
    if pad is None:
        raise ValueError("the tokenizer has no token to pad with")
    return int(pad)


def _longest(model: Any, tokenizer: Any, max_length: int) -> int:
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1, got {max_length}")
    known = getattr(text_config(model), "max_position_embeddings", None)
    limits = [max_length, int(tokenizer.model_max_length)]
    return min([*limits, known] if isinstance(known, int) else limits)


def check_template(tokenizer: Any) -> None:
    """Raises `ValueError` where the chat template has too many characters."""
    if (size := len(str(tokenizer.chat_template or ""))) > TEMPLATE_SIZE:
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path} has {size} characters, "
            f"expected at most {TEMPLATE_SIZE}"
        )


def render(
    tokenizer: Any, messages: Sequence[dict], seconds: float = TEMPLATE_SECONDS
) -> str:
    """`TextModel.render` within so many seconds."""
    if not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template: pass "
            "strings instead of messages"
        )
    with time_limit(seconds, "the chat template"):
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, date_string=TEMPLATE_DATE
        )
    said = sum(len(message["content"]) for message in messages)
    if len(text) > 2 * said + TEMPLATE_ADDS + TEMPLATE_ADDS // 20 * len(messages):
        raise ValueError(
            f"the chat template makes {len(text)} characters of {said} in "
            f"{len(messages)} messages"
        )
    return text


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
