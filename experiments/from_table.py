"""Run the whole protocol on your own table of preferences.

    python -m experiments.from_table FILE --out runs/mine

FILE is Parquet, CSV, TSV, JSONL or JSON, also gzipped, with the columns ``user``,
``prompt``, ``chosen`` and ``rejected`` (texts), and optionally ``group`` (one
judgement: a turn, a dialogue, a session; default the prompt), ``label`` (P(chosen is
preferred), from 0 to 1) and ``weight``; an optional column must be filled in every row
or in none. Where the file calls a column something else, say ``--user-column NAME`` and
the like. ``chosen`` and ``rejected`` may be lists of chat messages that end with the
answer; then ``prompt`` may be the messages before it, or missing. With
``--embeddings FILE`` (``.npy`` or safetensors, float[M, D]) ``chosen`` and ``rejected``
are row numbers, counted from 0, and ``prompt`` may be missing.

No split cuts a prompt. Where every prompt belongs to one group (the prompts of a
dialogue) no split cuts a group either. Without prompts, groups are what no split cuts;
without both, a person's rows are.

People are divided into seen and unseen, groups into training and held-out ones; then
``train_basis`` and ``vary_fewshot`` run on the result.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from experiments import cli, prepare
from experiments.parts import check_leaks, hash_array
from experiments.prepared import (
    PairTable,
    drop_shared,
    load,
    rng,
    stable_order,
    write_features,
    write_json,
)
from experiments.texts import TextIndex
from lore_jax.cli.table_files import NEEDED, OPTIONAL
from lore_jax.cli.tables import check_columns, read_embeddings, read_head, read_table


def text_rows(columns: dict[str, list], texts: TextIndex) -> dict[str, list]:
    """Replace texts by their rows in ``texts``.

    Raises:
        TypeError: if a text is neither a string nor a list of messages, naming the row.
        ValueError: if there is no prompt column and no messages either, or the two
            sides of a row answer different messages.
    """
    plain = not all(map(_is_messages, columns["chosen"]))
    if "prompt" not in columns and plain:
        raise ValueError("texts need a prompt column; row numbers need --embeddings")
    out = {**columns, "prompt": [], "chosen": [], "rejected": []}
    for number in range(len(columns["user"])):
        prompt = columns["prompt"][number] if "prompt" in columns else None
        asked = {}
        for side in ("chosen", "rejected"):
            where = f"row {number}, {side}"
            messages = conversation(prompt, columns[side][number], where)
            out[side].append(texts.add(messages, where))
            asked[side] = [(m["role"], m["content"]) for m in messages[:-1]]
        if asked["chosen"] != asked["rejected"]:
            raise ValueError(
                f"row {number}: chosen and rejected answer different messages: "
                f"{str(asked['chosen'])[-60:]} and {str(asked['rejected'])[-60:]}"
            )
        out["prompt"].append(
            prompt if isinstance(prompt, str) else json.dumps(asked["chosen"])
        )
    return out


def conversation(prompt, answer, where: str) -> list[dict]:
    """The messages that end with an answer.

    Args:
        prompt: a text, the messages before the answer, or None.
        answer: a text, or messages: the whole conversation, or only its end.
        where: what to call this row in an error.

    Raises:
        ValueError: if the last message is none of the assistant's.
    """
    if not _is_messages(answer):
        answer = [{"role": "assistant", "content": answer}]
    if answer[-1].get("role") != "assistant":
        raise ValueError(
            f"{where}: the last message must be the assistant's, the role is "
            f"{answer[-1].get('role')!r}; messages are {{'role': …, 'content': …}}"
        )
    if not _is_messages(prompt):
        ends = prompt is None or answer[0].get("role") != "assistant"
        before = [] if ends else [{"role": "user", "content": prompt}]
    else:
        before = [] if answer[: len(prompt)] == prompt else prompt
    return [*before, *answer]


def _is_messages(value) -> bool:
    """Whether a cell is a list of messages rather than one text."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(message, dict) for message in value)
    )


def build(
    columns: dict[str, list],
    *,
    seed: int = 0,
    seen_share: float = 0.8,
    heldout_share: float = 0.3,
) -> tuple[PairTable, dict, bool]:
    """Divide people and pairs.

    Args:
        columns: one list per column; chosen and rejected are row numbers.
        seed: of both divisions.
        seen_share: share of the people who train the basis.
        heldout_share: share of everybody's units (or rows) for evaluation.

    Returns:
        The pairs, what was dropped, and whether rows of a person ("votes") are what
        no split cuts, for want of a prompt or group.

    Raises:
        ValueError: if fewer than two people are there, or a share is not between 0
            and 1.
    """
    user = np.array([str(name) for name in columns["user"]])
    people = stable_order(user.tolist(), seed)
    if len(people) < 2:
        raise ValueError("the table needs at least two users, one of them unseen")
    number = min(max(1, round(seen_share * len(people))), len(people) - 1)
    chosen, rejected = (np.array(columns[s], np.int64) for s in ("chosen", "rejected"))
    shares = {"seen_share": seen_share, "heldout_share": heldout_share}
    for name, value in shares.items():
        if not 0 < value < 1:
            raise ValueError(f"{name} must be between 0 and 1, got {value}")
    unit, group = units_and_groups(columns)
    votes, dropped = unit is None, {}
    keep = np.ones(len(user), bool)
    if votes:
        heldout, mixed = hold_out_rows(user, chosen, rejected, heldout_share, seed)
        keep, dropped["pairs with one row on either side"] = ~mixed, int(mixed.sum())
        unit = group = [f"{name}/{row}" for name, row in zip(user, chosen)]
    else:
        held = hold_out_units(user, unit, heldout_share, seed)
        heldout = np.array([name in held for name in unit])
    unit, group = np.array(unit), np.array(group)
    extra = {
        name: np.array(columns[name], np.float64)[keep]
        for name in ("label", "weight")
        if name in columns
    }
    table = PairTable.from_columns(
        user=user[keep], unit=unit[keep], group=group[keep], chosen=chosen[keep],
        rejected=rejected[keep], seen=np.isin(user, people[:number])[keep],
        heldout=heldout[keep], **extra,
    )  # fmt: skip
    if not votes:
        table, shared = drop_shared(table)
        dropped["training pairs whose text is held out too"] = shared
    dropped = {reason: n for reason, n in dropped.items() if n}
    check_parts(table, dropped)
    return table, dropped, votes


def check_parts(table: PairTable, dropped: dict) -> None:
    """Refuse a division that leaves nobody to learn from or to test on.

    Raises:
        ValueError: naming the part that is empty, or whose pairs all weigh nothing.
    """
    meaning = {
        "seen_train": "training pairs of seen people, from which the basis is learned",
        "seen_heldout": "held-out pairs of seen people",
        "unseen_train": "pairs that unseen people show",
        "unseen_heldout": "held-out pairs of unseen people",
    }
    counts = table.counts()
    for name, part in counts.items():
        if not part["pairs"]:
            raise ValueError(
                f"there are no {meaning[name]}: {len(table.users)} people with "
                f"{ {n: p['pairs'] for n, p in counts.items()} } pairs (dropped: "
                f"{dropped}). More people, more prompts or groups a person, or other "
                "--seen-share, --heldout-share and --seed are needed"
            )
        seen, heldout = name.startswith("seen"), name.endswith("heldout")
        mask = table.mask(seen=seen, heldout=heldout)
        if table.weight is not None and not table.weight[mask].any():
            raise ValueError(f"every weight of the {meaning[name]} is 0")


def units_and_groups(columns: dict[str, list]):
    """(what no split cuts, the judgements), list[str] each, or None without both.

    A judgement is a group within a unit, so groups may be numbered anew in each.
    """
    found = [columns.get("prompt"), columns.get("group")]
    prompt, group = (n if n is None else list(map(str, n)) for n in found)
    if prompt is None or group is None:
        unit = prompt if group is None else group
        return unit, unit
    pairs = set(zip(prompt, group))
    unit = group if len(pairs) == len(set(prompt)) else prompt
    return unit, [f"{place}/{name}" for place, name in zip(unit, group)]


def hold_out_units(user, unit: list[str], share: float, seed: int) -> set[str]:
    """Held-out units, so that everybody has about the same share of theirs."""
    mine: dict[str, set] = {}
    for name, place in zip(user, unit):
        mine.setdefault(str(name), set()).add(place)
    side: dict[str, bool] = {}
    for name in stable_order(mine, seed):
        known = sum(side.get(place, False) for place in mine[name])
        open_ = stable_order([p for p in mine[name] if p not in side], seed)
        wanted = round(share * len(mine[name]))
        if len(mine[name]) > 1:
            wanted = min(max(wanted, 1), len(mine[name]) - 1)
        for place, name_of_unit in enumerate(open_):
            side[name_of_unit] = place < wanted - known
    return {name for name, held in side.items() if held}


def hold_out_rows(user, chosen, rejected, share: float, seed: int):
    """(held out, mixed), bool[N]: sides are drawn for every (user, row)."""
    pairs = np.stack([chosen, rejected])
    people = np.unique(user, return_inverse=True)[1]
    key = people.astype(np.int64) * (int(pairs.max()) + 1) + pairs
    distinct, place = np.unique(key, return_inverse=True)
    side = (rng("rows", seed).random(len(distinct)) < share)[place.reshape(key.shape)]
    return side.all(0), side.any(0) & ~side.all(0)


def main(argv=None) -> list[dict]:
    """Command line."""
    parser = prepare.make_parser(__doc__.splitlines()[0], "runs/mine")
    names = [action.dest for action in parser._actions if action.dest != "help"]
    for name in (
        "data",
        "data_revision",
        "leak_threshold",
    ):  # --data is FILE; cli has the other, too
        prepare.drop_flag(parser, name)
    cli.add_flags(parser)
    add = parser.add_argument
    add("file", type=Path, help=".parquet, .csv, .tsv, .jsonl or .json, also .gz")
    for name in (*NEEDED, *OPTIONAL):
        add(f"--{name}-column", metavar="NAME", help=f"what FILE calls {name}")
    add("--encoding", help="of a text file; default UTF-8")
    add("--embeddings", type=Path, help="ready features: .npy or .safetensors")
    add("--tensor", help="name of the tensor in a safetensors file")
    add("--head", type=Path, help=".npy, float[D]: a reference direction")
    add("--seen-share", type=prepare.share, default=0.8, help="of the people")
    add(
        "--heldout-share", type=prepare.share, default=0.3, help="of everybody's groups"
    )
    args = cli.parse(parser, argv)
    if args.embeddings is not None and args.texts_only:
        parser.error("--texts-only: with --embeddings there are no texts")
    if args.embeddings is None and (args.tensor or args.head):
        parser.error("--tensor and --head belong to --embeddings")
    prepare_table(args, [*names, "seen_share", "heldout_share"])
    args.data = [args.out / "prepared"]
    if args.texts_only:
        print(f"pairs and leak checks are in {args.data[0]}; no features were made")
        return []
    return [*cli.train(args), *cli.fewshot(args)]


def prepare_table(args: argparse.Namespace, names: list[str]) -> None:
    """Write the prepared folder of a table, or continue it."""
    called = {n: getattr(args, f"{n}_column", None) for n in (*NEEDED, *OPTIONAL)}
    called = {name: other for name, other in called.items() if other is not None}
    encoding = getattr(args, "encoding", None)
    columns = read_table(args.file, called, encoding or "utf-8")
    texts = TextIndex()
    known = {name: getattr(args, name) for name in names if name in args}
    mine = argparse.Namespace(**known, file=str(args.file.resolve().name))
    mine.data, mine.out = args.file, args.out / "prepared"
    features = head = None
    mine.embeddings, mine.tensor, mine.head = None, args.tensor, None
    mine.columns, mine.encoding = called or None, encoding
    if args.embeddings is None:
        try:
            columns = text_rows(columns, texts)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{args.file}, {error}") from error
    else:
        features = read_embeddings(args.embeddings, args.tensor)
        mine.embeddings = f"{args.embeddings.name} {hash_array(features)}"
        if args.head is not None:
            head = read_head(args.head, features, args.embeddings)
            mine.head = f"{args.head.name} {hash_array(head)}"
    num_rows = None if features is None else len(features)
    columns = check_columns(columns, args.file, num_rows)
    table, dropped, votes = build(
        columns,
        seed=args.seed,
        seen_share=args.seen_share,
        heldout_share=args.heldout_share,
    )
    people = {True: "seen", False: "unseen"}
    for seen, what in people.items():
        if (number := int((table.seen == seen).sum())) == 1:
            prepare.say(
                f"only {number} person is {what}: intervals over people say nothing"
            )
    facts = {"shots": "pairs", "shot_counts": [0, 1, 3, 5, 10]}
    facts |= {"ranks": [0, 1, 2, 3, 5], "variants": [None]}
    facts |= {"judgements": "votes" if votes else "groups"}
    prepare.start(mine, "table", **facts)
    if features is None:
        prepare.finish(mine, texts, {None: table}, dropped)
        return
    prepare.say(f"{len(features)} embeddings, {len(table)} pairs")
    prepare.say_dropped(dropped)
    if not len(table):
        raise ValueError(f"no pairs are left; dropped: {dropped}")
    write_features(mine.out, np.asarray(features), head)
    table.save(mine.out / "pairs.npz")
    report = {"dropped": dropped, "counts": {"None": table.counts()}}
    report["leaks"] = check_leaks(load(mine.out))
    write_json(mine.out / "report.json", report)


if __name__ == "__main__":
    main()
