"""The data set that ships with the package."""

import csv
import importlib.resources
from typing import NamedTuple

import numpy as np

from lore_jax.data.splits import FourWay, split_votes

_FILES = importlib.resources.files("lore_jax") / "data_files"


class Votes(NamedTuple):
    """Votes of people on statements.

    Attributes:
      features: float32[M, D], an embedding of each statement, unit norm.
      user: int32[n], who voted.
      item: int32[n], on which statement.
      vote: int8[n], +1 agree, −1 disagree, 0 pass.
      text: str[M], the statements.
      user_ids: str[U].
      item_ids: str[M], the source's comment numbers.
      readme: origin, licence and the attribution that has to be kept.
    """

    features: np.ndarray
    user: np.ndarray
    item: np.ndarray
    vote: np.ndarray
    text: np.ndarray
    user_ids: np.ndarray
    item_ids: np.ndarray
    readme: str

    def split(self, *, seed: int = 0, **settings) -> FourWay:
        """`data.split_votes` of these votes; see there for the settings."""
        return split_votes(
            self.features,
            self.user,
            self.item,
            self.vote,
            num_users=len(self.user_ids),
            user_ids=self.user_ids,
            item_ids=self.item_ids,
            seed=seed,
            **settings,
        )


def load_bowling_green() -> Votes:
    """Votes of 1,066 people on 607 statements, out of the package; no download.

    196,812 votes of the Polis conversation of Bowling Green (CC BY 4.0, the
    Computational Democracy Project; `Votes.readme` says more).
    """
    folder = _FILES / "bowling_green"
    with (folder / "bowling_green_v1.npz").open("rb") as file:
        with np.load(file, allow_pickle=False) as arrays:
            table = {key: arrays[key] for key in arrays.files}
    lines = (folder / "bowling_green_items.csv").read_text(encoding="utf-8")
    items = list(csv.DictReader(lines.splitlines(keepends=True)))
    num_users = int(table["vote_user"].max()) + 1
    return Votes(
        features=table["emb"].astype(np.float32),
        user=table["vote_user"].astype(np.int32),
        item=table["vote_item"].astype(np.int32),
        vote=table["vote"],
        text=np.array([row["text"] for row in items]),
        user_ids=np.array([f"p{u}" for u in range(num_users)]),
        item_ids=np.array([row["source_comment_id"] for row in items]),
        readme=(folder / "README.md").read_text(encoding="utf-8"),
    )
