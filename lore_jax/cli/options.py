"""Options that several commands share, and what follows from them."""

import dataclasses
import enum
import pathlib
from typing import Annotated, Any

import numpy as np
import typer

from lore_jax.cli.inputs import Source
from lore_jax.cli.output import on_terminal
from lore_jax.cli.users import UserWeights, read_users
from lore_jax.results import Fitted


class RecipeName(enum.StrEnum):
    """How to train."""

    default = "default"
    joint = "joint"
    alternating = "alternating"


class Holdout(enum.StrEnum):
    """What the default recipe holds out to choose its settings."""

    both = "both"
    judgements = "judgements"
    items = "items"


class MethodName(enum.StrEnum):
    """How to adapt."""

    posterior = "posterior"
    likelihood = "likelihood"
    published = "published"


class Kind(enum.StrEnum):
    """What an embedding model is."""

    reward = "reward"
    language = "language"
    sentence = "sentence"


SEEDS: dict[str, Any] = {"min": -(1 << 63), "max": (1 << 63) - 1}  # what a key takes


def option(*flags: str, help: str, panel: str | None = None, **more: Any) -> Any:
    """An option of a command, in a panel of its help."""
    return typer.Option(*flags, help=help, rich_help_panel=panel, **more)


def _column(name: str, what: str) -> Any:
    """What a table calls one of its columns."""
    flag = f"--{name}-column"
    return option(flag, help=f"{what}.", metavar="NAME", panel="Names of columns")


Path = pathlib.Path
Model = Annotated[
    Path,
    typer.Argument(metavar="MODEL", help="What lore fit wrote.", show_default=False),
]
Pairs = Annotated[
    Path,
    typer.Argument(
        metavar="PAIRS",
        help="Table of pairs: Parquet, CSV, TSV, JSONL or JSON, also .gz, with the "
        "columns user, chosen, rejected, and optionally prompt, group, label, weight.",
        show_default=False,
    ),
]
Features = Annotated[
    Path | None,
    option(
        "--features",
        help="Embeddings, a row per response: .npy or .safetensors.",
        panel="Features",
    ),
]
Tensor = Annotated[
    str | None,
    option("--tensor", help="Which tensor of a .safetensors file.", panel="Features"),
]
Items = Annotated[
    Path | None,
    option(
        "--items",
        help="Names of the rows of --features: a text file with a name a line, or a "
        "table with --item-column. Without it, responses are row numbers from 0.",
        panel="Features",
    ),
]
ItemColumn = Annotated[str, _column("item", "Names, in a table of --items")]
Embedder = Annotated[
    str | None,
    option(
        "--model",
        help="Responses are texts: embed them with this model of transformers, a name "
        "on the hub or a folder. Needs the extra hf.",
        metavar="NAME",
        panel="Features",
    ),
]
KindOption = Annotated[
    Kind | None,
    option("--kind", help="Of --model; default by its head.", panel="Features"),
]
Chat = Annotated[
    bool,
    option(
        "--chat", help="Apply the chat template of --model to texts.", panel="Features"
    ),
]
Folder = Annotated[
    Path | None,
    option(
        "--folder",
        help="Keep the embeddings of --model here, and continue them.",
        panel="Features",
    ),
]
UserColumn = Annotated[str | None, _column("user", "Users")]
ChosenColumn = Annotated[str | None, _column("chosen", "Preferred responses")]
RejectedColumn = Annotated[str | None, _column("rejected", "Other responses")]
PromptColumn = Annotated[str | None, _column("prompt", "Prompts")]
GroupColumn = Annotated[
    str | None, _column("group", "What validation does not split, such as dialogues")
]
LabelColumn = Annotated[
    str | None, _column("label", "P(chosen is preferred), from 0 to 1")
]
WeightColumn = Annotated[str | None, _column("weight", "How much a pair counts")]
ResponseColumn = Annotated[str | None, _column("response", "Responses to score")]
Encoding = Annotated[str, option("--encoding", help="Of text files.")]
UsersFile = Annotated[
    Path | None,
    option("--users", help="What lore adapt wrote; default the users of the fit."),
]
Json = Annotated[bool, option("--json", help="One JSON object on stdout.")]
Progress = Annotated[
    bool | None,
    option(
        "--progress/--no-progress",
        help="A bar instead of log lines; default on a terminal.",
    ),
]


def source_of(options: dict[str, Any]) -> Source:
    """The `Source` that a command's options describe."""
    fields = {field.name for field in dataclasses.fields(Source)}
    kept = {name: x for name, x in options.items() if name in fields and x is not None}
    columns = {
        name.removesuffix("_column"): x
        for name, x in options.items()
        if name.endswith("_column") and name != "item_column" and x is not None
    }
    if kept.get("progress") is None:
        kept["progress"] = on_terminal()
    return Source(**kept, columns=columns)


def weights_of(fitted: Fitted, users: Path | None) -> UserWeights:
    """Weights by name: of a file, or of the fit."""
    if users is not None:
        return read_users(users, fitted.model)
    weights = np.asarray(fitted.weights)
    names: Any = fitted.user_ids
    return UserWeights(weights, np.arange(len(weights)) if names is None else names)
