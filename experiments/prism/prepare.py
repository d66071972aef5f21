"""Prepare PRISM: ``HannahRoseKirk/prism-alignment``, dialogues to pairs.

A turn in which one answer was chosen gives one pair for each answer that was not, with
the whole history before it as chat messages. A group is such a turn (one judgement), a
unit is a dialogue. Participants with more than five usable dialogues take part; 80 % of
them are seen, and half of everybody's dialogues are held out, so no dialogue stands on
both sides. Shots are counted in dialogues.
"""

import collections
from collections.abc import Iterable, Mapping, Sequence

from experiments.prepare import finish, make_parser, pin_data, read_rows, start
from experiments.prepared import PairTable, drop_shared, stable_order
from experiments.texts import TextIndex

SOURCE = "HannahRoseKirk/prism-alignment"
ROLES = {"user": "user", "model": "assistant", "assistant": "assistant"}


def dialogue_pairs(conversation: Mapping, dropped: collections.Counter) -> list[dict]:
    """The pairs of one conversation, in order.

    The dialogue goes on with the chosen answer. Where that is not known (nobody was
    chosen, two different answers were, a role is unknown, there is no single prompt),
    what comes later has no history, and the rest of the dialogue is left out.

    Args:
        conversation: a row of ``conversations``.
        dropped: counts what was left out.

    Returns:
        ``{"turn": int, "history": messages, "chosen": str, "rejected": str}``.

    Raises:
        TypeError: if a content is not a string, naming conversation and turn.
    """
    turns: dict[int, list[Mapping]] = {}
    for entry in conversation["conversation_history"]:
        turns.setdefault(entry["turn"], []).append(entry)
    history: list[dict] = []
    pairs = []
    for turn in sorted(turns):
        where = f"conversation {conversation['conversation_id']}, turn {turn}"
        said = _by_role(turns[turn], where)
        answers = said["assistant"]
        chosen = list(dict.fromkeys(a for a, picked in answers if picked))
        if said["unknown"]:
            reason = "unknown role"
        elif len(said["user"]) != 1 or not said["user"][0].strip():
            reason = "not one prompt"
        elif len(chosen) != 1:
            reason = "not one chosen answer"
        else:
            reason = None
        if reason:
            dropped[f"rest of a dialogue: {reason} in a turn"] += 1
            break
        history.append({"role": "user", "content": said["user"][0]})
        others = [a for a, picked in answers if not picked]
        rejected = dict.fromkeys(a for a in others if a and a != chosen[0])
        dropped["empty or repeated answers"] += len(others) - len(rejected)
        if not others:
            dropped["turns without a rejected answer"] += 1
        if chosen[0]:
            for answer in rejected:
                pair = {"turn": turn, "history": list(history)}
                pairs.append({**pair, "chosen": chosen[0], "rejected": answer})
        else:
            dropped["turns with an empty chosen answer"] += 1
        history.append({"role": "assistant", "content": chosen[0]})
    return pairs


def build(
    conversations: Iterable[Mapping],
    survey: Iterable[Mapping] | None = None,
    utterances: Iterable[Mapping] | None = None,
    *,
    seed: int = 0,
    min_dialogues: int = 6,
    seen_share: float = 0.8,
    heldout_share: float = 0.5,
) -> tuple[TextIndex, PairTable, dict]:
    """Rows of the source → texts, pairs, and what was dropped.

    Args:
        conversations: rows of ``conversations``.
        survey: rows of ``survey``; participants not in it are left out.
        utterances: rows of ``utterances``, the same answers in long form; turns whose
            chosen answer differs there are left out.
        seed: decides who is seen and which dialogues are held out.
        min_dialogues: fewest usable dialogues for a participant to take part.
        seen_share: share of the participants who train the basis.
        heldout_share: share of everybody's dialogues for evaluation.

    Raises:
        TypeError: if a content is not a string, naming conversation and turn.
        ValueError: if nobody has enough dialogues.
    """
    dropped: collections.Counter = collections.Counter()
    known = None if survey is None else {str(row["user_id"]) for row in survey}
    rated = None if utterances is None else _chosen_utterances(utterances)
    by_user: dict[str, dict[str, list[dict]]] = collections.defaultdict(dict)
    for conversation in conversations:
        user, name = str(conversation["user_id"]), str(conversation["conversation_id"])
        if known is not None and user not in known:
            dropped["dialogues of people not in the survey"] += 1
            continue
        pairs = dialogue_pairs(conversation, dropped)
        if rated is not None:
            agree = [
                p for p in pairs if p["chosen"] in rated.get((name, p["turn"]), ())
            ]
            dropped["pairs that utterances contradict"] += len(pairs) - len(agree)
            pairs = agree
        if name in by_user[user]:
            raise ValueError(f"conversation {name} occurs twice")
        if pairs:
            by_user[user][name] = pairs
        else:
            dropped["dialogues without a pair"] += 1
    enough = [u for u, found in by_user.items() if len(found) >= min_dialogues]
    dropped[f"people with fewer than {min_dialogues} dialogues"] = len(by_user) - len(
        enough
    )
    if not enough:
        raise ValueError(
            f"nobody has {min_dialogues} usable dialogues; dropped: {dict(dropped)}"
        )
    users = stable_order(enough, seed)
    seen = set(users[: round(seen_share * len(users))])
    texts, columns = TextIndex(), collections.defaultdict(list)
    for user in sorted(users):
        names = stable_order(by_user[user], seed)
        heldout = set(names[: round(heldout_share * len(names))])
        for name in sorted(names):
            for pair in by_user[user][name]:
                where = f"conversation {name}, turn {pair['turn']}"
                columns["user"].append(user)
                columns["unit"].append(name)
                columns["group"].append(f"{name}/{pair['turn']}")
                for side in ("chosen", "rejected"):
                    answer = {"role": "assistant", "content": pair[side]}
                    row = texts.add([*pair["history"], answer], where)
                    columns[side].append(row)
                columns["seen"].append(user in seen)
                columns["heldout"].append(name in heldout)
    table, shared = drop_shared(PairTable.from_columns(**columns))
    dropped["training pairs whose text is held out too"] = shared
    return texts, table, {reason: n for reason, n in dropped.items() if n}


def main(argv=None) -> dict:
    """Command line."""
    parser = make_parser(__doc__.splitlines()[0], "prepared/prism")
    add = parser.add_argument
    add("--min-dialogues", type=int, default=6, help="fewest for a person to take part")
    add("--seen-share", type=float, default=0.8, help="of the people")
    add("--heldout-share", type=float, default=0.5, help="of everybody's dialogues")
    args = parser.parse_args(argv)
    pin_data(args, SOURCE)
    start(
        args,
        "prism",
        shots="units",
        shot_counts=[1, 2, 3],
        ranks=[0, 1, *range(5, 51, 5)],
        variants=[None],
    )
    names = ("conversations", "survey", "utterances")
    rows = [
        read_rows(SOURCE, name, "train", args.data, args.data_revision)
        for name in names
    ]
    texts, table, dropped = build(
        *rows,
        seed=args.seed,
        min_dialogues=args.min_dialogues,
        seen_share=args.seen_share,
        heldout_share=args.heldout_share,
    )
    return finish(args, texts, {None: table}, dropped)


def _by_role(entries: Sequence[Mapping], where: str) -> dict[str, list]:
    """One turn's prompts, its answers as (text, chosen), and its unknown roles."""
    said: dict[str, list] = {"user": [], "assistant": [], "unknown": []}
    for place, entry in enumerate(entries):
        role, content = ROLES.get(entry["role"], "unknown"), entry["content"]
        if not isinstance(content, str):
            raise TypeError(
                f"{where}, entry {place} ({entry['role']!r}): content must be a "
                f"string, got {type(content).__name__}: {str(content)[:60]!r}"
            )
        text = content.strip()
        said[role].append((text, entry["if_chosen"]) if role == "assistant" else text)
    return said


def _chosen_utterances(rows: Iterable[Mapping]) -> dict[tuple[str, int], set[str]]:
    found: dict[tuple[str, int], set[str]] = collections.defaultdict(set)
    for row in rows:
        if row["if_chosen"]:
            key = (str(row["conversation_id"]), row["turn"])
            found[key].add((row["model_response"] or "").strip())
    return found


if __name__ == "__main__":
    main()
