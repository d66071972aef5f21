"""Preference data sets of Hugging Face → pairs of rows over distinct texts."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lore_jax import _checks, _ids, _tables
from lore_jax._entry import public
from lore_jax.hf.texts import Messages, check_text, text_key
from lore_jax.preferences import Preferences


class PreferenceTexts(NamedTuple):
    """Pairs of many users over M distinct texts; `embed(found.texts, …)` comes next.

    Attributes:
      texts: M distinct responses with their prompts, in order of appearance: strings,
        or lists of chat messages that end with the response.
      chosen: int32[N], place of the preferred text in `texts`.
      rejected: int32[N], place of the other.
      user: str[N] or int[N], as the data set names them.
      label: float[N], P(chosen is preferred), or None for 1.
      sample_weight: float[N], or None for 1.
      group: str[N] or int[N], what must not be split between training and validation,
        or None for the default (user and text).
    """

    texts: list[str | Messages]
    chosen: np.ndarray
    rejected: np.ndarray
    user: np.ndarray
    label: np.ndarray | None = None
    sample_weight: np.ndarray | None = None
    group: np.ndarray | None = None

    @public("prefs.replace(features=...) of a Preferences that was built outside")
    def preferences(
        self, features: Any, *, num_users: int | None = None, user_ids: Any = None
    ) -> Preferences:
        """The pairs over an embedding table.

        Args:
          features: float[M, D], row i of `texts[i]`, or a `FeatureSource`.
          num_users: as in `Preferences.from_pairs`.
          user_ids: as in `Preferences.from_pairs`.

        Returns:
          `Preferences` of N pairs.

        Raises:
          ValueError: `features` has another number of rows than there are texts, or
            as `Preferences.from_pairs` says.
          TypeError: as `Preferences.from_pairs` says.

        Example:
          >>> from lore_jax import hf
          >>> rows = [{"chosen": "A is 1.", "rejected": "A is 2.", "who": "ann"}]
          >>> found = hf.from_dataset(rows, user="who")
          >>> found.preferences(np.eye(2, dtype=np.float32)).num_pairs
          1
        """
        if (rows := _tables.num_rows(features)) != len(self.texts):
            raise ValueError(
                f"features must have one row per text, M={len(self.texts)}, got {rows}"
            )
        return Preferences.from_pairs(
            features,
            self.chosen,
            self.rejected,
            self.user,
            num_users,
            self.label,
            self.sample_weight,
            self.group,
            user_ids=user_ids,
        )

    def __repr__(self) -> str:
        """Sizes, and which optional fields are there."""
        fields = ("label", "sample_weight", "group")
        found = [f", {name}" for name in fields if getattr(self, name) is not None]
        return (
            f"PreferenceTexts({len(self.chosen)} pairs of "
            f"{len(np.unique(self.user))} users over {len(self.texts)} texts"
            f"{''.join(found)})"
        )


def from_dataset(
    ds: Any,
    user: str,
    *,
    prompt: str | None = "prompt",
    chosen: str = "chosen",
    rejected: str = "rejected",
    responses: str | Sequence[str] | None = None,
    scores: str | Sequence[str] | None = None,
    label: str | None = None,
    sample_weight: str | None = None,
    group: str | None = None,
    chat: bool = False,
) -> PreferenceTexts:
    """Reads a preference data set in any format of TRL, or rows of scored responses.

    The text of a response is what a reward model reads: prompt and response together.

    | format | `prompt` | `chosen`, `rejected` | text |
    |---|---|---|---|
    | standard | string | strings | prompt + response |
    | standard, implicit prompt | – | strings | the string |
    | conversational | messages | messages | both lists together |
    | conversational, implicit prompt | – | messages | the messages |

    As in TRL, strings are joined as they are. With `chat=True` a string prompt becomes
    a message of the user and a string response one of the assistant, so that the chat
    template of the embedding model is applied. A response that is a list of messages
    may also repeat its prompt, and its prompt may be a string.

    With `responses` and `scores` every row holds several scored responses to one
    prompt. Each two of them with different scores become a pair, the higher score
    chosen. Pairs of one row are one group.

    Args:
      ds: a `datasets.Dataset`, a table of pandas, Polars or PyArrow, a mapping of
        columns, or an iterable of rows.
      user: column of the users' names.
      prompt: column of the prompts; None, or a data set without a column "prompt",
        means implicit prompts.
      chosen: column of the preferred responses.
      rejected: column of the others.
      responses: instead of `chosen` and `rejected`: a column of lists, or several
        columns with one response each. Where response and score are None, there is
        none.
      scores: numbers in the same layout as `responses`.
      label: column of P(chosen is preferred), from 0 to 1.
      sample_weight: column of non-negative weights.
      group: column of what must not be split between training and validation.
      chat: makes messages of strings; see above.

    Returns:
      `PreferenceTexts`.

    Raises:
      ValueError: a column or an entry is missing, a pair has twice the same text, or a
        conversation does not end with the assistant; the message names the row.
      TypeError: `ds` has no columns, or an entry has the wrong type.

    References:
      TRL, Dataset formats and types, section "Preference"
      (https://huggingface.co/docs/trl/dataset_formats).

    Example:
      >>> from lore_jax import hf
      >>> rows = {
      ...     "prompt": ["The sky is", "The sky is"],
      ...     "chosen": [" blue.", " grey."],
      ...     "rejected": [" green.", " blue."],
      ...     "annotator_id": ["ann", "bob"],
      ... }
      >>> found = hf.from_dataset(rows, user="annotator_id")
      >>> found.texts
      ['The sky is blue.', 'The sky is green.', 'The sky is grey.']
      >>> found.chosen.tolist(), found.rejected.tolist()
      ([0, 2], [1, 0])
    """
    names, read = _columns(ds)
    if prompt == "prompt" and prompt not in names:
        prompt = None

    def column(name: str, argument: str) -> list:
        if name not in names:
            raise ValueError(
                f"{argument}={name!r} is no column of ds; its columns are "
                f"{sorted(map(str, names))}"
            )
        values = read(name)
        values = values.to_pylist() if hasattr(values, "to_pylist") else list(values)
        plain = set(map(type, values)) == {str}
        return values if plain else [_plain(value) for value in values]

    def cells(name: str | Sequence[str], argument: str) -> list:
        if isinstance(name, str):
            return column(name, argument)
        return list(zip(*(column(part, argument) for part in name)))

    who = _ids.column(column(user, "user"), user)
    texts = _Texts(column(prompt, "prompt") if prompt else [None] * len(who), chat)
    if responses is not None and scores is not None:
        sides = cells(responses, "responses"), cells(scores, "scores")
        better, worse, row = _scored(texts, *sides)
    elif responses is None and scores is None:
        sides = column(chosen, "chosen"), column(rejected, "rejected")
        better, worse, row = _paired(texts, *sides, (chosen, rejected))
    else:
        raise ValueError("responses and scores belong together; only one was given")
    if (same := np.flatnonzero(better == worse)).size:
        raise ValueError(
            f"row {row[same[0]]}: both responses of a pair are the same text; drop "
            "such rows from ds"
        )
    groups = None if scores is None else row
    if group is not None:
        groups = _ids.column(column(group, "group"), group)[row]

    def numbers(name: str | None, argument: str, high: float) -> np.ndarray | None:
        if name is None:
            return None
        values = np.array(column(name, argument), object)[row]
        return _checks.host_floats(values, len(row), name, 0.0, high)

    return PreferenceTexts(
        texts.found,
        better,
        worse,
        who[row],
        numbers(label, "label", 1.0),
        numbers(sample_weight, "sample_weight", np.inf),
        groups,
    )


class _Texts:
    """Distinct texts in order of appearance."""

    def __init__(self, prompts: list, chat: bool):
        self.found: list[str | Messages] = []
        self._prompts, self._chat = prompts, chat
        self._place: dict[str, int] = {}
        self._known: dict[tuple[str | None, str], int] = {}

    def place(self, row: int, response: Any, name: str) -> int:
        """Place of the text of a response to the prompt of this row."""
        prompt = self._prompts[row]
        if not isinstance(response, str) or isinstance(prompt, list):
            return self._checked(row, response, name)
        if (place := self._known.get((prompt, response))) is None:
            place = self._checked(row, response, name)
            self._known[prompt, response] = place
        return place

    def _checked(self, row: int, response: Any, name: str) -> int:
        where = f"row {row}, {name}"
        text = join_text(self._prompts[row], response, self._chat, where)
        place = self._place.setdefault(text_key(text), len(self.found))
        if place == len(self.found):
            self.found.append(text)
        return place


def join_text(prompt: Any, response: Any, chat: bool, where: str) -> str | Messages:
    """Prompt and response as one text; see `from_dataset`."""
    if prompt is not None:
        prompt = check_text(prompt, f"{where}: the prompt")
    response = check_text(response, where)
    if isinstance(response, str):
        if not chat and not isinstance(prompt, list):
            return (prompt or "") + response
        if prompt is None:
            raise ValueError(
                f"{where}: chat=True needs a prompt column; where the prompt is part "
                "of a string, nothing says which message is whose"
            )
        response = [{"role": "assistant", "content": response}]
    if (role := response[-1]["role"]) != "assistant":
        raise ValueError(
            f"{where}: the last message must be the assistant's, its role is {role!r}"
        )
    if isinstance(prompt, str):
        if response[0]["role"] != "assistant":  # The prompt is repeated.
            return response
        prompt = [{"role": "user", "content": prompt}]
    if prompt is None or response[: len(prompt)] == prompt:
        return response
    return [*prompt, *response]


def _paired(texts: _Texts, chosen: list, rejected: list, names: tuple[str, str]):
    """(better, worse, row) int[N] of one pair per row."""
    places = [
        texts.place(row, text, name)
        for row, pair in enumerate(zip(chosen, rejected))
        for text, name in zip(pair, names)
    ]
    better, worse = np.array(places, np.int32).reshape(-1, 2).T
    return better, worse, np.arange(len(better))


def _scored(texts: _Texts, responses: list, scores: list):
    """(better, worse, row) int[N] of each two responses of a row with other scores."""
    found = []
    for row, (answers, values) in enumerate(zip(responses, scores)):
        for cell, name in ((answers, "responses"), (values, "scores")):
            if not isinstance(cell, list | tuple):
                raise TypeError(f"row {row}: {name} must be a list, got {type(cell)}")
        if len(answers) != len(values):
            raise ValueError(
                f"row {row}: {len(answers)} responses and {len(values)} scores"
            )
        rated = []
        for k, (answer, value) in enumerate(zip(answers, values)):
            if answer is None and _checks.is_missing(value):
                continue
            place = texts.place(row, answer, f"response {k}")
            where = f"row {row}, score {k}"
            number: Any = _checks.host_floats([value], 1, where, -np.inf, np.inf)
            rated.append((place, number[0]))
        for (a, x), (b, y) in itertools.combinations(rated, 2):
            if x != y:
                found.append((a, b, row) if x > y else (b, a, row))
    better, worse, rows = np.array(found, np.int32).reshape(-1, 3).T
    return better, worse, rows


def _columns(ds: Any) -> tuple[Sequence[str], Callable[[str], Any]]:
    """(names of the columns, a function that reads one)."""
    if isinstance(ds, Mapping):
        if any(hasattr(part, "column_names") for part in ds.values()):
            raise TypeError(
                f"ds must be one data set, got splits {list(ds)}: pass one of them"
            )
        return list(ds), ds.__getitem__
    if hasattr(ds, "with_format") and hasattr(ds, "num_rows"):  # datasets.Dataset
        ds = ds.with_format(None)
        return ds.column_names, ds.__getitem__
    if hasattr(ds, "to_pylist") and hasattr(ds, "column_names"):  # PyArrow
        return ds.column_names, ds.column
    if hasattr(ds, "columns") and hasattr(ds, "__getitem__"):  # pandas and Polars
        return list(ds.columns), lambda name: list(ds[name])
    try:
        rows = list(ds)
    except TypeError as error:
        raise TypeError(f"ds must have columns or rows, got {type(ds)}") from error
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise TypeError(f"row {i} of ds must be a mapping, got {type(row)}")
    names = list(dict.fromkeys(key for row in rows for key in row))
    return names, lambda name: [row.get(name) for row in rows]


def _plain(value: Any) -> Any:
    """Nested NumPy arrays as lists, what is missing as None."""
    if hasattr(value, "to_list") and getattr(value, "ndim", 1) == 1:  # A Polars cell.
        value = value.to_list()
    if isinstance(value, np.ndarray):
        value = value.tolist()
    return None if not isinstance(value, str) and _checks.is_missing(value) else value
