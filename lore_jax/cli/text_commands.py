"""Commands over texts, of the extra `hf`: embed, export."""

from typing import Annotated

import numpy as np
import typer

import lore_jax as lore
from lore_jax import hf
from lore_jax.cli import inputs
from lore_jax.cli.options import (
    Chat,
    ChosenColumn,
    Encoding,
    GroupColumn,
    Json,
    KindOption,
    LabelColumn,
    Model,
    Path,
    Progress,
    PromptColumn,
    RejectedColumn,
    ResponseColumn,
    UserColumn,
    UsersFile,
    WeightColumn,
    option,
    source_of,
    weights_of,
)
from lore_jax.cli.output import report, to_json
from lore_jax.cli.tables import read_table
from lore_jax.io import files


def embed(
    table: Annotated[
        Path,
        typer.Argument(
            metavar="TABLE",
            help="Pairs of texts (user, chosen, rejected), or texts (response).",
            show_default=False,
        ),
    ],
    model: Annotated[
        str, option("--model", help="A name on the hub or a folder.", metavar="NAME")
    ],
    out: Annotated[
        Path,
        option("--out", help="Folder of the embeddings; continued where it is begun."),
    ],
    kind: KindOption = None,
    chat: Chat = False,
    user_column: UserColumn = None,
    chosen_column: ChosenColumn = None,
    rejected_column: RejectedColumn = None,
    prompt_column: PromptColumn = None,
    group_column: GroupColumn = None,
    label_column: LabelColumn = None,
    weight_column: WeightColumn = None,
    response_column: ResponseColumn = None,
    encoding: Encoding = "utf-8",
    progress: Progress = None,
    as_json: Json = False,
) -> None:
    """Embeds the texts of a table once, so that later commands need no model.

    Writes features.npy, and the table with row numbers instead of texts: pairs.jsonl
    or responses.jsonl.
    """
    source = source_of({**locals(), "folder": out})
    optional = ("user", "chosen", "rejected", "prompt", "group", "label", "weight")
    columns = read_table(
        table, source.columns, encoding, needed=(), optional=(*optional, "response")
    )
    if "response" in columns:
        texts = inputs.response_texts(table, columns, chat)
        rows = {"response": np.arange(len(texts)), "user": columns.get("user")}
    else:
        if missing := [x for x in ("user", "chosen", "rejected") if x not in columns]:
            raise ValueError(f"{table}: missing columns {missing}, or response")
        pairs = inputs.read_texts(table, columns, chat)
        texts = pairs.texts
        rows = {"user": pairs.user, "chosen": pairs.chosen, "rejected": pairs.rejected}
        rows |= {"label": pairs.label, "weight": pairs.sample_weight}
        rows |= {"group": pairs.group}
    found = inputs.embed(texts, source)
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "features.json").exists():  # Sentence models keep no folder.
        with files.replacing(out / "features.npy") as temporary:
            with open(temporary, "wb") as file:
                np.save(file, found)
    plain = {name: np.asarray(x).tolist() for name, x in rows.items() if x is not None}
    path = out / ("responses.jsonl" if "response" in rows else "pairs.jsonl")
    with files.replacing(path) as temporary:
        lines = (to_json(dict(zip(plain, x))) + "\n" for x in zip(*plain.values()))
        temporary.write_text("".join(lines), encoding="utf-8")
    result = {"features": out / "features.npy", "table": path}
    result |= {"texts": len(texts), "width": int(found.shape[1])}
    typer.echo(report(result, as_json))


def export(
    fitted: Model,
    base: Annotated[
        str, option("--base", help="The embedding model of the fit.", metavar="NAME")
    ],
    out: Annotated[Path, option("--out", help="New folder to write.")],
    user: Annotated[
        str | None, option("--user", help="One output for this user; default K.")
    ] = None,
    users: UsersFile = None,
    licence: Annotated[
        str | None, option("--licence", help="For the model card, such as apache-2.0.")
    ] = None,
    data: Annotated[
        str | None, option("--data", help="For the model card: the training data.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Writes a reward model of transformers, with K outputs or one user's output."""
    found = lore.load(fitted)
    weights = weights_of(found, users)
    name = None if user is None else inputs.like([user], weights.user_ids)[0].item()
    written = hf.export_head(
        found.model,
        base,
        path=out,
        user=name,
        users=weights,
        licence=licence,
        data=data,
    )
    outputs = found.model.rank if user is None else 1
    typer.echo(report({"folder": written, "outputs": outputs}, as_json))
