"""A fit that was interrupted anywhere ends as one that ran through."""

import dataclasses
import math

import jax
import numpy as np
import pytest
import safetensors.numpy
from checkpoint_cases import rewrite

import lore_jax as lore
from lore_jax._train.resume import seal
from lore_jax.io import checkpoint, files
from lore_jax.io.tree import VERSION, to_record

KEY = jax.random.key(0)
ONE = dict(concentrations=(3.0,), variance_scales=(0.1,))
PRIOR = lore.PriorSearch(temperings=(0.4,), **ONE)
RECIPES = {
    "default": lore.Marginal(
        num_steps=4,
        search=lore.Search(
            smoothings=(1.0, math.inf),
            ridges=(0.2, 0.05),
            temperings=(0.4, 0.0),
            ranks=(1, 2),
            **ONE,
        ),
    ),
    "joint": lore.PublishedJoint(num_steps=5, temperature=5.0, prior=PRIOR),
    "alternating": lore.PublishedAlternating(num_steps=4, temperature=5.0, prior=PRIOR),
}


class Interruption(Exception):
    """What a callback may raise."""


class Recorder:
    """Saves each progress; gives up after so many calls."""

    def __init__(self, path, last=None):
        self.path, self.last, self.calls = path, last, []

    def __call__(self, progress):
        checkpoint.save_progress(self.path, progress)
        self.calls.append((progress.name, progress.num_steps))
        if len(self.calls) == self.last:
            raise Interruption


@pytest.fixture(scope="module")
def prefs():
    rng = np.random.default_rng(3)
    first = rng.integers(30, size=90)
    second = (first + rng.integers(1, 30, size=90)) % 30
    return lore.Preferences.from_pairs(
        rng.normal(size=(30, 4)).astype(np.float32),
        first,
        second,
        np.repeat(np.arange(9), 10),
    )


def assert_identical(first, second, tolerance=0.0):
    left, right = jax.tree.leaves_with_path(first), jax.tree.leaves_with_path(second)
    assert [path for path, _ in left] == [path for path, _ in right]
    for (path, a), (_, b) in zip(left, right, strict=True):
        name = jax.tree_util.keystr(path)
        if isinstance(a, bool | str):
            assert a == b, name
        else:
            np.testing.assert_allclose(
                b, a, rtol=tolerance, atol=tolerance, err_msg=name
            )


CASES = [(name, False, 2) for name in ("joint", "alternating")]
CASES += [("default", False, "auto"), ("default", True, 2), ("joint", True, 2)]


@pytest.mark.parametrize(("name", "from_source", "rank"), CASES)
def test_interrupted_anywhere_it_ends_the_same(
    prefs, name, from_source, rank, tmp_path
):
    if from_source:
        source = lore.ArraySource(np.asarray(prefs.features), 16)
        prefs = prefs.replace(features=source)
    path = tmp_path / "progress.safetensors"

    def fit(recorder=None, **settings):
        if recorder is not None:
            settings.update(on_progress=recorder, every=2)
        return lore.fit(prefs, rank=rank, key=KEY, recipe=RECIPES[name], **settings)

    through = Recorder(path)
    want = fit(through)
    calls = {n for _, n in through.calls}
    if name == "default":  # All pairs may be trained on for fewer steps.
        assert {2, 4} <= calls <= {1, 2, 3, 4}
    else:
        assert calls == {2, 4} | ({5} if name == "joint" else set())
    names = list(dict.fromkeys(name for name, _ in through.calls))
    total = len(through.calls)
    if name == "default":  # The search's candidates, then all pairs.
        assert len(names) > 3
        assert names[-1].startswith("all")
        searched = sum(not name.startswith("all") for name, _ in through.calls)
        places = [1, searched // 2, searched, total - 1]
    else:
        places = [1, total]
    for place in places:
        cut = Recorder(path, last=place)
        with pytest.raises(Interruption):
            fit(cut)
        rest = Recorder(path)
        got = fit(rest, resume=checkpoint.load_progress(path))
        # Nothing is done twice, nothing is left out.
        assert cut.calls + rest.calls == through.calls
        assert_identical(want, got)
    # Compiled for other numbers of steps, the same step may be rounded differently.
    assert_identical(want, fit(), 1e-6)


@pytest.fixture(scope="module")
def progress(prefs, tmp_path_factory):
    path = tmp_path_factory.mktemp("progress") / "progress.safetensors"
    settings = dict(recipe=RECIPES["joint"], on_progress=Recorder(path, last=1))
    with pytest.raises(Interruption):
        lore.fit(prefs, rank=2, key=KEY, every=2, **settings)
    return checkpoint.load_progress(path)


@pytest.mark.parametrize(
    "changed", ["features", "pairs", "weight", "rank", "key", "recipe", "init"]
)
def test_another_fits_progress_is_refused(prefs, progress, changed):
    settings = dict(prefs=prefs, rank=2, key=KEY, recipe=RECIPES["joint"])
    if changed == "features":
        features = np.array(prefs.features)
        features[29, 3] += 1e-3
        settings["prefs"] = prefs.replace(features=features)
    elif changed == "pairs":
        swapped = dict(chosen=prefs.rejected, rejected=prefs.chosen)
        settings["prefs"] = prefs.replace(**swapped)
    elif changed == "weight":
        settings["prefs"] = prefs.replace(sample_weight=np.ones(90, np.float32))
    elif changed == "rank":
        settings["rank"] = 3
    elif changed == "key":
        settings["key"] = jax.random.key(1)
    elif changed == "recipe":
        recipe = dataclasses.replace(RECIPES["joint"], learning_rate=0.4)
        settings["recipe"] = recipe
    else:
        sizes = dict(num_users=9, num_features=4, rank=2)
        settings["init"] = lore.init_params(KEY, **sizes)
    prefs = settings.pop("prefs")
    with pytest.raises(ValueError, match="resume is the progress of another fit"):
        lore.fit(prefs, resume=progress, **settings)


def test_a_source_with_the_same_rows_has_the_same_fingerprint(prefs, progress):
    source = lore.ArraySource(np.asarray(prefs.features), 7)
    settings = dict(rank=2, key=KEY, recipe=RECIPES["joint"])
    here = lore.fit(prefs, resume=progress, **settings)
    prefs = prefs.replace(features=source)
    there = lore.fit(prefs, resume=progress, **settings)
    np.testing.assert_allclose(
        here.model.basis, there.model.basis, rtol=1e-3, atol=1e-4
    )


def test_a_state_of_other_shapes_is_refused(prefs, progress):
    wrong = seal(progress.replace(state=(progress.state[0], *progress.state)))
    with pytest.raises(
        ValueError, match=r"resume\.state must hold arrays of the shapes"
    ):
        lore.fit(prefs, rank=2, key=KEY, recipe=RECIPES["joint"], resume=wrong)


def test_progress_round_trips(progress, tmp_path):
    path = tmp_path / "again"
    checkpoint.save_progress(path, progress)
    again = checkpoint.load_progress(path)
    assert jax.tree.structure(again) == jax.tree.structure(progress)
    assert_identical(progress, again)
    for a, b in zip(jax.tree.leaves(progress), jax.tree.leaves(again), strict=True):
        assert a.dtype == b.dtype


def several(*items):
    """A tuple as a record holds it."""
    return {"kind": "tuple", "items": list(items)}


def row(**values):
    return {"kind": "dict", "items": values}


ARRAY = {"kind": "array"}
NUMBERS = np.zeros(9, np.float32)
DAMAGE = {
    "metrics": (dict(arrays={"metrics.loss": NUMBERS}), "metrics must be 3 arrays"),
    "names": (dict(arrays={"state.99": NUMBERS}), r"unexpected arrays \['state.99'\]"),
    "state": (dict(drop=["state.0"]), r"the array state\.0 is missing"),
    "rows": (
        dict(record={"rows": several(row(log_loss="small"))}),
        "rows must be objects with a log_loss",
    ),
    "losses": (
        dict(record={"rows": several(row(log_loss=0.5, chosen=False))}),
        "losses must be 1 arrays",
    ),
    "kept": (
        dict(
            record={
                "rows": several(row(log_loss=0.5, kept=True)),
                "losses": several(ARRAY),
            },
            arrays={"losses.0": NUMBERS},
        ),
        "best must be 2 arrays",
    ),
    "best": (
        dict(record={"best": several(ARRAY)}, arrays={"best.0": NUMBERS}),
        "best must be 0 arrays",
    ),
    "fingerprint": (dict(record={"fingerprint": ...}), "Progress has the fields"),
    "other_fingerprint": (
        dict(record={"fingerprint": "0" * 32}),
        "digest is not that of the record",
    ),
    "trail": (
        dict(record={"trail": several(ARRAY)}, arrays={"trail.0": NUMBERS}),
        "trail must be two arrays",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_refused(progress, tmp_path, damage, message):
    path = tmp_path / "progress"
    checkpoint.save_progress(path, progress)
    rewrite(path, **damage)
    with pytest.raises(ValueError, match=f"progress is damaged: .*{message}"):
        checkpoint.load_progress(path)


def longer(progress):
    metrics = jax.tree.map(lambda x: np.append(x, x[-1]), progress.metrics)
    return progress.replace(metrics=metrics)


def with_nan(progress):
    state = [np.array(x) for x in progress.state]
    state[0][0, 0] = np.nan
    return progress.replace(state=tuple(state))


def with_losses(progress, value):
    loss = np.array(progress.metrics.loss)
    loss[1] = value
    return progress.replace(metrics=progress.metrics._replace(loss=loss))


CHANGES = {
    "longer": (longer, "metrics are those of 3 steps, but the state is .* 2 steps"),
    "nan": (with_nan, r"state\[0\] must be finite"),
    "loss": (lambda x: with_losses(x, 0.1), "digest is not that of the record"),
    "rows": (
        lambda x: x.replace(rows=({"log_loss": -0.5, "chosen": True},)),
        "log_loss of at least 0",
    ),
    "name": (lambda x: x.replace(name="alternating"), "digest is not that"),
    "state": (
        lambda x: x.replace(state=(x.state[0] + 1e-3, *x.state[1:])),
        "digest is not that",
    ),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_a_changed_record_is_refused_also_when_passed_directly(
    prefs, progress, tmp_path, change, message
):
    changed = change(progress)
    settings = dict(rank=2, key=KEY, recipe=RECIPES["joint"])
    with pytest.raises(ValueError, match=r"resume\..*" + message):
        lore.fit(prefs, resume=changed, **settings)
    with pytest.raises(ValueError, match=message):
        checkpoint.save_progress(tmp_path / "progress", changed)
    arrays, record = to_record(changed)
    kind = {"format": "lore_jax.progress", "version": str(VERSION)}
    files.write_record(tmp_path / "progress", arrays, {**kind, "record": record})
    with pytest.raises(ValueError, match=f"progress is damaged: .*{message}"):
        checkpoint.load_progress(tmp_path / "progress")


def test_a_training_that_diverged_is_a_record_like_others(progress, tmp_path):
    diverged = seal(with_losses(with_nan(progress), np.nan))
    checkpoint.save_progress(tmp_path / "progress", diverged)
    again = checkpoint.load_progress(tmp_path / "progress")
    assert np.isnan(again.state[0]).any()


def test_truncated_foreign_and_missing_files_are_refused(progress, tmp_path):
    path = tmp_path / "progress"
    checkpoint.save_progress(path, progress)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="truncated"):
        checkpoint.load_progress(path)
    foreign = {"x": np.zeros(1)}, {"format": "lore_jax.fit", "version": "1"}
    path.write_bytes(safetensors.numpy.save(*foreign))
    with pytest.raises(ValueError, match="not a lore_jax progress"):
        checkpoint.load_progress(path)
    with pytest.raises(FileNotFoundError):
        checkpoint.load_progress(tmp_path / "nothing")
    with pytest.raises(TypeError, match="progress must be a Progress"):
        checkpoint.save_progress(path, {})
