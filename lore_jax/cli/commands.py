"""Commands over features: quickstart, fit, adapt, score, evaluate."""

import logging
import time
from typing import Annotated, Any

import jax
import numpy as np
import typer

import lore_jax as lore
from lore_jax._ids import Ids
from lore_jax.cli import inputs, quickstart
from lore_jax.cli.options import (
    SEEDS,
    Chat,
    ChosenColumn,
    Embedder,
    Encoding,
    Features,
    Folder,
    GroupColumn,
    Holdout,
    ItemColumn,
    Items,
    Json,
    KindOption,
    LabelColumn,
    MethodName,
    Model,
    Pairs,
    Path,
    Progress,
    PromptColumn,
    RecipeName,
    RejectedColumn,
    ResponseColumn,
    Tensor,
    UserColumn,
    UsersFile,
    WeightColumn,
    option,
    source_of,
    weights_of,
)
from lore_jax.cli.output import check_out, report, to_json
from lore_jax.cli.users import ENDINGS, UserWeights, write_table, write_users
from lore_jax.model import prior_of

_log = logging.getLogger(__name__)
_OUT = Path("runs/quickstart")


def quickstart_command(
    splits: Annotated[int, option("--splits", help="How many splits.")] = 4,
    rank: Annotated[int, option("--rank", help="Shared directions K ≥ 2.")] = 2,
    out: Annotated[Path, option("--out", help="Folder of JSON and figures.")] = _OUT,
    as_json: Json = False,
) -> None:
    """Compares five methods on real votes: two tables, JSON and figures.

    The data come with the package. Four splits take some ten minutes on two cores.
    """
    say = _log.info if as_json else typer.echo
    result = quickstart.run(splits, rank, out, say)
    if as_json:
        typer.echo(to_json(result))


def fit(
    pairs: Pairs,
    out: Annotated[Path, option("--out", help="Model to write, .safetensors.")],
    features: Features = None,
    items: Items = None,
    model: Embedder = None,
    rank: Annotated[
        str, option("--rank", help="Shared directions K, or auto.", metavar="K|auto")
    ] = "auto",
    recipe: Annotated[
        RecipeName, option("--recipe", help="Default, or a published one.")
    ] = RecipeName.default,
    holdout: Annotated[
        Holdout | None,
        option(
            "--holdout",
            help="Of the default recipe: choose settings on held-out judgements of "
            "known items, on held-out items, or on both (default).",
        ),
    ] = None,
    temperature: Annotated[
        float | None, option("--temperature", help="T; default the recipe's.")
    ] = None,
    steps: Annotated[
        int | None, option("--steps", help="Steps; default the recipe's.")
    ] = None,
    seed: Annotated[int, option("--seed", help="Of all that is random.", **SEEDS)] = 0,
    tensor: Tensor = None,
    item_column: ItemColumn = "item",
    kind: KindOption = None,
    chat: Chat = False,
    folder: Folder = None,
    user_column: UserColumn = None,
    chosen_column: ChosenColumn = None,
    rejected_column: RejectedColumn = None,
    prompt_column: PromptColumn = None,
    group_column: GroupColumn = None,
    label_column: LabelColumn = None,
    weight_column: WeightColumn = None,
    encoding: Encoding = "utf-8",
    progress: Progress = None,
    as_json: Json = False,
) -> None:
    """Learns the shared directions, the prior over users, and the users' weights."""
    check_out(out, (".safetensors",))
    chosen_rank = _rank(rank)
    chosen_recipe = _recipe(recipe, holdout, temperature, steps)
    source = source_of(locals())
    prefs = inputs.read_pairs(pairs, source)
    _log.info("fit: %d pairs of %d users", prefs.num_pairs, prefs.num_users)
    start = time.perf_counter()
    fitted = lore.fit(
        prefs,
        rank=chosen_rank,
        key=jax.random.key(seed),
        recipe=chosen_recipe,
        progress=source.progress,
    )
    seconds = time.perf_counter() - start
    lore.save(out, fitted)
    result = {
        "model": out,
        "rank": fitted.model.rank,
        "temperature": float(fitted.model.temperature),
        "users": prefs.num_users,
        "pairs": prefs.num_pairs,
        "features": prefs.num_features,
        "seconds": seconds,
    }
    for row in fitted.history.heldout:
        result[f"heldout_{row['holdout']}"] = {
            name: row[name]
            for name in ("log_loss", "global_log_loss", "gain", "standard_error")
        }
    typer.echo(report(result, as_json))


def adapt(
    fitted: Model,
    pairs: Pairs,
    out: Annotated[
        Path, option("--out", help="Weights to write: .safetensors, .csv, .parquet.")
    ],
    features: Features = None,
    items: Items = None,
    model: Embedder = None,
    method: Annotated[
        MethodName,
        option("--method", help="Posterior mean, maximum likelihood, published Adam."),
    ] = MethodName.posterior,
    seed: Annotated[
        int, option("--seed", help="Of the published method.", **SEEDS)
    ] = 0,
    tensor: Tensor = None,
    item_column: ItemColumn = "item",
    kind: KindOption = None,
    chat: Chat = False,
    folder: Folder = None,
    user_column: UserColumn = None,
    chosen_column: ChosenColumn = None,
    rejected_column: RejectedColumn = None,
    prompt_column: PromptColumn = None,
    label_column: LabelColumn = None,
    weight_column: WeightColumn = None,
    encoding: Encoding = "utf-8",
    progress: Progress = None,
    as_json: Json = False,
) -> None:
    """Finds the weights of new users from few pairs, against a fitted model."""
    check_out(out, ENDINGS)
    found = lore.load(fitted)
    prefs = inputs.read_pairs(pairs, source_of(locals()))
    adapted = lore.adapt(found.model, prefs, method=_method(method, seed))
    write_users(out, adapted, prefs.counts, found.model)
    result = {
        "users_file": out,
        "users": prefs.num_users,
        "pairs": prefs.num_pairs,
        "converged": int(np.sum(adapted.converged)),
        "mean_weights": np.mean(adapted.weights, axis=0).tolist(),
    }
    typer.echo(report(result, as_json))


def score(
    fitted: Model,
    responses: Annotated[
        Path,
        typer.Argument(
            metavar="RESPONSES",
            help="Table with the column response, and optionally user and prompt.",
            show_default=False,
        ),
    ],
    user: Annotated[
        list[str] | None,
        option("--user", help="Score all for this user; may be repeated."),
    ] = None,
    users: UsersFile = None,
    top: Annotated[
        int | None, option("--top", help="Only the best ones of each user.")
    ] = None,
    out: Annotated[
        Path | None, option("--out", help="Table to write: .csv, .tsv or .parquet.")
    ] = None,
    features: Features = None,
    items: Items = None,
    model: Embedder = None,
    tensor: Tensor = None,
    item_column: ItemColumn = "item",
    kind: KindOption = None,
    chat: Chat = False,
    folder: Folder = None,
    user_column: UserColumn = None,
    response_column: ResponseColumn = None,
    prompt_column: PromptColumn = None,
    encoding: Encoding = "utf-8",
    progress: Progress = None,
    as_json: Annotated[
        bool, option("--json", help="A JSON object a line instead of columns.")
    ] = False,
) -> None:
    """Rewards of responses for users of the fit, or of lore adapt.

    Prints a line for every user and response: row of the table, user, score.
    """
    if out is not None:
        check_out(out, (".csv", ".tsv", ".parquet"))
    if top is not None and top < 1:
        raise ValueError(f"--top must be at least 1, got {top}")
    found = lore.load(fitted)
    weights = weights_of(found, users)
    given = inputs.read_responses(responses, source_of(locals()))
    place = np.arange(len(given.rows))
    if user:
        names = np.repeat(inputs.like(user, weights.user_ids), len(place))
        place = np.tile(place, len(user))
    elif given.user is not None:
        names = inputs.like(given.user, weights.user_ids)
    else:
        raise ValueError("give --user NAME, or a column user in the table")
    scores = np.asarray(
        lore.score_rows(found.model, weights, given.features, names, given.rows[place])
    )
    if top is not None:
        keep = _best(names, scores, top)
        names, scores, place = names[keep], scores[keep], place[keep]
    if out is not None:
        write_table(out, {"row": place, "user": names, "score": scores})
        typer.echo(report({"scores_file": out, "scores": len(scores)}, as_json))
        return
    for row, name, value in zip(place.tolist(), names.tolist(), scores.tolist()):
        if as_json:
            line = {"row": row, "user": name, "score": value}
            typer.echo(to_json({**line, "response": given.given[row]}))
        else:
            typer.echo(f"{row}\t{name}\t{value:.6g}")


def evaluate(
    fitted: Model,
    pairs: Pairs,
    users: UsersFile = None,
    features: Features = None,
    items: Items = None,
    model: Embedder = None,
    tensor: Tensor = None,
    item_column: ItemColumn = "item",
    kind: KindOption = None,
    chat: Chat = False,
    folder: Folder = None,
    user_column: UserColumn = None,
    chosen_column: ChosenColumn = None,
    rejected_column: RejectedColumn = None,
    prompt_column: PromptColumn = None,
    label_column: LabelColumn = None,
    weight_column: WeightColumn = None,
    encoding: Encoding = "utf-8",
    progress: Progress = None,
    as_json: Json = False,
) -> None:
    """Accuracy and log-loss on held-out pairs, beside the population's mean weights.

    Means over users, with 95 % bootstrap intervals over users in brackets.
    """
    found = lore.load(fitted)
    weights = weights_of(found, users)
    prefs = inputs.read_pairs(pairs, source_of(locals()))
    names: Any = prefs.user_ids
    own = inputs.like(names.tolist(), weights.user_ids)
    if (unknown := np.flatnonzero(~np.isin(own, weights.user_ids))).size:
        raise ValueError(
            f"{pairs}: user {own.tolist()[unknown[0]]!r} has no weights: run lore "
            "adapt on other pairs of these users, and give its file with --users"
        )
    prefs = prefs.replace(ids=Ids(own, prefs.item_ids))
    reward_model = found.model
    mean = prior_of(reward_model).mean
    everyone = UserWeights(np.tile(np.asarray(mean), (prefs.num_users, 1)), own)
    hits, losses = (
        [np.asarray(measure(reward_model, p, prefs)) for p in (weights, everyone)]
        for measure in (lore.accuracy, lore.log_loss)
    )
    interval = lore.evaluation.bootstrap_interval
    result = {
        "users": int(np.sum(~np.isnan(hits[0]))),
        "pairs": prefs.num_pairs,
        "accuracy": interval(hits[0]),
        "accuracy_of_mean_weights": interval(hits[1]),
        "accuracy_gain": lore.evaluation.paired_difference(*hits),
        "log_loss": interval(losses[0]),
        "log_loss_of_mean_weights": interval(losses[1]),
    }
    typer.echo(report(result, as_json))


def _rank(text: str) -> Any:
    if text == "auto":
        return text
    if not text.isdecimal() or int(text) == 0:
        raise ValueError(f"--rank must be a number of at least 1 or auto, got {text!r}")
    return int(text)


def _recipe(name: RecipeName, holdout, temperature, steps) -> Any:
    """The recipe with the given options; others keep its defaults."""
    given = {"temperature": temperature, "num_steps": steps}
    given = {key: x for key, x in given.items() if x is not None}
    if name == RecipeName.default:
        kinds = {} if holdout is None else {"holdout": holdout.value}
        return lore.Marginal(**given, search=lore.Search(**kinds))
    if holdout is not None:
        raise ValueError(f"--holdout belongs to --recipe default, not {name.value}")
    if name == RecipeName.joint:
        return lore.PublishedJoint(**given)
    return lore.PublishedAlternating(**given)


def _method(name: MethodName, seed: int) -> Any:
    if name == MethodName.posterior:
        return lore.PosteriorMean()
    if name == MethodName.likelihood:
        return lore.MaximumLikelihood()
    return lore.PublishedAdam(key=jax.random.key(seed))


def _best(names: np.ndarray, scores: np.ndarray, num: int) -> np.ndarray:
    """Places of the `num` best scores of each user, best first, users as they come."""
    places: dict[Any, list[int]] = {}
    for place in np.argsort(-scores, kind="stable").tolist():
        places.setdefault(names[place], []).append(place)
    order = dict.fromkeys(names.tolist())
    return np.array([place for name in order for place in places[name][:num]], int)
