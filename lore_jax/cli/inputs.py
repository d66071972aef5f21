"""What the commands read: pairs and responses over features of embeddings or texts."""

import dataclasses
import logging
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lore_jax import hf
from lore_jax.cli.table_files import as_list
from lore_jax.cli.tables import (
    check_columns,
    is_table,
    names,
    read_columns,
    read_embeddings,
    read_table,
    row_number,
)
from lore_jax.hf.datasets import PreferenceTexts, join_text
from lore_jax.preferences import Preferences

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Where features come from, and how tables are read.

    Attributes:
      features: `.npy` or safetensors, float[M, D]; None where texts are embedded.
      tensor: which tensor of a safetensors file.
      items: names of the rows of `features`: a text file with a name a line, or a
        table; None where rows are given by number.
      item_column: which column of that table.
      model: embedding model of texts.
      kind: see `hf.embed`.
      chat: see `hf.from_dataset`.
      folder: keeps the embeddings, see `hf.embed`.
      encoding: of text files.
      columns: {column: what the tables call it} of those with another name.
      progress: whether to show a bar while embedding.
    """

    features: pathlib.Path | None = None
    tensor: str | None = None
    items: pathlib.Path | None = None
    item_column: str = "item"
    model: str | None = None
    kind: Any = None
    chat: bool = False
    folder: pathlib.Path | None = None
    encoding: str = "utf-8"
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    progress: bool = False

    def __post_init__(self):
        """Refuses a source of no features, or of two.

        Raises:
          ValueError: naming the options.
        """
        if (self.features is None) == (self.model is None):
            raise ValueError(
                "give --features, a table of embeddings, or --model, which embeds texts"
            )
        if self.features is None and (self.items is not None or self.tensor):
            raise ValueError("--items and --tensor belong to --features")


class Responses(NamedTuple):
    """Responses to be scored.

    Attributes:
      features: float[M, D].
      rows: int[Q], row of each response.
      given: what the file says: row numbers, names or texts.
      user: Q names, or None.
    """

    features: np.ndarray
    rows: np.ndarray
    given: list
    user: list | None


def read_pairs(path: pathlib.Path, source: Source) -> Preferences:
    """The pairs of a table, users by name.

    Raises:
      ValueError: naming file, row and column of what is wrong.
    """
    columns = read_columns(path, _called(source, ("response",)), source.encoding)
    if source.features is None:
        texts = read_texts(path, columns, source.chat)
        features = embed(texts.texts, source)
        return texts.preferences(features, user_ids=names(columns["user"])[1])
    features, items = _read_features(source)
    columns = check_columns(columns, path, len(features) if items is None else None)
    chosen, rejected = (
        columns[side] if items is None else _places(columns[side], items, path, side)
        for side in ("chosen", "rejected")
    )
    user, user_ids = names(columns["user"])
    group = columns.get("group")
    try:
        return Preferences.from_pairs(
            features,
            chosen,
            rejected,
            user,
            label=columns.get("label"),
            sample_weight=columns.get("weight"),
            group=None if group is None else names(group)[0],
            user_ids=user_ids,
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_texts(
    path: pathlib.Path, columns: dict[str, Any], chat: bool
) -> PreferenceTexts:
    """Pairs over distinct texts, from the columns of a table.

    Raises:
      ValueError: naming the file and the row.
    """
    checked = check_columns(columns, path, None)
    columns = {name: as_list(column) for name, column in checked.items()}

    def there(column: str) -> str | None:
        return column if column in columns else None

    try:
        return hf.from_dataset(
            columns,
            user="user",
            prompt=there("prompt"),
            label=there("label"),
            sample_weight=there("weight"),
            group=there("group"),
            chat=chat,
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}, {error}") from error


def embed(texts: Sequence[Any], source: Source) -> np.ndarray:
    """Features of texts by `source.model`."""
    from tqdm import tqdm

    _log.info("embedding %d texts with %s", len(texts), source.model)
    return hf.embed(
        texts,
        source.model,
        kind=source.kind,
        folder=source.folder,
        progress=tqdm if source.progress else None,
    )


def read_responses(path: pathlib.Path, source: Source) -> Responses:
    """The responses of a table.

    Raises:
      ValueError: naming file, row and column of what is wrong.
    """
    columns = read_table(
        path,
        _called(source, ("chosen", "rejected", "label", "weight", "group")),
        source.encoding,
        needed=("response",),
        optional=("user", "prompt"),
    )
    given, user = columns["response"], columns.get("user")
    if source.features is None:
        texts = response_texts(path, columns, source.chat)
        features = embed(texts, source)
        return Responses(features, np.arange(len(texts)), given, user)
    features, items = _read_features(source)
    if items is None:
        rows = [
            row_number(value, len(features), f"{path}, row {number}: response")
            for number, value in enumerate(given)
        ]
        given = rows
    else:
        rows = _places(given, items, path, "response")
    return Responses(features, np.array(rows), given, user)


def response_texts(
    path: pathlib.Path, columns: dict[str, list], chat: bool
) -> list[Any]:
    """Texts or messages of a table's responses, with their prompts.

    Raises:
      ValueError: naming the file and the row.
    """
    prompts = columns.get("prompt", [None] * len(columns["response"]))
    try:
        return [
            join_text(prompt, response, chat, f"row {number}, response")
            for number, (prompt, response) in enumerate(
                zip(prompts, columns["response"])
            )
        ]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}, {error}") from error


def like(names: Sequence[Any], known: np.ndarray) -> np.ndarray:
    """Names as the kind that `known` is: a CSV file and a command line have only text.

    Raises:
      ValueError: a text is no integer of the same digits, where the known names are
        integers.
    """
    texts = [str(name) for name in names]
    if known.dtype.kind == "U":
        return np.array(texts, np.str_)
    wrong = [x for x in texts if not re.fullmatch(r"0|-?[1-9][0-9]*", x)]
    if wrong:
        raise ValueError(
            f"user {wrong[0]!r} is not known: the known names are integers"
        )
    values, limits = [int(x) for x in texts], np.iinfo(known.dtype)
    for value in values:
        if not limits.min <= value <= limits.max:
            raise ValueError(f"user {value} is not known")
    return np.array(values, known.dtype)


def _called(source: Source, others: Sequence[str]) -> dict[str, str]:
    """Names of columns, without those of another kind of table."""
    return {name: x for name, x in source.columns.items() if name not in others}


def _read_features(source: Source) -> tuple[np.ndarray, list | None]:
    """(features, names of the rows or None)."""
    path: Any = source.features
    features = read_embeddings(path, source.tensor)
    if source.items is None:
        return features, None
    items = _read_items(source.items, source.item_column, source.encoding)
    if len(items) != len(features):
        raise ValueError(
            f"{source.items} names {len(items)} rows, but {source.features} has "
            f"{len(features)}"
        )
    return features, items


def _read_items(path: pathlib.Path, column: str, encoding: str) -> list:
    if is_table(path):
        names = {"item": column}
        found = read_table(path, names, encoding, needed=("item",), optional=())["item"]
    else:
        try:
            found = path.read_text(encoding=encoding).splitlines()
        except (UnicodeDecodeError, LookupError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
    seen: dict[Any, int] = {}
    for number, name in enumerate(found):
        if name == "":
            raise ValueError(f"{path}, row {number}: no name")
        if (first := seen.setdefault(name, number)) != number:
            raise ValueError(f"{path}: {name!r} stands in rows {first} and {number}")
    return found


def _places(column: Any, items: list, path: pathlib.Path, name: str) -> np.ndarray:
    """Rows of names; numbers and texts are compared as text."""
    place = {str(item): row for row, item in enumerate(items)}
    found = np.array([place.get(str(value), -1) for value in as_list(column)])
    if (wrong := np.flatnonzero(found < 0)).size:
        raise ValueError(
            f"{path}, row {wrong[0]}: {name} is {as_list(column)[wrong[0]]!r}, which "
            "is not in --items"
        )
    return found
