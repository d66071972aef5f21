"""Cells, splits, redraws, baselines and intervals of an evaluation."""

import csv
import json

import numpy as np
import pytest
from experiment_cases import MARKS, QUICK, write_prepared

import lore_jax as lore
from experiments import (
    baselines,
    cli,
    leaks,
    parts,
    result_tables,
    stored,
)
from experiments import prepared as prepared_data
from experiments.protocol import Cell, Run, Store, judge
from lore_jax.cli import intervals

pytestmark = MARKS


def test_finished_cells_are_not_computed_again(prepared, tmp_path, monkeypatch):
    argv = ["--data", str(prepared), "--out", str(tmp_path / "runs"), *QUICK]
    argv += ["--methods", "head", "alone"]
    parser = cli.make_parser("x", "y")
    (first,) = cli.train(cli.parse(parser, argv))
    cli.fewshot(cli.parse(parser, argv))
    monkeypatch.setattr(baselines.Recipe, "fit", None)
    monkeypatch.setattr(lore, "adapt", None)
    (again,) = cli.train(cli.parse(parser, argv))
    cli.fewshot(cli.parse(parser, argv))
    assert again["table"] == first["table"]
    with pytest.raises(TypeError):  # another seed is another cell
        cli.train(cli.parse(parser, [*argv, "--seeds", "1"]))


def test_variants_are_populations_or_splits(tmp_path):
    argv = ["--data", str(tmp_path / "p"), *QUICK, "--methods", "head", "--out"]
    for kind, number in (("populations", 2), ("splits", 1)):
        names = ["alpha_1", "alpha_10"]
        table = write_prepared(tmp_path / "p", variants=names, variants_are=kind)
        for name in names:
            table.save(prepared_data.pairs_path(tmp_path / "p", name))
        found = cli.train_main("x", "y", [*argv, str(tmp_path / kind)])
        assert len(found) == number
        rows = [row for results in found for row in results["table"]]
        assert {r["unseen_heldout"]["num_splits"] for r in rows} == {3 - number}
    assert (tmp_path / "populations/alpha_10/four_way.json").exists()
    write_prepared(tmp_path / "p", variants=names)
    with pytest.raises(ValueError, match="several populations"):
        parts.list_splits([tmp_path / "p"])


def test_other_data_are_other_cells(prepared, tmp_path):
    source = parts.list_splits([prepared])[0]
    recipe = baselines.Recipe("head", 0)
    store = Store(tmp_path / "runs")
    before = store.path("cells", Run(store, [source]).key(source, 0, recipe))
    write_prepared(prepared, seed=1)
    after = store.path("cells", Run(store, [source]).key(source, 0, recipe))
    assert before != after


def test_every_byte_of_features_and_head_is_in_the_fingerprint(prepared):
    (source,) = parts.list_splits([prepared])
    marks = [source.fingerprint()]
    assert marks[0] == source.fingerprint({})
    features, head = (np.load(prepared / f"{n}.npy") for n in ("features", "head"))
    for values in (features, head):
        values.flat[3] += 1e-3
        stored.write_features(prepared, features, head)
        marks.append(source.fingerprint())
    stored.write_features(prepared, features)
    marks.append(source.fingerprint())
    assert len(set(marks)) == 4
    values = np.arange(35, dtype=np.float32).reshape(7, 5)
    assert parts.hash_array(values, block=41) == parts.hash_array(values)
    assert parts.hash_array(values) != parts.hash_array(values.reshape(5, 7))


def test_tables_say_pairs_judgements_and_differences(tmp_path):
    table = write_prepared(tmp_path / "p")
    argv = ["--data", str(tmp_path / "p"), "--out", str(tmp_path / "runs"), *QUICK]
    argv += ["--methods", "global", "alone"]
    cli.train_main("x", "y", argv)
    (swept,) = cli.fewshot_main("x", "y", argv)
    count = table.counts()["unseen_heldout"]
    assert count["judgements"] < count["pairs"]
    for name in ("four_way", "fewshot"):
        text = (tmp_path / f"runs/{name}.md").read_text()
        line = [count[n] for n in ("users", "pairs", "judgements")]
        words = " | ".join(map(str, line))
        assert f"| prepared | unseen heldout | {words} |" in text
        with open(tmp_path / f"runs/{name}.csv", newline="") as file:
            rows = [
                r for r in csv.DictReader(file) if r["quantity"] == "unseen_heldout"
            ]
        assert {r["pairs"] for r in rows} == {str(count["pairs"])}
        assert {r["judgements"] for r in rows} == {str(count["judgements"])}
        assert all(r["difference"] for r in rows if r["method"] == baselines.ALONE)
    assert f"| {baselines.ALONE}: vs global |" in text
    assert "| pairs shown |  | 6 | 24 |" in text
    assert swept["shown"]["all"] == {"pairs": 24, "judgements": 12, "user_rows": 48}


def test_a_run_without_methods_is_an_error(prepared, tmp_path):
    stored.write_features(prepared, np.load(prepared / "features.npy"))
    argv = ["--data", str(prepared), "--out", str(tmp_path / "runs"), *QUICK]
    with pytest.raises(ValueError, match="no method is left"):
        cli.train_main("x", "y", [*argv, "--methods", "head"])


def test_config_file_sets_flags(prepared, tmp_path):
    path = tmp_path / "c.json"
    path.write_text(
        json.dumps({"ranks": [0, 3], "seeds": [4], "data": [str(prepared)]})
    )
    parser = cli.make_parser("x", "y")
    args = cli.parse(parser, ["--config", str(path), "--seeds", "7"])
    assert (args.ranks, args.seeds, args.data) == ([0, 3], [7], [prepared])
    path.write_text('{"rank": 3}')
    with pytest.raises(SystemExit):
        cli.parse(parser, ["--config", str(path)])


def test_users_are_numbered_alike_on_both_sides(prepared):
    split = parts.list_splits([prepared])[0].load()
    for first, second in (split.data[:2], split.data[2:]):
        np.testing.assert_array_equal(first.ids.users, second.ids.users)
    assert split.data.seen.num_users == 5
    assert split.counts["seen_training"]["judgements"] == 5 * 4
    assert split.counts["seen_training"]["pairs"] == 5 * 8


def test_redraws_move_people_but_no_pair(prepared):
    plain, redrawn = (s.read().pairs for s in parts.list_splits([prepared], splits=2))
    assert redrawn.seen.sum() == plain.seen.sum()
    assert (redrawn.seen != plain.seen).any()
    np.testing.assert_array_equal(redrawn.heldout, plain.heldout)
    leaks.check_split(redrawn)


def test_personal_llm_users_cannot_change_sides(tmp_path):
    write_prepared(tmp_path, dataset="personal_llm")
    assert len(parts.list_splits([tmp_path])) == 1
    with pytest.raises(ValueError, match="another --seed"):
        parts.list_splits([tmp_path], splits=2)


def test_redraws_keep_the_limit_of_unseen_people(tmp_path):
    table = write_prepared(tmp_path)
    training = table.mask(seen=False, heldout=False)
    few = table.select(~training | (np.arange(len(table)) % 2 == 0))
    redrawn = parts.redraw(few, 1)
    counts = np.bincount(redrawn.user[redrawn.mask(seen=False, heldout=False)])
    assert (
        counts.max() <= np.bincount(few.user[few.mask(seen=False, heldout=False)]).max()
    )


def test_shots_of_units_take_whole_units(tmp_path):
    write_prepared(tmp_path, shots="units")
    split = parts.list_splits([tmp_path])[0].load()
    one, two = (parts.take_shots(split, n, seed=3) for n in (1, 2))
    assert set(np.asarray(one.counts)) == {2}
    assert set(np.asarray(two.counts)) == {4}
    assert set(one.chosen) <= set(two.chosen)
    assert (
        parts.take_shots(split, None, seed=0).num_pairs == split.data.unseen.num_pairs
    )


def test_published_recipes_see_scaled_features_and_fold_back(prepared):
    split = parts.list_splits([prepared])[0].load()
    recipe = baselines.Recipe("joint", 2, {"num_steps": 5}, {"num_steps": 5})
    fitted = recipe.fit(split, 0)
    far = [part.replace(features=7 * np.asarray(part.features)) for part in split.data]
    moved = parts.dataclasses.replace(split, data=lore.data.FourWay(*far))
    again = recipe.fit(moved, 0)
    np.testing.assert_allclose(
        7 * again.model.basis, fitted.model.basis, rtol=1e-4, atol=1e-4
    )
    table = np.asarray(split.data.seen.features)
    scale = 100 / np.linalg.norm(table - table.mean(0), axis=1).mean()
    key = baselines.jax.random.key(0)
    scaled = split.data.seen.replace(features=(table - table.mean(0)) * scale)
    config = lore.PublishedJoint(num_steps=5)
    plain = lore.fit(scaled, rank=2, key=key, recipe=config)
    np.testing.assert_allclose(fitted.model.basis, plain.model.basis * scale, rtol=1e-4)


def test_published_recipes_do_not_centre_differences():
    rng = np.random.default_rng(0)
    delta = rng.normal(3.0, 1.0, size=(12, 4)).astype(np.float32)
    prefs = lore.Preferences.from_ragged([delta[:6], delta[6:]])
    data = lore.data.FourWay(prefs, prefs, prefs, prefs)
    split = parts.Split("x", data, None, "pairs", np.zeros(0, int), None, {})
    fitted = baselines.Recipe("joint", 1, {"num_steps": 5}, {}).fit(split, 0)
    scale = 100 / np.linalg.norm(delta, axis=1).mean()
    plain = lore.fit(
        prefs.replace(features=np.asarray(prefs.features) * np.float32(scale)),
        rank=1,
        key=baselines.jax.random.key(0),
        recipe=lore.PublishedJoint(num_steps=5),
    )
    np.testing.assert_allclose(fitted.model.basis, plain.model.basis * scale, rtol=1e-4)


def test_labels_say_what_is_not_as_published():
    names = [
        baselines.Recipe(method, 2, {"num_steps": steps, "alpha": alpha}).label
        for method, steps, alpha in (
            *(("joint", 1000, 0.0), ("alternating", 20_000, 10.0)),
            ("alternating", 1000, 0.0),
        )
    ]
    assert names[0] == "published joint"
    assert names[1] == "published alternating, anchor 10"
    assert names[2] == "published alternating, 1,000 steps"


def test_each_user_alone_solves_its_own_ridge_problem(prepared):
    seen = parts.list_splits([prepared])[0].load().data.seen
    own = baselines.PerUserBradleyTerry(ridge=0.7, scale=3.0)
    direction = own.directions(seen)[:, 2].astype(np.float64)
    delta = baselines.differences(seen, 2)
    p = 1 / (1 + np.exp(-delta @ direction))
    gradient = delta.T @ (p - 1) + 0.7 * 3.0 * direction
    np.testing.assert_allclose(gradient, 0, atol=1e-5)
    ones = np.tile(direction[:, None], seen.num_users).astype(np.float32)
    alike = np.ones((seen.num_users, 1), np.float32)
    users, _ = judge(baselines.own_margins(ones, seen), seen)
    plain = lore.accuracy(
        lore.RewardModel(ones[:, :1]), alike, seen, user_ids=seen.user_ids
    )
    np.testing.assert_allclose(users[""], plain)


def test_another_users_weights_are_nobodys_own():
    weights = np.eye(7)
    for seed in range(5):
        other = baselines.shuffled_weights(weights, seed)
        assert (other != weights).any(1).all()
        np.testing.assert_array_equal(other.sum(0), 1)


def test_judged_pairs_are_those_of_the_library():
    rng = np.random.default_rng(0)
    prefs = lore.Preferences.from_pairs(
        rng.normal(size=(30, 3)).astype(np.float32), np.arange(15), np.arange(15, 30),
        rng.integers(3, size=15), 4, label=rng.random(15),
    )  # fmt: skip
    basis, p = np.eye(3, dtype=np.float32), rng.dirichlet(np.ones(3), 4)
    p = p.astype(np.float32)
    margins = np.asarray(
        lore.margins(lore.RewardModel(basis, temperature=0.5), p, prefs)
    )[prefs.order]
    users, error = judge(margins, prefs)
    np.testing.assert_allclose(
        users[""], lore.accuracy(lore.RewardModel(basis), p, prefs), rtol=1e-6
    )
    loss = lore.log_loss(lore.RewardModel(basis, temperature=0.5), p, prefs)
    np.testing.assert_allclose(users["_log_loss"], loss, rtol=1e-5)
    chance, label = 1 / (1 + np.exp(-margins)), np.asarray(prefs.label)
    for user in range(3):
        mine = prefs.user == user
        brier = np.mean((chance[mine] - label[mine]) ** 2)
        assert users["_brier"][user] == pytest.approx(brier, rel=1e-5)
    assert np.isnan(users["_brier"][3])
    assert 0 < error < 1
    assert judge(np.zeros(15), prefs.replace(label=None))[1] == 0  # undecided is right


def draw_splits(rng, *, users=120, splits=4, share=0.8, own=0.1, split=0.0, pairs=0.05):
    """Values and ids of splits of the same people, whose true mean is 0."""
    taste, shift = rng.normal(0, own, users), rng.normal(0, split, splits)
    some = [rng.permutation(users)[: round(share * users)] for _ in range(splits)]
    noise = [rng.normal(0, pairs, len(ids)) for ids in some]
    return [taste[i] + shift[s] + noise[s] for s, i in enumerate(some)], some


@pytest.mark.parametrize("design", [{}, {"split": 0.02}, {"share": 0.2}])
def test_intervals_cover_the_truth_though_splits_share_users(design):
    rng = np.random.default_rng(1)
    hits = []
    for _ in range(300):
        found = intervals.bootstrap(*draw_splits(rng, **design), resamples=300)
        hits.append(found.low <= 0 <= found.high)
    assert 0.91 < np.mean(hits) < 0.985  # 95 % ± 3 deviations of 300 draws


def test_intervals_of_splits_that_share_users_are_no_narrower_than_of_one():
    rng = np.random.default_rng(0)
    values = rng.normal(size=60)
    ids = np.arange(60)
    one = intervals.bootstrap([values], [ids])
    again = intervals.bootstrap([values] * 5, [ids] * 5)
    assert (again.low, again.high) == pytest.approx((one.low, one.high))
    assert (again.mean, again.num_users) == pytest.approx((values.mean(), 60))
    plain = lore.evaluation.bootstrap_interval(values)
    assert one.high - one.low == pytest.approx(plain.high - plain.low, rel=0.1)
    moved = intervals.paired([values + 0.3] * 3, [values] * 3, [ids] * 3)
    assert (moved.low, moved.high) == pytest.approx((0.3, 0.3))
    values[7] = np.nan
    assert intervals.bootstrap([values], [ids]).num_users == 59
    with pytest.raises(ValueError, match="equal shapes"):
        intervals.bootstrap([values], [ids[1:]])
    with pytest.raises(ValueError, match="at least one number in every split"):
        intervals.bootstrap([values, values[7:8]], [ids, ids[7:8]])


def test_rows_average_seeds_and_pair_differences():
    rows = result_tables.Rows({s: {"seen": ["x", "y", "z"]} for s in "ab"})
    for split, base in (("a", 0.5), ("b", 0.7)):
        for seed in (0.0, 0.1):
            values = np.array([base, base + 0.2, np.nan]) + seed
            for name, shift in ((baselines.GLOBAL, 0.0), (baselines.LORE, 0.1)):
                cell = Cell({(name, "seen_heldout"): values + shift}, {})
                rows.add(split, 1 if name == baselines.GLOBAL else 2, cell)
    found = rows.interval(baselines.LORE, 2, "seen_heldout")
    assert found["mean"] == pytest.approx(0.85)
    assert (found["num_splits"], found["num_users"]) == (2, 2)
    assert found["difference"]["mean"] == pytest.approx(0.1)
    assert found["difference"]["high"] == pytest.approx(0.1)


def test_the_rank_is_chosen_by_fit_among_those_asked_for(prepared, monkeypatch):
    args = cli.make_parser("x", "y").parse_args(["--methods", "auto"])
    (recipe,) = cli.recipes(args, [0, 5, 2], head=True)
    asked = {}
    monkeypatch.setattr(lore, "fit", lambda prefs, **found: asked.update(found))
    recipe.fit(parts.list_splits([prepared])[0].load(), 0)
    assert asked["rank"] == "auto"
    assert asked["recipe"].search.ranks == (1, 2, 5)


def test_a_leak_stops_a_run(prepared, tmp_path):
    found = prepared_data.load(prepared)
    heldout = found.pairs.heldout.copy()
    heldout[np.flatnonzero(heldout)[0]] = False
    parts.dataclasses.replace(found.pairs, heldout=heldout).save(prepared / "pairs.npz")
    argv = ["--data", str(prepared), "--out", str(tmp_path / "runs"), *QUICK]
    with pytest.raises(leaks.LeakError, match="unit"):
        cli.train_main("x", "y", argv)
