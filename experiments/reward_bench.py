"""RewardBench 2 (``allenai/reward-bench-2``) with the directions that were learned.

Every completion is embedded once; then the base reward head, each direction, the
population's mixture and given users' mixtures are scored on the same features.

White space around prompts and completions is cut, as chat templates do: texts that only
it tells apart are one text, with one reward. So a wrong completion that equals the
right one ties with it, and is counted like any other tie.

A prompt of five of the six subsets has one right completion and three wrong ones. It
counts 1 if the right one scores highest, and 1/n if it shares the top with n − 1
others. The subset "Ties" pairs prompts: ``ref:N`` has one right completion, ``tied:N``
has several that are equally right. With the gap of a prompt (worst right minus best
wrong) and the spread of its right ones (best minus worst), its score is

    0.3 · share of tied prompts with gap > 0      + 0.3 · share of ref prompts likewise
  + 0.2 · share of N with tied gap > tied spread
  + 0.2 · share of N with min(tied gap, ref gap) > tied spread
  + 0.01 · mean of tanh(min(tied gap, ref gap) / tied spread − 1), 0 where undefined,

the last three over the N that have both prompts. The total is the mean of the subsets.

References:
    Malik et al., RewardBench 2, 2025 (https://arxiv.org/abs/2506.01937), and the
    benchmark's own scoring (https://github.com/allenai/reward-bench).
"""

import argparse
import collections
import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

import lore_jax as lore
from experiments.embed import RewardModel, embed_texts, is_complete
from experiments.prepare import (
    drop_flag,
    embed_config,
    make_parser,
    pin_data,
    read_rows,
    say,
    start,
)
from experiments.prepared import versions
from experiments.stored import load_array, load_features, replacing, write_json
from experiments.texts import TextIndex

SOURCE = "allenai/reward-bench-2"
TIES = "ties"


class Prompt(NamedTuple):
    """One prompt of the benchmark.

    Attributes:
        id: its name; "ref:N" or "tied:N" among the ties.
        subset: where it belongs.
        rows: int[C] rows of its completions, the right ones first.
        num_correct: how many are right.
    """

    id: str
    subset: str
    rows: np.ndarray
    num_correct: int


def read_prompts(rows: Iterable[Mapping], texts: TextIndex) -> list[Prompt]:
    """Rows of the source → prompts; ``texts`` gets the completions.

    Raises:
        TypeError: if a prompt or completion is not a string, naming the row.
        ValueError: if a prompt lacks right or wrong completions.
    """
    prompts = []
    for number, row in enumerate(rows):
        where = f"{SOURCE}, row {number} ({row['id']})"
        if not row["chosen"] or not row["rejected"]:
            raise ValueError(f"{where}: needs right and wrong completions")
        for side in ("chosen", "rejected"):
            if isinstance(row[side], str):
                raise TypeError(f"{where}: {side} must be a list of strings")
        found = [
            texts.add(
                [
                    {"role": "user", "content": stripped(row["prompt"])},
                    {"role": "assistant", "content": stripped(text)},
                ],
                where,
            )
            for text in (*row["chosen"], *row["rejected"])
        ]
        subset, size = str(row["subset"]), len(row["chosen"])
        prompts.append(Prompt(str(row["id"]), subset, np.array(found), size))
    return prompts


def stripped(text):
    """A text without the white space around it; what is no text stays as it is."""
    return text.strip() if isinstance(text, str) else text


def score_best(scores: np.ndarray) -> float:
    """1 if the right completion, the first, is on top; shared with who else is there.

    Args:
        scores: float[C], the right one first.
    """
    top = np.flatnonzero(scores == scores.max())
    return float((0 in top) / len(top))


def score_ties(scores: Mapping[str, tuple[np.ndarray, int]]) -> float:
    """The score of the ties; see the module docstring.

    Args:
        scores: {"ref:N" or "tied:N": (float[C] right ones first, how many are right)}.

    Raises:
        ValueError: if no N has both prompts.
    """
    gaps: dict[str, dict] = {"ref": {}, "tied": {}}
    spreads = {}
    for name, (values, size) in scores.items():
        kind, _, number = name.partition(":")
        if kind not in gaps:
            raise ValueError(
                f"a prompt of the ties must be ref:N or tied:N, got {name}"
            )
        gaps[kind][number] = values[:size].min() - values[size:].max()
        if kind == "tied":
            spreads[number] = np.ptp(values[:size])
    both = sorted(set(gaps["ref"]) & set(gaps["tied"]))
    if not both:
        raise ValueError("no prompt of the ties has both its ref and its tied form")
    right = [np.mean([gap > 0 for gap in gaps[kind].values()]) for kind in gaps]
    spread = np.array([spreads[number] for number in both])
    tied = np.array([gaps["tied"][number] for number in both])
    hard = np.minimum(tied, [gaps["ref"][number] for number in both])
    with np.errstate(divide="ignore", invalid="ignore"):
        extra = np.nan_to_num(np.tanh(hard / spread - 1), nan=0.0)
    margins = 0.2 * np.mean(tied > spread) + 0.2 * np.mean(hard > spread)
    return float(0.3 * sum(right) + margins + 0.01 * np.mean(extra))


def evaluate(prompts: Sequence[Prompt], rewards: np.ndarray) -> dict[str, float]:
    """Score per subset, and their mean, of rewards float[M]."""
    subsets: dict = collections.defaultdict(list)
    for prompt in prompts:
        subsets[prompt.subset].append(prompt)
    out = {}
    for name, some in sorted(subsets.items()):
        if name.lower() == TIES:
            scores = {p.id: (rewards[p.rows], p.num_correct) for p in some}
            out[name] = score_ties(scores)
        else:
            values = [score_best(rewards[p.rows]) for p in some]
            out[name] = float(np.mean(values))
    out["mean"] = float(np.mean(list(out.values())))
    return out


def columns(
    fitted: lore.Fitted | None, head, users: Sequence[str] = ()
) -> dict[str, np.ndarray]:
    """{name: float[D]} what is scored: all are directions on raw features.

    Args:
        fitted: a fit, or None for the head alone.
        head: float[D] base reward head, or None.
        users: ids (or numbers, where the fit has no ids) of seen users.

    Raises:
        ValueError: naming a user whom the fit does not know.
    """
    out = {} if head is None else {"base reward head": np.asarray(head)}
    if fitted is None:
        return out
    basis, weights = np.asarray(fitted.model.basis), np.asarray(fitted.weights)
    out |= {f"direction {k}": basis[:, k] for k in range(basis.shape[1])}
    out["population mixture"] = basis @ np.asarray(fitted.model.prior.mean)
    known = fitted.user_ids
    names = range(len(weights)) if known is None else known
    place = {str(name): number for number, name in enumerate(names)}
    for user in users:
        if user not in place:
            raise ValueError(f"the fit knows no user {user!r}")
        out[f"user {user}"] = basis @ weights[place[user]]
    return out


def main(argv=None) -> dict:
    """Command line; returns {reward: {subset: score}}, empty with ``--texts-only``."""
    parser = make_parser(__doc__.splitlines()[0], "runs/reward_bench")
    add = parser.add_argument
    add("--fit", type=Path, help="a fit: runs/NAME/fits/….safetensors")
    add("--users", nargs="*", default=[], help="ids of seen users to score too")
    drop_flag(parser, "leak_threshold")  # there are no preferences to check here
    args = parser.parse_args(argv)
    if args.texts_only and args.fit is not None:
        parser.error("--texts-only: nothing is scored, so --fit has no use")
    pin_data(args, SOURCE)
    known = argparse.Namespace(**vars(args))
    del known.fit, known.users  # the embeddings do not depend on these
    known.out = args.out / "prepared"
    start(known, "reward_bench", variants=[])
    texts = TextIndex()
    prompts = read_prompts(
        read_rows(SOURCE, None, "test", args.data, args.data_revision), texts
    )
    if args.texts_only:
        texts.save(known.out / "texts.jsonl")
        say(f"{len(prompts)} prompts, {len(texts)} texts; no features were made")
        return {}
    config = embed_config(args)
    if not is_complete(known.out, config, texts):
        reward = RewardModel.load(config)
        texts.save(known.out / "texts.jsonl")
        embed_texts(reward, texts, known.out)
    features, head = load_features(known.out), load_array(known.out / "head.npy")
    fitted = None if args.fit is None else lore.load(args.fit)
    found = columns(fitted, head, args.users)
    source = lore.ArraySource(features)
    rewards = lore.project(source, np.stack(list(found.values()), 1).astype(np.float32))
    table = {name: evaluate(prompts, rewards[:, i]) for i, name in enumerate(found)}
    write(args.out, table, {"fit": str(args.fit), "prompts": len(prompts)})
    return table


def write(out: Path, table: Mapping[str, Mapping[str, float]], facts: Mapping) -> None:
    """Write JSON, CSV and a table in %, and print the table."""
    subsets = list(next(iter(table.values())))
    results = {"table": table, **facts, "versions": versions()}
    write_json(out / "reward_bench.json", results)
    with replacing(out / "reward_bench.csv") as temporary:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(["reward", *subsets])
            for name, values in table.items():
                rows.writerow([name, *(values[subset] for subset in subsets)])
    lines = [["reward", *subsets], ["---"] * (len(subsets) + 1)]
    for name, values in table.items():
        lines.append([name, *(f"{100 * values[subset]:.1f}" for subset in subsets)])
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    with replacing(out / "reward_bench.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
