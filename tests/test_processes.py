"""Real processes on loopback: they fit together, or all of them refuse."""

import pathlib

import jax
import numpy as np
import pytest
from fixtures import mesh_processes
from process_cases import free_port, run

import lore_jax as lore
from experiments import distributed


def lines_of(out):
    ours = [line for line in out.splitlines() if ": " in line and line[0] != "["]
    return dict(line.split(": ", 1) for line in ours)


def test_without_a_mesh_arrays_of_two_processes_are_refused_on_both():
    port = free_port()
    for status, out, error in run("processes.py", [(port, 0), (port, 1)]):
        assert status == 0, error[-2000:]
        lines = lines_of(out)
        assert lines.pop("own") == "(2, 2)"
        assert len(lines) == 16
        for name, said in lines.items():
            assert "spans processes" in said, f"{name}: {said}"


def fits(tmp_path, kind, record=None, **environment):
    """What two processes with two devices each found."""
    port, out = free_port(), tmp_path / f"{kind}{record is not None}"
    more = () if record is None else (record,)
    each = [(port, 2, process, 2, kind, out, *more) for process in range(2)]
    for status, _, error in run("mesh_processes.py", each, **environment):
        assert status == 0, error[-2000:]
    return [dict(np.load(f"{out}.{process}.npz")) for process in range(2)], out


def alone(kind, **more):
    prefs = mesh_processes.preferences(kind, 1, 0)
    recipe = mesh_processes.JOINT if kind == "joint" else mesh_processes.RECIPE
    settings = dict(rank=2, key=jax.random.key(0), recipe=recipe)
    return lore.fit(prefs, **settings, **more)


def check_prior(prefs, found):
    basis = np.eye(12, 2, dtype=np.float32)
    prior = lore.fit_prior(basis, prefs, key=jax.random.key(1))
    for one in found:
        np.testing.assert_allclose(
            one["log_weights"], prior.model.prior.log_weights, rtol=1e-4
        )
        place = np.searchsorted(prior.user_ids, one["users"])
        np.testing.assert_allclose(
            one["prior_weights"], prior.weights[place], atol=1e-4
        )


def check_saved(path, found):
    """One file of the model and one per process; a user is found by name."""
    weights = {}
    for one in found:
        weights |= dict(zip(one["users"].tolist(), one["weights"]))
    fitted = lore.load(path)
    assert fitted.user_ids.tolist() == sorted(weights)
    for name, row in zip(fitted.user_ids.tolist(), fitted.weights):
        np.testing.assert_array_equal(row, weights[name])
    some = sorted(weights)[7:2:-2]
    part = lore.load(path, user_ids=some)
    np.testing.assert_array_equal(part.weights, [weights[x] for x in some])
    assert part.user_ids.tolist() == some
    with pytest.raises(ValueError, match="'nobody'"):
        lore.load(path, user_ids=[*some, "nobody"])
    folder, name = pathlib.Path(path).parent, pathlib.Path(path).name
    files = sorted(folder.glob(f"{name}.*.users"))
    assert len(files) == 2  # Those of the first save are gone.
    content = files[0].read_bytes()
    for wrong, error, match in (
        (None, FileNotFoundError, "no file at"),
        (content[:-1], ValueError, "truncated"),
        (files[1].read_bytes(), ValueError, "replaced by another file"),
    ):
        files[0].unlink()
        if wrong is not None:
            files[0].write_bytes(wrong)
        with pytest.raises(error, match=match):
            lore.load(path)
        files[0].write_bytes(content)
    lore.save(path, fitted)
    assert not list(folder.glob(f"{name}.*.users"))
    np.testing.assert_array_equal(lore.load(path).weights, fitted.weights)


@pytest.mark.parametrize(
    "kind",
    [
        "shared",
        pytest.param("named", marks=pytest.mark.slow),
        pytest.param("source", marks=pytest.mark.slow),
        pytest.param("private", marks=pytest.mark.slow),
        pytest.param("joint", marks=pytest.mark.slow),
        pytest.param("lopsided", marks=pytest.mark.slow),
    ],
)
def test_a_fit_of_two_processes_is_that_of_one(tmp_path, kind):
    """A table sharded over both, rows with names in both, a table or source of each."""
    found, out = fits(tmp_path, kind)
    records = []
    want = alone(kind, on_progress=records.append)
    scale = np.abs(want.model.basis).max()
    rows = want.history.selection
    settings = [str(mesh_processes.settings_of(row)) for row in rows]
    for one in found:
        assert one["settings"].tolist() == settings
        assert str(one["fingerprint"]) == records[0].fingerprint
        np.testing.assert_allclose(
            one["basis"], want.model.basis, rtol=0, atol=1e-5 * scale
        )
        np.testing.assert_array_equal(one["basis"], found[0]["basis"])
        np.testing.assert_allclose(one["loss"], want.history.loss, rtol=1e-5)
        starts = list((want.history.starts or {}).values())
        np.testing.assert_allclose(one["starts"], starts, atol=1e-4)
        place = np.searchsorted(want.user_ids, one["users"])
        np.testing.assert_allclose(one["weights"], want.weights[place], atol=1e-4)
    prefs = mesh_processes.preferences(kind, 1, 0)
    interval = lore.evaluation.bootstrap_interval(
        lore.accuracy(want.model, want, prefs)
    )
    for one in found:
        np.testing.assert_array_equal(one["interval"], found[0]["interval"])
        np.testing.assert_allclose(one["interval"][0], interval.mean, rtol=1e-6)
        np.testing.assert_allclose(one["interval"][1:3], interval[1:3], atol=0.01)
        assert one["interval"][3] == interval.num_users
    if kind == "named":
        check_prior(prefs, found)
    users = np.concatenate([one["users"] for one in found])
    assert sorted(users) == want.user_ids.tolist()
    check_saved(f"{out}.fit", found)
    # One process goes on from what two had done.
    half = lore.load_progress(f"{out}.1.half")
    again = alone(kind, resume=half)
    np.testing.assert_allclose(
        again.model.basis, want.model.basis, rtol=0, atol=1e-5 * scale
    )


@pytest.mark.slow
def test_in_double_precision_the_difference_is_rounding(tmp_path):
    (one, _), _ = fits(tmp_path, "named", JAX_ENABLE_X64="1")
    with jax.enable_x64(True):
        want = alone("named")
    scale = np.abs(want.model.basis).max()
    np.testing.assert_allclose(one["basis"], want.model.basis, atol=1e-12 * scale)


def test_both_refuse_what_does_not_go_together():
    port = free_port()
    said = []
    for status, out, error in run("mesh_refusals.py", [(port, 0), (port, 1)]):
        assert status == 0, error[-2000:]
        said.append(lines_of(out))
    assert len(said[0]) == 22
    ended = [one.pop("a callback that raises on one") for one in said]
    assert ended[0] == "RuntimeError: process 1 ended: RuntimeError: enough"
    assert ended[1] == "RuntimeError: enough"
    assert said[0] == said[1]
    for name, line in said[0].items():
        assert line.startswith("ValueError: "), f"{name}: {line}"
    words = {
        "key": "key must be the same on every process: process 0 has",
        "a rank that is none": "process 1: rank must be an integer",
        "shared users": "user 'ann' is one of processes 0 and 1",
        "no names": "need names: user_ids",
        "nan": "process 1: features must be finite; row 3, column 1 is nan",
        "source of one": "whether features is a FeatureSource must be the same",
        "an item with two rows": "has others in processes 0 and 1",
        "record of one": "resume must be the same",
        "axis of one": "process 1: mesh must have the one axis 'users'",
        "sharded by columns": "sharded over its rows only",
    }
    for name, text in words.items():
        assert text in said[0][name]


@pytest.mark.slow
def test_when_one_is_killed_the_other_ends_and_both_go_on_from_the_record(tmp_path):
    port, out = free_port(), tmp_path / "cut"
    each = [(port, 2, process, 2, "killed", out) for process in range(2)]
    (status, _, error), (killed, _, _) = run("mesh_processes.py", each, timeout=90)
    assert killed == -9
    assert status != 0
    assert "another task died" in error or "Connection" in error
    (one, _), _ = fits(tmp_path, "killed", f"{out}.1.record")
    (want, _), _ = fits(tmp_path, "not killed")
    np.testing.assert_array_equal(one["basis"], want["basis"])


@pytest.mark.slow
def test_the_example_fits_the_votes_on_two_processes(capfd):
    distributed.main(["--processes", "2", "--devices", "2"])
    out = capfd.readouterr().out
    rows = [line.split("|")[1:-1] for line in out.splitlines() if "e-" in line]
    assert [row[0].strip() for row in rows] == ["votes", "planted"]
    for _, basis, weights, *_ in rows:
        assert float(basis) <= 1e-5
        assert float(weights) <= 1e-4
