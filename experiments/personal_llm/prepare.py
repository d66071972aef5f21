"""Prepare PersonalLLM: ``namkoong-lab/PersonalLLM``.

Every prompt has 8 responses, each judged by 10 reward models. A simulated user is a
Dirichlet(α) mixture of the ten; a pair is the user's best response against the worst.
Seen users get pairs on a few of the train prompts to fit the basis, unseen users on
fewer still to adapt; everybody is evaluated on all test prompts. All users and every α
share one feature table. A unit, and a group, is a prompt.
"""

from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np

from experiments.prepare import finish, make_parser, pin_data, read_rows, start
from experiments.prepared import PairTable, digest, drop_shared, rng
from experiments.stored import write_arrays
from experiments.texts import TextIndex
from lore_jax.data import dirichlet_users, simulate_choices

SOURCE = "namkoong-lab/PersonalLLM"
NUM_RESPONSES = 8
REWARD_MODELS = (
    *("gemma_2b", "gemma_7b", "mistral_raft", "mistral_ray", "mistral_weqweasdas"),
    *("llama3_sfairx", "oasst_deberta_v3", "beaver_7b", "oasst_pythia_1b"),
    "oasst_pythia_7b",
)


def read_prompts(
    rows: Iterable[Mapping], split: str, texts: TextIndex, limit: int | None = None
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Rows of one split → prompts, rows of their responses, rewards.

    Args:
        rows: prompt, response_1 … response_8, response_1_gemma_2b, ….
        split: its name, for errors.
        texts: gets the responses.
        limit: read only the first so many.

    Returns:
        Prompt ids [R] (equal for equal prompts), text rows int32[R, 8] and rewards
        float64[R, 8, 10].

    Raises:
        ValueError: naming a column that is missing or a cell that has no number.
        TypeError: if a prompt or response is not a string, naming the row.
    """
    ids, places, rewards = [], [], []
    for number, row in enumerate(rows):
        if number == limit:
            break
        where = f"{SOURCE}, {split}, row {number}"
        if missing := [name for name in expected_columns() if name not in row]:
            raise ValueError(f"{where}: missing columns {missing}")
        for name in ("prompt", *_responses()):
            if not isinstance(row[name], str):
                raise TypeError(
                    f"{where}: {name} must be a string, got {type(row[name]).__name__}"
                )
        ask = {"role": "user", "content": row["prompt"].strip()}
        judged, found = [], []
        for name in _responses():
            answer = {"role": "assistant", "content": row[name].strip()}
            found.append(texts.add([ask, answer], f"{where}, {name}"))
            judged.append([row[f"{name}_{model}"] for model in REWARD_MODELS])
        values = np.array(judged, dtype=object)
        values = np.where(values == None, np.nan, values).astype(np.float64)  # noqa: E711
        if (bad := np.argwhere(~np.isfinite(values))).size:
            response, model = bad[0]
            raise ValueError(
                f"{where}: no number in response_{response + 1}_{REWARD_MODELS[model]}"
            )
        ids.append(digest(ask["content"])[:16])
        places.append(found)
        rewards.append(values)
    if not ids:
        raise ValueError(f"{SOURCE}, {split}: no rows")
    return ids, np.array(places, np.int32), np.stack(rewards)


def expected_columns() -> list[str]:
    """The columns that a row must have."""
    rewards = [f"{name}_{model}" for name in _responses() for model in REWARD_MODELS]
    return ["prompt", *_responses(), *rewards]


def build(
    places: Mapping[str, np.ndarray], ids: Mapping[str, Sequence[str]],
    rewards: Mapping[str, np.ndarray], *, alpha: float, seed: int = 0,
    seen_users: int = 1000, unseen_users: int = 500, seen_share: float = 0.005,
    unseen_share: float = 0.001,
) -> tuple[PairTable, np.ndarray, dict]:  # fmt: skip
    """One population's pairs.

    Args:
        places: "train" and "test": text rows int[R, 8].
        ids: prompt ids of both splits.
        rewards: judgements float[R, 8, J] of both splits.
        alpha: concentration of the Dirichlet the users' mixtures come from.
        seed: decides mixtures and prompts.
        seen_users: how many.
        unseen_users: how many.
        seen_share: share of the train prompts that a seen user judges, at least one.
        unseen_share: the same for an unseen user.

    Returns:
        The pairs, the users' true mixtures float[U, J] in the order of the table's
        user ids, and what was dropped.
    """
    generator = rng("personal_llm", seed, float(alpha))
    total, models = seen_users + unseen_users, rewards["train"].shape[-1]
    key = jax.random.key(int(generator.integers(2**31)))
    weights = np.asarray(dirichlet_users(key, total, alpha, models))
    prompts = len(ids["train"])
    shares = np.where(np.arange(total) < seen_users, seen_share, unseen_share)
    asked = [
        generator.choice(prompts, max(1, round(share * prompts)), replace=False)
        for share in shares
    ]
    parts: list[dict] = []
    for split in ("train", "test"):
        judged = rewards[split].astype(np.float32)
        best, worst = map(np.asarray, simulate_choices(judged, weights))
        for user in range(total):
            some = asked[user] if split == "train" else np.arange(len(ids["test"]))
            parts.append(
                {
                    "user": np.full(len(some), user),
                    "prompt": some,
                    "chosen": places[split][some, best[user, some]],
                    "rejected": places[split][some, worst[user, some]],
                    "heldout": np.full(len(some), split == "test"),
                }
            )
    columns = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
    ties = columns["chosen"] == columns["rejected"]
    columns = {name: column[~ties] for name, column in columns.items()}
    all_ids = np.array([*ids["train"], *ids["test"]])
    prompt = all_ids[columns["prompt"] + columns["heldout"] * prompts]
    names = np.array([f"user_{u:0{len(str(total))}d}" for u in range(total)])
    table = PairTable.from_columns(
        user=names[columns["user"]],
        unit=prompt,
        group=prompt,
        chosen=columns["chosen"],
        rejected=columns["rejected"],
        seen=columns["user"] < seen_users,
        heldout=columns["heldout"],
    )
    table, shared = drop_shared(table)
    dropped = {"best and worst are the same text": int(ties.sum())}
    dropped["training pairs on a test prompt"] = shared
    return table, weights[np.isin(names, table.users)], dropped


def main(argv=None) -> dict:
    """Command line."""
    parser = make_parser(__doc__.splitlines()[0], "prepared/personal_llm")
    add = parser.add_argument
    add("--alphas", type=float, nargs="+", default=[0.1, 1.0, 10.0])
    add("--seen-users", type=int, default=1000)
    add("--unseen-users", type=int, default=500)
    add("--seen-share", type=float, default=0.005, help="of the train prompts")
    add("--unseen-share", type=float, default=0.001, help="of the train prompts")
    add("--limit", type=int, help="read only so many prompts of each split")
    args = parser.parse_args(argv)
    pin_data(args, SOURCE)
    variants = {alpha: f"alpha_{alpha:g}" for alpha in args.alphas}
    start(
        args,
        "personal_llm",
        shots="pairs",
        shot_counts=[1, 3, 5, 9],
        ranks=[0, 1, 2, 4, 6, 8, 10],
        variants=list(variants.values()),
    )
    texts = TextIndex()
    ids, places, rewards = {}, {}, {}
    for split in ("train", "test"):
        rows = read_rows(SOURCE, None, split, args.data, args.data_revision)
        found = read_prompts(rows, split, texts, args.limit)
        ids[split], places[split], rewards[split] = found
    tables, mixtures, dropped = {}, {}, {}
    for alpha, name in variants.items():
        tables[name], mixtures[name], lost = build(
            places, ids, rewards, alpha=alpha, seed=args.seed,
            seen_users=args.seen_users, unseen_users=args.unseen_users,
            seen_share=args.seen_share, unseen_share=args.unseen_share,
        )  # fmt: skip
        dropped.update({f"{name}: {reason}": n for reason, n in lost.items() if n})
    write_arrays(
        args.out / "rewards.npz",
        models=np.array(REWARD_MODELS),
        **{f"rows_{split}": places[split] for split in places},
        **{f"rewards_{split}": rewards[split] for split in rewards},
        **{f"mixtures_{name}": value for name, value in mixtures.items()},
    )
    return finish(args, texts, tables, dropped)


def _responses() -> list[str]:
    return [f"response_{i}" for i in range(1, NUM_RESPONSES + 1)]


if __name__ == "__main__":
    main()
