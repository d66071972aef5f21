"""What the ``prepare`` scripts share: flags, reading a source, writing the folder."""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from experiments.embed import (
    DEFAULT_MODEL,
    EmbedConfig,
    RewardModel,
    embed_texts,
    is_complete,
)
from experiments.leaks import check_features, check_pairs
from experiments.prepared import PairTable, pairs_path, versions
from experiments.stored import load_features, read_json, write_json
from experiments.texts import TextIndex, load_responses

# Flags that say how to compute, not what: they may change between two runs.
RUNTIME = (
    *("out", "data", "device", "batch_tokens", "batch_size", "padding_side"),
    *("save_seconds", "texts_only", "leak_threshold"),
)


# Flags of the embedding: until it has begun they may change as well.
EMBEDDING = ("model", "revision", "model_dtype", "table_dtype", "max_length")


def share(text: str) -> float:
    """A share on the command line, strictly between 0 and 1."""
    if not 0 < (value := float(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, got {text}")
    return value


def positive(text: str) -> int:
    """A number on the command line, at least 1."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def make_parser(description: str, out: str) -> argparse.ArgumentParser:
    """A parser with the flags that every ``prepare`` has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path(out), help="folder to write or continue")
    add("--data", type=Path, help="read .jsonl or .parquet here, not from the hub")
    add("--data-revision", help="branch, tag or commit of the data set on the hub")
    add("--seed", type=int, default=0, help="decides every split and sample")
    add("--texts-only", action="store_true", help="pairs and text checks, no model")
    add("--leak-threshold", type=float, default=0.95, metavar="ACCURACY",
        help="stop if formatting alone tells chosen from rejected better than this",
    )  # fmt: skip
    model = parser.add_argument_group("embedding")
    add = model.add_argument
    add("--model", default=DEFAULT_MODEL, help="reward model: hub name or folder")
    add("--revision", help="branch, tag or commit of the model")
    add("--device", help="cuda, cpu, ...; by default a GPU if there is one")
    dtypes = ("bfloat16", "float32")
    add("--model-dtype", choices=dtypes, default="bfloat16", help="to compute in")
    add("--table-dtype", choices=dtypes, default="bfloat16", help="to store")
    add("--max-length", type=int, default=4096, help="tokens; longer: front cut")
    add("--batch-tokens", type=int, default=16384, help="tokens of a batch, padded")
    add("--batch-size", type=int, default=64, help="most texts in a batch")
    add("--padding-side", choices=("left", "right"), help="default: the tokenizer's")
    add("--save-seconds", type=float, default=30.0, help="between two markers")
    return parser


def drop_flag(parser: argparse.ArgumentParser, name: str) -> None:
    """Take a flag of :func:`make_parser` away, where it would mean nothing."""
    for action in list(parser._actions):
        if action.dest == name:
            parser._remove_action(action)
            for group in parser._action_groups:
                if action in group._group_actions:
                    group._group_actions.remove(action)
            for option in action.option_strings:
                del parser._option_string_actions[option]


def pin_data(args: argparse.Namespace, source: str) -> None:
    """Make ``--data-revision`` the commit that it names, so that it is recorded.

    A folder begun with one commit of the data set is not continued with another. Where
    the hub cannot be asked, the flag stays as it is, and that is said.
    """
    if args.data is not None:
        return
    if args.data_revision and re.fullmatch("[0-9a-f]{40}", args.data_revision):
        return
    import huggingface_hub

    try:
        found = huggingface_hub.HfApi().dataset_info(
            source, revision=args.data_revision
        )
    except Exception as error:  # Offline, say: the data may lie in the cache.
        say(f"the commit of {source} is not recorded, the hub did not say it: {error}")
        return
    args.data_revision = found.sha


def read_rows(
    source: str,
    config: str | None,
    split: str,
    data: Path | None,
    revision: str | None = None,
):
    """The rows of one split as dictionaries, from the hub or from a local folder.

    No code of the data set's repository runs.

    Args:
        source: data set name on the hub.
        config: its configuration, or None.
        split: its split.
        data: None for the hub; else a folder with ``CONFIG_SPLIT``, ``CONFIG`` or
            ``SPLIT`` as ``.jsonl`` or ``.parquet``.
        revision: branch, tag or commit on the hub.

    Raises:
        FileNotFoundError: if the folder has none of these, naming them.
        ValueError: if a file is damaged, naming it and the row.
    """
    if data is None:
        import datasets

        names = [config] if config else []
        return datasets.load_dataset(
            source, *names, split=split, revision=revision, trust_remote_code=False
        )
    stems = [f"{config}_{split}", config, split] if config else [split]
    for path in (data / f"{stem}{end}" for stem in stems for end in _READERS):
        if path.exists():
            return _READERS[path.suffix](path)
    raise FileNotFoundError(f"{data} has none of {stems} as .jsonl or .parquet")


def start(args: argparse.Namespace, dataset: str, **facts) -> dict:
    """Write ``config.json``, or check that the folder was begun with the same one.

    Args:
        args: the parsed flags.
        dataset: name of the data set.
        **facts: what later scripts need to know (ranks, shots, variants).

    Raises:
        ValueError: if the folder belongs to other arguments, naming them.
    """
    asked = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    config = {"dataset": dataset, "arguments": asked, "seed": args.seed, **facts}
    config = json.loads(json.dumps({**config, "versions": versions()}))
    path = args.out / "config.json"
    if path.exists():
        found = read_json(path).get("arguments", {})
        asked = config["arguments"]
        keys = (set(found) | set(asked)) - set(RUNTIME)
        if has_model_flags(args) and not (args.out / "features.json").exists():
            keys -= set(EMBEDDING)
        if changed := sorted(k for k in keys if found.get(k) != asked.get(k)):
            raise ValueError(
                f"{args.out} was begun with other arguments: "
                + ", ".join(f"{k} {found.get(k)!r} → {asked.get(k)!r}" for k in changed)
                + "; use another --out"
            )
    write_json(path, config)
    return config


def has_model_flags(args: argparse.Namespace) -> bool:
    """Whether the script embeds texts with the flags that ``make_parser`` adds."""
    return all(name in args for name in EMBEDDING)


def finish(
    args: argparse.Namespace,
    texts: TextIndex,
    tables: Mapping[str | None, PairTable],
    dropped: Mapping[str, int],
) -> dict:
    """Check the pairs, embed the texts, check the features, write everything.

    Args:
        args: the parsed flags.
        texts: the distinct texts.
        tables: pair table of every variant; the key is None where there is only one.
        dropped: what was left out, and how often.

    Returns:
        The report, as written to ``report.json``.

    Raises:
        LeakError: if a check fails. A folder that failed cannot be loaded.
    """
    if not len(texts) or not all(len(table) for table in tables.values()):
        raise ValueError(f"no pairs are left; dropped: {dict(dropped)}")
    report = {"texts": len(texts), "dropped": dict(dropped)}
    report["counts"] = {str(name): table.counts() for name, table in tables.items()}
    say(f"{len(texts)} texts, {sum(map(len, tables.values()))} pairs")
    say_dropped(dropped)
    plain = [messages[-1]["content"] for messages in texts.messages]
    report["leaks"] = _check(args, tables, plain)
    for name, table in tables.items():
        table.save(pairs_path(args.out, name))
    config = embed_config(args)
    if args.texts_only:
        texts.save(args.out / "texts.jsonl")
    elif not is_complete(args.out, config, texts):
        reward = RewardModel.load(config)
        responses = [reward.response(messages) for messages in texts.messages]
        texts.save(args.out / "texts.jsonl", responses)
        embed_texts(reward, texts, args.out)
    if not args.texts_only:
        responses = load_responses(args.out)
        if responses != plain:
            report["leaks"] = _check(args, tables, responses)
        check_features(load_features(args.out))
        report["leaks"]["features"] = "ok"
        report["embedding"] = read_json(args.out / "features.json")
    write_json(args.out / "report.json", report)
    say(f"wrote {args.out}")
    return report


def say(text: str) -> None:
    """Print to the standard error, at once."""
    print(text, file=sys.stderr, flush=True)


def say_dropped(dropped: Mapping[str, int]) -> None:
    """Print what was left out."""
    for reason, number in dropped.items():
        say(f"left out: {number} {reason}")


def embed_config(args: argparse.Namespace) -> EmbedConfig:
    """The embedding flags as a config."""
    names = (
        *("model", "revision", "device", "model_dtype", "table_dtype", "max_length"),
        *("batch_tokens", "batch_size", "padding_side", "save_seconds"),
    )
    return EmbedConfig(**{name: getattr(args, name) for name in names})


def _check(args, tables, responses) -> dict:
    """The leak checks on every variant."""
    thresholds = {
        "fail_above": args.leak_threshold,
        "warn_above": min(0.75, args.leak_threshold),
    }
    return {
        str(name): check_pairs(table, responses, **thresholds)
        for name, table in tables.items()
    }


def _jsonl(path: Path) -> Iterable[dict]:
    rows = []
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            for line in filter(str.strip, file):
                rows.append(json.loads(line))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}, row {len(rows)}: {error}") from error
    return rows


def _parquet(path: Path) -> Iterable[dict]:
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is no whole Parquet file: {error}") from error


_READERS = {".jsonl": _jsonl, ".parquet": _parquet}
