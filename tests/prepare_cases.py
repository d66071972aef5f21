"""Sources in the schema of the published ones."""

from fixtures import sources

SPLITS = ("train", "validation")


def tldr_splits(**changes):
    return {split: sources.tldr_rows(split, **changes) for split in SPLITS}


def write_prism(folder, *rows):
    rows = rows or sources.prism_rows()
    for name, part in zip(("conversations", "survey", "utterances"), rows):
        sources.write_jsonl(folder / f"{name}.jsonl", part)
