"""Prepare bowling_green: the package's votes, or a raw Polis export.

Without ``--raw`` this writes the data that ships with the package in the format of the
other experiments, nothing downloaded. With ``--raw FOLDER`` it rebuilds them from an
export's ``comments.csv`` and ``participants-votes.csv``: moderated-in comments of 8 to
1000 characters, each text once, with enough votes that are not "pass"; participants
with enough agrees and disagrees; and embeds them with a sentence-embedding model.

A pair is a statement a person agreed with against one the same person disagreed with.
What is held out is a *vote*: pairs never mix votes of both sides. Every split draws
its own unseen people and held-out votes.
"""

import argparse
import csv
from pathlib import Path

import numpy as np

import lore_jax as lore
from experiments.parts import check_leaks
from experiments.prepare import positive, share, start
from experiments.prepared import PairTable, load, pairs_path, write_features, write_json
from experiments.stored import replacing, write_arrays
from experiments.texts import TextIndex
from lore_jax.data import Votes

DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
COMMENTS, VOTES = "comments.csv", "participants-votes.csv"


def read_comments(path) -> list[dict]:
    """The statements that may take part, in the order of the file.

    Args:
        path: ``comments.csv`` with ``comment-id``, ``moderated``, ``comment-body``.

    Returns:
        ``{"id": str, "text": str}`` of comments moderated in, with 8 to 1000
        characters, the first of every text.

    Raises:
        ValueError: naming a column that is missing.
    """
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        columns = ("comment-id", "moderated", "comment-body")
        if missing := [c for c in columns if c not in (rows.fieldnames or ())]:
            raise ValueError(f"{path}: missing columns {missing}")
        found: dict[str, dict] = {}
        for row in rows:
            text = " ".join(row["comment-body"].split())
            if row["moderated"].strip() == "1" and 8 <= len(text) <= 1000:
                item = {"id": row["comment-id"].strip(), "text": text}
                found.setdefault(text.casefold(), item)
    return list(found.values())


def read_votes(path, items: list[str]) -> np.ndarray:
    """int8[participants, items]: 1 agree, −1 disagree, 0 pass, −2 not voted.

    Args:
        path: ``participants-votes.csv``: a column per comment, empty where not voted.
        items: comment ids.

    Raises:
        ValueError: naming a comment without a column, or a cell that is no vote.
    """
    codes = {"": -2, "1": 1, "0": 0, "-1": -1, "1.0": 1, "0.0": 0, "-1.0": -1}
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file)
        header = next(rows)
        place = {name.strip(): i for i, name in enumerate(header)}
        if missing := [item for item in items if item not in place]:
            raise ValueError(f"{path}: no column for comments {missing[:5]}")
        votes = []
        for number, row in enumerate(rows):
            cells = [row[place[item]].strip() for item in items]
            if wrong := [c for c in cells if c not in codes]:
                raise ValueError(f"{path}, row {number}: {wrong[0]!r} is not a vote")
            votes.append([codes[cell] for cell in cells])
    return np.array(votes, np.int8).reshape(-1, len(items))


def select(votes: np.ndarray, *, item_votes: int = 8, user_votes: int = 6):
    """Which participants and items have enough votes.

    Args:
        votes: int8[participants, items], see ``read_votes``.
        item_votes: fewest votes on an item that are not "pass".
        user_votes: fewest agrees, and fewest disagrees, of a participant on those.

    Returns:
        (bool[participants], bool[items]).

    Raises:
        ValueError: if nothing is left.
    """
    keep_items = (np.abs(votes) == 1).sum(0) >= item_votes
    kept = votes[:, keep_items]
    keep_users = np.minimum((kept == 1).sum(1), (kept == -1).sum(1)) >= user_votes
    if not keep_items.any() or not keep_users.any():
        raise ValueError(
            f"{keep_items.sum()} statements and {keep_users.sum()} participants have "
            "enough votes"
        )
    return keep_users, keep_items


def from_raw(folder: Path, embed, *, item_votes: int = 8, user_votes: int = 6) -> Votes:
    """The votes of a raw export.

    Args:
        folder: with ``comments.csv`` and ``participants-votes.csv``.
        embed: list of texts → float[M, D].
        item_votes: see ``select``.
        user_votes: see ``select``.
    """
    comments = read_comments(folder / COMMENTS)
    votes = read_votes(folder / VOTES, [comment["id"] for comment in comments])
    users, items = select(votes, item_votes=item_votes, user_votes=user_votes)
    votes = votes[users][:, items]
    comments = [c for c, keep in zip(comments, items) if keep]
    user, item = np.nonzero(votes != -2)
    texts = [comment["text"] for comment in comments]
    features = np.asarray(embed(texts), np.float32)
    return Votes(
        features=features.astype(np.float16).astype(np.float32),  # as it is stored
        user=user.astype(np.int32),
        item=item.astype(np.int32),
        vote=votes[user, item],
        text=np.array(texts),
        user_ids=np.array([f"p{u}" for u in range(len(votes))]),
        item_ids=np.array([comment["id"] for comment in comments]),
        readme="",
    )


def sentence_embedder(
    model: str, device: str | None = None, revision: str | None = None, batch: int = 64
):
    """Texts → unit-norm mean of the last hidden states over real tokens.

    The model is read from safetensors alone, and none of its code runs. The function
    has the commit on the hub as its attribute ``commit``.
    """
    import torch
    from tqdm import tqdm
    from transformers import AutoModel, AutoTokenizer

    safe = {"revision": revision, "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(model, **safe)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    network = AutoModel.from_pretrained(model, use_safetensors=True, **safe)
    commit = getattr(network.config, "_commit_hash", None)
    network = network.to(device).eval()

    def embed(texts: list[str]) -> np.ndarray:
        out = []
        for begin in tqdm(range(0, len(texts), batch), "embed", disable=None):
            inputs = tokenizer(
                texts[begin : begin + batch],
                padding=True,
                truncation=True,
                max_length=256,
                return_tensors="pt",
            ).to(device)
            with torch.inference_mode():
                hidden = network(**inputs).last_hidden_state.float()
            mask = inputs["attention_mask"][..., None].float()
            mean = (hidden * mask).sum(1) / mask.sum(1)
            out.append(torch.nn.functional.normalize(mean, dim=1).cpu().numpy())
        return np.concatenate(out)

    embed.commit = commit
    return embed


def write_package(folder: Path, votes: Votes, seed: int) -> None:
    """The two files in the form that ships with the package, with drawn splits."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    sizes = {"item_split": (len(votes.text), 0.3), "user_split": (0, 0.2)}
    sizes["user_split"] = (len(votes.user_ids), 0.2)
    sizes["vote_split"] = (len(votes.vote), 0.3)
    splits = {
        n: (generator.random(m) < p).astype(np.int8) for n, (m, p) in sizes.items()
    }
    write_arrays(
        folder / "bowling_green_v1.npz",
        emb=votes.features.astype(np.float16),
        vote_user=smallest(votes.user),
        vote_item=smallest(votes.item),
        vote=votes.vote.astype(np.int8),
        **splits,
    )
    path = folder / "bowling_green_items.csv"
    with (
        replacing(path) as temporary,
        open(temporary, "w", encoding="utf-8", newline="") as file,
    ):
        out = csv.writer(file, lineterminator="\n")
        out.writerow(["item", "conversation", "source_comment_id", "text"])
        for place, (name, text) in enumerate(zip(votes.item_ids, votes.text)):
            out.writerow([place, "bowling_green", name, text])


def smallest(values: np.ndarray) -> np.ndarray:
    """As int16, like the package's own file, or as int32 where that is too small."""
    fits = not len(values) or values.max() <= np.iinfo(np.int16).max
    return values.astype(np.int16 if fits else np.int32)


def to_table(data: lore.data.FourWay) -> PairTable:
    """The four parts of a split as a pair table."""
    columns: dict[str, list] = {}
    for place, part in enumerate(data):
        users = part.ids.users[part.user]
        votes = [f"{u}/{row}" for u, row in zip(users, part.chosen)]
        values = {
            **{"user": users, "unit": votes, "group": votes},
            **{"chosen": part.chosen, "rejected": part.rejected},
            "seen": np.full(part.num_pairs, place < 2),
            "heldout": np.full(part.num_pairs, place % 2 == 1),
        }
        for name, value in values.items():
            columns.setdefault(name, []).append(value)
    return PairTable.from_columns(**{n: np.concatenate(v) for n, v in columns.items()})


def main(argv=None) -> dict:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("prepared/bowling_green"))
    add("--seed", type=int, default=0, help="of the first split; the others follow")
    add("--splits", type=positive, default=4)
    add("--unseen-share", type=share, default=0.2, help="of the people")
    add(
        "--heldout-share",
        type=share,
        default=0.3,
        help="of everybody's votes, or of the statements",
    )
    add(
        "--holdout",
        choices=("judgements", "items"),
        default="judgements",
        help="hold out votes, or statements with all their votes",
    )
    add("--max-training", type=int, default=40, help="most training pairs of a person")
    add("--max-heldout", type=int, default=20, help="most held-out pairs of a person")
    add("--raw", type=Path, help="folder of a Polis export: rebuild the data from it")
    add("--model", default=DEFAULT_MODEL, help="with --raw: hub name or folder")
    add("--revision", help="with --raw: branch, tag or commit of the model")
    add("--device", help="with --raw: cuda, cpu, ...")
    add("--item-votes", type=int, default=8, help="with --raw: fewest on a statement")
    add("--user-votes", type=int, default=6, help="with --raw: fewest of each kind")
    args = parser.parse_args(argv)
    names = [f"split_{number}" for number in range(args.splits)]
    facts = {"shots": "pairs", "shot_counts": [0, 1, 3, 5, 10, 20]}
    facts |= {"ranks": [0, 1, 2, 5, 10], "variants": names}
    facts |= {"variants_are": "splits", "judgements": "votes"}
    start(args, "bowling_green", **facts)
    if args.raw is None:
        votes = lore.data.load_bowling_green()
    else:
        embed = sentence_embedder(args.model, args.device, args.revision)
        limits = {"item_votes": args.item_votes, "user_votes": args.user_votes}
        votes = from_raw(args.raw, embed, **limits)
        write_package(args.out / "package", votes, args.seed)
    texts = TextIndex()
    for name, text in zip(votes.item_ids, votes.text):
        texts.add([{"role": "assistant", "content": str(text)}], f"comment {name}")
    if len(texts) != len(votes.text):
        raise ValueError("two statements have the same text")
    texts.save(args.out / "texts.jsonl")
    write_features(args.out, votes.features)
    report: dict = {"texts": len(texts), "votes": len(votes.vote), "counts": {}}
    report |= {"participants": len(votes.user_ids), "leaks": {}}
    if args.raw is not None:
        report["commit"] = getattr(embed, "commit", None)
    for number, name in enumerate(names):
        data = votes.split(
            seed=args.seed + number,
            unseen=args.unseen_share,
            heldout=args.heldout_share,
            holdout=args.holdout,
            max_training=args.max_training,
            max_heldout=args.max_heldout,
        )
        table = to_table(data)
        table.save(pairs_path(args.out, name))
        report["counts"][name] = table.counts()
        report["leaks"][name] = check_leaks(load(args.out, name))
    write_json(args.out / "report.json", report)
    print(f"{len(texts)} statements, {len(votes.user_ids)} people → {args.out}")
    return report


if __name__ == "__main__":
    main()
