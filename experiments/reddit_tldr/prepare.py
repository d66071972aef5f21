"""Prepare RedditTLDR: ``openai/summarize_from_feedback``, ``comparisons``.

Users are the workers with pairs in both the train and the validation split. They are
halved by a seeded rule that looks only at their ids. Pairs of the train split fit the
basis (seen workers) or adapt to it (unseen); pairs of the validation split are held
out. A unit is a post.

The validation split also holds news articles, which have no post. They are another
task and are left out, unless ``--articles keep`` asks for them.
"""

import collections
from collections.abc import Iterable, Mapping

from experiments.prepare import finish, make_parser, pin_data, read_rows, start
from experiments.prepared import PairTable, digest, drop_shared, stable_order
from experiments.texts import TextIndex

SOURCE, CONFIG = "openai/summarize_from_feedback", "comparisons"
SPLITS = ("train", "validation")
REQUEST = "Summarize the following {what} in one or two sentences."


def render_prompt(info: Mapping, *, articles: bool = False) -> str | None:
    """The text to summarize, as a request; None if this row is not to be used.

    Args:
        info: the row's ``info``: id, post, title, subreddit, site, article.
        articles: whether news articles are wanted, which have no post.
    """
    what, body = "Reddit post", info.get("post")
    if not _filled(body):
        what, body = "news article", info.get("article")
        if not articles or not _filled(body):
            return None
    parts = [REQUEST.format(what=what)]
    if what == "Reddit post" and _filled(info.get("subreddit")):
        parts.append(f"Subreddit: r/{info['subreddit'].strip()}")
    if _filled(info.get("title")):
        parts.append(f"Title: {info['title'].strip()}")
    return "\n\n".join([*parts, body.strip()])


def build(
    splits: Mapping[str, Iterable[Mapping]],
    *,
    seed: int = 0,
    seen_pairs: int = 150,
    unseen_pairs: int = 50,
    min_pairs: int = 1,
    articles: bool = False,
) -> tuple[TextIndex, PairTable, dict]:
    """Rows of the source → texts, pairs, and what was dropped.

    Args:
        splits: the rows of "train" and "validation".
        seed: decides who is seen, and which pairs are taken.
        seen_pairs: most pairs of a seen worker in each split.
        unseen_pairs: most pairs of an unseen worker in each split.
        min_pairs: fewest pairs in each split for a worker to take part.
        articles: keep the news articles.

    Raises:
        TypeError: if a summary is not a string, naming the row.
        ValueError: if a row has not two summaries or no valid choice, naming it.
    """
    dropped: collections.Counter = collections.Counter()
    texts, by_worker = TextIndex(), {split: {} for split in SPLITS}
    for split in SPLITS:
        for number, row in enumerate(splits[split]):
            where = f"{SOURCE}, {split}, row {number}"
            pair = _pair(row, where, dropped, articles)
            if pair is not None:
                found = by_worker[split].setdefault(str(row["worker"]), {})
                if pair["key"] in found:
                    dropped["the same judgement again"] += 1
                found.setdefault(pair["key"], pair)
    enough = [
        {w for w, pairs in by_worker[split].items() if len(pairs) >= min_pairs}
        for split in SPLITS
    ]
    workers = stable_order(enough[0] & enough[1], seed)
    dropped["workers not in both splits"] = len(
        set(by_worker["train"]) | set(by_worker["validation"])
    ) - len(workers)
    seen = set(workers[: (len(workers) + 1) // 2])
    columns: dict[str, list] = collections.defaultdict(list)
    for worker in sorted(workers):
        limit = seen_pairs if worker in seen else unseen_pairs
        for split in SPLITS:
            found = by_worker[split][worker]
            taken = stable_order(found, seed)[:limit]
            dropped["pairs above the limit of a worker"] += len(found) - len(taken)
            for pair in map(found.get, taken):
                columns["user"].append(worker)
                columns["unit"].append(pair["post"])
                columns["group"].append(pair["post"])
                columns["chosen"].append(texts.add(pair["chosen"], pair["where"]))
                columns["rejected"].append(texts.add(pair["rejected"], pair["where"]))
                columns["seen"].append(worker in seen)
                columns["heldout"].append(split == "validation")
    if not workers:
        raise ValueError(f"no worker has pairs in both splits; dropped: {dropped}")
    table, shared = drop_shared(PairTable.from_columns(**columns))
    dropped["training pairs on a held-out post"] = shared
    return texts, table, dict(dropped)


def main(argv=None) -> dict:
    """Command line."""
    parser = make_parser(__doc__.splitlines()[0], "prepared/reddit_tldr")
    add = parser.add_argument
    add("--seen-pairs", type=int, default=150, help="most per seen worker and split")
    add("--unseen-pairs", type=int, default=50, help="most per unseen worker and split")
    add("--min-pairs", type=int, default=1, help="fewest per worker and split")
    add("--articles", choices=("drop", "keep"), default="drop", help="news articles")
    args = parser.parse_args(argv)
    pin_data(args, SOURCE)
    start(
        args,
        "reddit_tldr",
        shots="pairs",
        shot_counts=[5, 10, 20, 30, 40, 50],
        ranks=list(range(7)),
        variants=[None],
    )
    rows = {
        split: read_rows(SOURCE, CONFIG, split, args.data, args.data_revision)
        for split in SPLITS
    }
    texts, table, dropped = build(
        rows,
        seed=args.seed,
        seen_pairs=args.seen_pairs,
        unseen_pairs=args.unseen_pairs,
        min_pairs=args.min_pairs,
        articles=args.articles == "keep",
    )
    return finish(args, texts, {None: table}, dropped)


def _pair(row: Mapping, where: str, dropped: collections.Counter, articles: bool):
    """One row as a pair of conversations, or None with the reason counted."""
    summaries = [summary["text"] for summary in row["summaries"]]
    if len(summaries) != 2 or row["choice"] not in (0, 1):
        raise ValueError(
            f"{where}: {len(summaries)} summaries, choice {row['choice']!r}; "
            "expected 2 and 0 or 1"
        )
    for place, text in enumerate(summaries):
        if not isinstance(text, str):
            raise TypeError(
                f"{where}: summary {place} must be a string, got {type(text).__name__}"
            )
    if not row["worker"]:
        dropped["no worker"] += 1
        return None
    prompt = render_prompt(row["info"], articles=articles)
    if prompt is None:
        dropped["no post (news articles)"] += 1
        return None
    first, second = (text.strip() for text in summaries)
    if not first or not second or first == second:
        dropped["an empty summary, or twice the same"] += 1
        return None
    ask = {"role": "user", "content": prompt}
    both = [[ask, {"role": "assistant", "content": text}] for text in (first, second)]
    chosen, rejected = both if row["choice"] == 0 else both[::-1]
    post = digest(prompt)[:16]
    answers = (chosen[-1]["content"], rejected[-1]["content"])
    return {
        "post": post,
        "chosen": chosen,
        "rejected": rejected,
        "where": where,
        "key": digest("\0".join((post, *answers))),
    }


def _filled(text) -> bool:
    return isinstance(text, str) and bool(text.strip())


if __name__ == "__main__":
    main()
