"""A reward model as a sequence classification model of transformers, and back."""

import copy
import json
import pathlib
import re
from typing import Any, NamedTuple

import numpy as np

from lore_jax import __version__, _checks, _ids
from lore_jax._entry import public
from lore_jax.hf.text_model import (
    TextModel,
    check_logits,
    head_name,
    load_parts,
)
from lore_jax.io import files
from lore_jax.model import RewardModel, check_model, prior_of

_Z90 = 1.645  # half the width of a 90 % interval of a normal, in deviations
_PROBES = "A short text.", "A text that is a good deal longer than the other one is."


class _UserWeights(NamedTuple):
    """One user: weights float[K] on the simplex, deviations float[K] or None, name."""

    weights: np.ndarray
    std: np.ndarray | None
    name: str | None


@public("lore.score, which takes arrays")
def export_head(
    model: RewardModel,
    base: Any,
    *,
    path: Any,
    user: Any = None,
    users: Any = None,
    tokenizer: Any = None,
    base_name: str | None = None,
    licence: str | None = None,
    data: str | None = None,
) -> pathlib.Path:
    """Writes a sequence classification model whose logits are rewards.

    With features x of the base model the logits are

        x · V / T        K outputs, without `user`: s_k. A user's reward is Σ_k p_k s_k.
        x · V · p / T    one output, of one user with mixture weights p.

    `AutoModelForSequenceClassification.from_pretrained` reads the folder: model,
    configuration, tokenizer with its chat template, and a model card. Weights of the
    base keep their precision. The head is stored in float32; where transformers loads
    it in bfloat16, the logits are rounded, and `load_head` keeps them exact.

    The export is checked: on two texts of different length the logits must be the
    features that `embed` returns times the head.

    Args:
      model: V float[D, K], prior and T.
      base: the model that made the features, as in `embed`: a name, a folder, or a
        model of transformers, with or without a head. A head is replaced.
      path: a folder that does not exist or is empty.
      user: None for K outputs; a name or an index of `users`, or float[K] weights on
        the simplex, for one.
      users: what `adapt`, `posterior` or `fit` returned, or float[U, K]. With a
        standard deviation, the card has intervals of the user's weights.
      tokenizer: None is the base's own.
      base_name: what the card calls the base; default its name on the hub.
      licence: of the export, an identifier of the hub such as "apache-2.0".
      data: what the model was trained on, for the card.

    Returns:
      The folder.

    Raises:
      ValueError: the base has another number of features than D, pools in another way
        than `embed`, a user is not known, weights are not on the simplex, or the
        folder is not empty.
      TypeError: `model` is no `RewardModel`.
      OSError: there is no such base, or the folder cannot be written.

    Example:
      >>> from lore_jax import hf
      >>> hf.export_head(  # doctest: +SKIP
      ...     fitted.model, "my-reward-model", user="ann", users=fitted, path="ann"
      ... )
    """
    check_model(model)
    folder = pathlib.Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"path must be a new or an empty folder, {folder} is neither")
    head = np.asarray(model.basis, np.float64) / model.temperature
    labels = [f"direction_{k}" for k in range(model.rank)]
    mixture = None if user is None else _user_weights(user, users, model.rank)
    if mixture is not None:
        head, labels = head @ mixture.weights[:, None], ["reward"]
    base, tokenizer = load_parts(base, tokenizer, dtype=_precision(base))
    reader = TextModel(base, tokenizer)
    if reader.num_features != len(head):
        raise ValueError(
            f"base has {reader.num_features} features and model D={len(head)}"
        )
    shell = _with_head(reader, head.astype(np.float32), labels)
    shell.config.lore = {"rank": model.rank, "temperature": float(model.temperature)}
    if mixture is None:
        mean = np.asarray(prior_of(model).mean, np.float64)
        shell.config.lore["prior_mean"] = mean.round(6).tolist()
    tokenizer = copy.deepcopy(tokenizer)
    if (pad := tokenizer.convert_ids_to_tokens(reader.pad)) is not None:
        tokenizer.pad_token = pad
    card = _card(
        model,
        mixture,
        num_users=None if users is None else len(_ids.of_weights(users)[0]),
        base_name=base_name or _hub_name(base),
        licence=licence,
        data=data,
        chat=bool(tokenizer.chat_template),
    )
    folder.mkdir(parents=True, exist_ok=True)
    shell.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with files.replacing(folder / "README.md") as temporary:
        temporary.write_text(card, encoding="utf-8")
    return folder


def load_head(
    path: Any, *, dtype: str | None = None, device: str | None = None
) -> tuple[Any, Any]:
    """Loads what `export_head` wrote, with its head in float32.

    `AutoModelForSequenceClassification.from_pretrained` reads the folder, too. In
    bfloat16 it rounds the head and the logits, to three digits; here only the base is
    rounded.

    Args:
      path: the folder.
      dtype: of the base: "bfloat16", "float16" or "float32"; None as in `embed`.
      device: None takes an accelerator if there is one.

    Returns:
      (model, tokenizer) of transformers.

    Raises:
      OSError: there is no such folder.
      ValueError: it lacks its head.
    """
    import torch

    model, tokenizer = load_parts(str(path), kind="reward", dtype=dtype, device=device)
    name = head_name(model)
    layer: Any = model.get_submodule(name)
    weight = _stored_tensor(pathlib.Path(path), f"{name}.weight")
    layer.float().weight = torch.nn.Parameter(weight.to(layer.weight.device))
    layer.register_forward_pre_hook(_in_float32)
    return model.eval(), tokenizer


def _in_float32(_, args):
    return (args[0].float(), *args[1:])


def _stored_tensor(folder: pathlib.Path, name: str) -> Any:
    """A tensor of a checkpoint in one file or in several."""
    import safetensors

    file, index = "model.safetensors", folder / "model.safetensors.index.json"
    if index.exists():
        found = files.parse_json(index.read_text(encoding="utf-8"), str(index))
        file = found["weight_map"][name]
    with safetensors.safe_open(folder / file, "pt") as tensors:
        return tensors.get_tensor(name).float()


def _precision(base: Any) -> str | None:
    """A checkpoint is exported as it is stored."""
    return None if hasattr(base, "config") else "auto"


def _user_weights(user: Any, users: Any, rank: int) -> _UserWeights:
    """Weights of one user, and what else `users` says about them."""
    if not isinstance(user, str | int | np.integer):
        weights = np.asarray(user, np.float64)
        if weights.shape != (rank,):
            raise ValueError(
                f"user must be a name, an index or float[K] with K={rank}, got shape "
                f"{weights.shape}"
            )
        _checks.check_simplex(weights[None], "user")
        return _UserWeights(weights, None, None)
    if users is None:
        raise ValueError(
            f"users must be what adapt or fit returned, to look up user={user!r}"
        )
    table, names, _ = _ids.of_weights(users)
    _checks.check_weights(table, len(table), rank, "users")
    _checks.check_simplex(table, "users")
    place = int(_ids.queried([user], names, len(table))[0])
    std = getattr(users, "std", None)
    return _UserWeights(
        np.asarray(table, np.float64)[place],
        None if std is None else np.asarray(std, np.float64)[place],
        str(user),
    )


def _with_head(reader: TextModel, head: np.ndarray, labels: list[str]) -> Any:
    """A sequence classification model that shares the base's weights.

    Args:
      reader: the base and its tokenizer.
      head: float32[D, J], the new last layer.
      labels: J names of the outputs.

    Raises:
      ValueError: the architecture has no such model, it has other layers that the base
        lacks, or its logits are not features · head.
    """
    import torch
    import transformers

    base = reader.model
    config = copy.deepcopy(base.config)
    config.num_labels, config.problem_type = len(labels), "regression"
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: k for k, label in enumerate(labels)}
    with torch.device("meta"):  # Nothing is allocated.
        auto = transformers.AutoModelForSequenceClassification
        shell = auto.from_config(config, trust_remote_code=False)
    prefix = shell.base_model_prefix
    if type(getattr(shell, prefix)) is not type(base.base_model):
        raise ValueError(
            f"base has a {type(base.base_model).__name__}, but {type(shell).__name__} "
            f"reads with a {type(getattr(shell, prefix)).__name__}"
        )
    if reader.weight is not None:  # Layers between base and head, such as poolers.
        for name, child in base.named_children():
            setattr(shell, name, copy.deepcopy(child) if name != prefix else None)
    setattr(shell, prefix, base.base_model)
    name = head_name(shell) if reader.weight is None else head_name(base)
    if name is None:
        raise ValueError(f"{type(shell).__name__} has no linear head")
    bias = shell.get_submodule(name).bias is not None
    layer = torch.nn.Linear(*head.shape, bias=bias)
    layer.weight = torch.nn.Parameter(torch.from_numpy(head.T.copy()))
    if bias:
        torch.nn.init.zeros_(layer.bias)
    layer = layer.to(next(base.parameters()).device)
    shell.set_submodule(name, layer)
    if new := [n for n, x in shell.named_parameters() if x.is_meta]:
        raise ValueError(
            f"{type(shell).__name__} has layers that base lacks: {new[:4]}; pass a "
            "base with a sequence classification head"
        )
    batch = [reader.tokens(text) for text in _PROBES]
    # It also tells the model's pooling which token pads.
    new_reader = TextModel(shell, reader.tokenizer, padding_side=reader.side)
    hook = layer.register_forward_pre_hook(_in_float32)
    zeros = np.zeros(head.shape[1], np.float32)
    check_logits(new_reader, batch, reader.features(batch), head, zeros)
    hook.remove()
    return shell


def _hub_name(base: Any) -> str | None:
    """The base's name on the hub, if it looks like one; paths are not shown."""
    name = str(base.config.name_or_path or "")
    is_name = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not pathlib.Path(name).exists()
    return name if is_name else None


def _card(
    model: RewardModel,
    mixture: _UserWeights | None,
    *,
    num_users: int | None,
    base_name: str | None,
    licence: str | None,
    data: str | None,
    chat: bool,
) -> str:
    """The model card, in Markdown."""
    header = {
        "license": licence,
        "base_model": base_name,
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["reward-model", "lore", "personalization"],
    }
    lines = [f"{k}: {json.dumps(v)}" for k, v in header.items() if v is not None]
    facts = {
        "rank K": model.rank,
        "features D": model.num_features,
        "temperature T": f"{model.temperature:g}",
        "outputs": f"{model.rank}, one per direction" if mixture is None else "1",
        "users whose weights were estimated": num_users,
        "base model": base_name,
        "licence": licence,
        "data": data,
    }
    table = [
        f"| {name} | {_cell('not stated' if value is None else value)} |"
        for name, value in facts.items()
    ]
    parts = ["---", *lines, "---", "", "# Low-rank reward model", ""]
    parts += [_about(mixture), "", "| | |", "|---|---|", *table, ""]
    if mixture is None:
        mean = np.asarray(prior_of(model).mean)
        parts += ["Weights of a user of whom nothing is known, the mean of the prior:"]
        parts += ["", ", ".join(f"{p:.4f}" for p in mean), ""]
    else:
        parts += [*_weights_table(mixture), ""]
    parts += ["## Use", "", "```python", *_usage(mixture, chat), "```", ""]
    parts += [
        "With `dtype=torch.bfloat16` transformers rounds the head and the rewards to "
        "about three digits. `lore_jax.hf.load_head` keeps both in float32.",
        "",
        "Rewards of one user may be compared across responses to one prompt. Weights "
        "are personal data: they say what a person prefers.",
        "",
        f"Written by lore_jax {__version__}. Method: Bose et al., LoRe: Personalizing "
        "LLMs via Low-Rank Reward Modeling, 2025 (https://arxiv.org/abs/2504.14439).",
    ]
    return "\n".join(parts) + "\n"


def _about(mixture: _UserWeights | None) -> str:
    if mixture is None:
        return (
            "The logits are K scores, one per shared reward direction. The reward of a "
            "user with weights p on the simplex is the sum over k of p_k times score k."
        )
    whose = "" if mixture.name is None else f", `{mixture.name}`"
    return f"The logit is the reward of one user{whose}."


def _weights_table(mixture: _UserWeights) -> list[str]:
    if mixture.std is None:
        rows = [f"| {k} | {p:.4f} |" for k, p in enumerate(mixture.weights)]
        return ["| direction | weight |", "|---|---|", *rows]
    low, high = (
        np.clip(mixture.weights + sign * _Z90 * mixture.std, 0, 1) for sign in (-1, 1)
    )
    rows = [
        f"| {k} | {p:.4f} | {a:.4f} to {b:.4f} |"
        for k, (p, a, b) in enumerate(zip(mixture.weights, low, high))
    ]
    return ["| direction | weight | 90 % interval |", "|---|---|---|", *rows]


def _usage(mixture: _UserWeights | None, chat: bool) -> list[str]:
    read = [
        "inputs = tokenizer.apply_chat_template(",
        '    messages, return_dict=True, return_tensors="pt"',
        ")",
    ]
    rewards = "scores = model(**inputs).logits[0]  # [K]"
    mixed = [rewards, "reward = scores @ weights  # of a user with weights [K]"]
    return [
        "import torch",
        "from transformers import AutoModelForSequenceClassification, AutoTokenizer",
        "",
        "model = AutoModelForSequenceClassification.from_pretrained(",
        "    folder, dtype=torch.float32",
        ")",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        *(read if chat else ['inputs = tokenizer(text, return_tensors="pt")']),
        *(mixed if mixture is None else ["reward = model(**inputs).logits[0, 0]"]),
    ]


def _cell(value: Any) -> str:
    return re.sub(r"\s+", " ", str(value)).replace("|", "\\|")
