"""Votes of a Polis export through the whole chain."""

import csv

import numpy as np
import pytest
from experiment_cases import MARKS, QUICK, pictures
from fixtures import sources

from experiments import __main__ as entry
from experiments import (
    baselines,
    leaks,
    parts,
)
from experiments import prepared as prepared_data
from experiments.bowling_green import prepare as bowling

pytestmark = MARKS

PICTURES = ("accuracy_by_rank", "accuracy_by_shots_rank_2", "weights", "cosines")


def write_polis(folder, people=24, statements=12, seed=0):
    """A raw Polis export with everything that has to be left out."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    ids = [str(7 * n) for n in range(statements)]
    texts = [sources.sentence(rng, 8, 14) for _ in ids]
    texts[3], texts[5] = "Short", texts[4].upper()
    with open(folder / bowling.COMMENTS, "w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow("timestamp,datetime,comment-id,author-id,agrees,disagrees,"
                     "moderated,comment-body".split(","))  # fmt: skip
        for n in reversed(range(statements)):
            moderated = -1 if n == 1 else 1
            out.writerow([0, "Tue", ids[n], 0, 1, 1, moderated, texts[n]])
    votes = rng.choice([1, 1, -1, -1, 0, None], size=(people, statements))
    votes[:, 2] = None  # nobody voted on it
    votes[0] = 1  # somebody who disagrees with nothing
    with open(folder / bowling.VOTES, "w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        head = "participant,group-id,n-comments,n-votes,n-agree,n-disagree".split(",")
        out.writerow([*head, *ids])
        for person, row in enumerate(votes):
            cells = ["" if vote is None else vote for vote in row]
            out.writerow([person, 0, 0, 0, 0, 0, *cells])
    return ids, votes


def test_bowling_green_from_a_raw_export(tmp_path, monkeypatch):
    ids, votes = write_polis(tmp_path / "raw")
    rng = np.random.default_rng(1)
    monkeypatch.setattr(
        bowling, "sentence_embedder", lambda *_: lambda t: rng.normal(size=(len(t), 5))
    )
    argv = ["--raw", str(tmp_path / "raw"), "--out", str(tmp_path / "prepared")]
    argv += ["--splits", "1", "--user-votes", "2", "--unseen-share", "0.4"]
    done = bowling.main(argv)
    kept = [n for n in reversed(range(len(ids))) if n not in (1, 2, 3, 4)]
    counted = [sum(vote in (1, -1) for vote in votes[:, n]) for n in range(len(ids))]
    kept = [n for n in kept if counted[n] >= 8]
    with np.load(tmp_path / "prepared/package/bowling_green_v1.npz") as package:
        matrix = np.full((done["participants"], done["texts"]), None)
        matrix[package["vote_user"], package["vote_item"]] = package["vote"]
        assert package["emb"].dtype == np.float16
    path = tmp_path / "prepared/package/bowling_green_items.csv"
    with open(path, newline="", encoding="utf-8") as file:
        items = list(csv.DictReader(file))
    assert [row["source_comment_id"] for row in items] == [ids[n] for n in kept]
    enough = [
        person
        for person in range(len(votes))
        if min((votes[person, kept] == 1).sum(), (votes[person, kept] == -1).sum()) >= 2
    ]
    np.testing.assert_array_equal(matrix, votes[np.ix_(enough, kept)])
    folders = ["--data", str(tmp_path / "prepared"), "--out", str(tmp_path / "runs")]
    folders += [*QUICK, "--methods", "global", "lore", "auto"]
    (trained,) = entry.main(["train_basis", "bowling_green", *folders])
    (swept,) = entry.main(["vary_fewshot", "bowling_green", *folders])
    assert pictures(tmp_path / "runs") == set(PICTURES)
    assert set(trained["counts"]) == {"split_0"}
    rows = {row["method"] for row in trained["table"]}
    assert {baselines.GLOBAL, baselines.LORE, baselines.CHOSEN} <= rows
    more = {baselines.POPULATION, baselines.OTHER, baselines.MAXIMUM}
    assert more <= rows
    assert {baselines.LORE, baselines.CHOSEN, *more} <= {
        r["method"] for r in swept["table"]
    }
    assert set(trained["chosen_rank"].values()) <= {1, 2}
    for results in (trained, swept):  # the plug-in differs in its probabilities alone
        row = next(r for r in results["table"] if r["method"] == baselines.PLUG_IN)
        assert row["unseen_heldout"] is None
        assert row["unseen_heldout_brier"]["mean"] > 0
    assert (
        f"{baselines.PLUG_IN} | 2 | ECE" in (tmp_path / "runs/fewshot.md").read_text()
    )


def test_bowling_green_shipped_votes_have_no_vote_on_two_sides(tmp_path):
    bowling.main(["--out", str(tmp_path), "--splits", "1", "--max-training", "3"])
    found = prepared_data.load(tmp_path, "split_0")
    assert found.features.shape == (607, 384)
    table = found.pairs
    moved = table.heldout.copy()
    moved[np.flatnonzero(table.heldout)[0]] = False
    broken = parts.dataclasses.replace(table, heldout=moved)
    with pytest.raises(leaks.LeakError, match="vote"):
        parts.check_leaks(parts.dataclasses.replace(found, pairs=broken))


def test_polis_errors_name_the_place(tmp_path):
    write_polis(tmp_path / "raw")
    path = tmp_path / "raw" / bowling.VOTES
    with pytest.raises(ValueError, match=r"no column for comments \['1000'\]"):
        bowling.read_votes(path, ["0", "1000"])
    path.write_text(path.read_text().replace("\n5,0,0,0,0,0,", "\n5,0,0,0,0,0,x"))
    with pytest.raises(ValueError, match=r"row 5: 'x.*' is not a vote"):
        bowling.read_votes(path, ["0"])
