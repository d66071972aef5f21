"""A tiny run of the whole suite: every case measures, the table names the device."""

import json
import pathlib
import subprocess
import sys

import jax
import pytest

from benchmarks import __main__ as suite
from benchmarks import measure, step_bytes


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("benchmarks")
    suite.main(["--size", "tiny", "--out", str(out)])
    [path] = out.glob("*.json")
    return path, json.loads(path.read_text(encoding="utf-8"))


def test_every_case_is_one_line_with_what_it_belongs_to(run):
    _, rows = run
    names = {row["case"] for row in rows}
    for name in (
        "iteration alternating",
        "iteration default",
        "pairs over a table: default",
        "by U: alternating",
        "raw default",
        "raw ml",
        "projected adam",
        "projected adapt ml",
        "uneven default",
        "serving ml",
    ):
        assert name in names
    for row in rows:
        assert row["device"] == jax.devices()[0].device_kind
        assert row["jax"] == jax.__version__
        assert row["matmul_precision"] == "HIGHEST"
        if row["case"] != "copy":
            assert 0 < row["min_s"] <= row["median_s"]
            assert row["compile_s"] >= 0


def test_ratios_are_positive(run):
    _, rows = run
    ratios = [v for row in rows for k, v in row.items() if k.startswith("ratio_")]
    assert len(ratios) > 10
    assert min(ratios) > 0


def test_the_table_names_the_device_and_holds_every_ratio(run):
    path, rows = run
    table = path.with_suffix(".md").read_text(encoding="utf-8")
    assert jax.devices()[0].device_kind in table
    compared = [row for row in rows if any(k.startswith("ratio_") for k in row)]
    for row in compared:
        assert f"| {row['case']} |" in table
    assert len(compared) <= table.count("\n| ") - 1 < len(rows)


def test_an_older_run_is_compared_by_case_and_shape(run):
    path, rows = run
    changes = measure.compare(rows, measure.read_rows(path))
    assert len(changes) == sum("median_s" in row for row in rows)
    assert {v for row in changes for k, v in row.items() if "_over_then" in k} == {1.0}


def test_alternatives_take_turns():
    seen = []
    calls = {name: lambda name=name: seen.append(name) for name in "ab"}
    result = measure.interleave(calls, repeats=3)
    assert "".join(seen) == "ab" * 4
    assert result["a"]["repeats"] == 3


def test_torch_is_asked_for_only_by_name():
    """In a process of its own: another test of this one may have imported torch."""
    code = "import sys, benchmarks.bench_adapt, benchmarks.bench_train; "
    code += "sys.exit('torch' in sys.modules)"
    root = pathlib.Path(__file__).parent.parent
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


def test_shapes_of_ones_own_and_rows_that_stay_after_a_failure(tmp_path, monkeypatch):
    argv = ["--step", "M=20,N=30,D=8,K=2,U=3", "--adapt", "U=9,P=3,D=8,K=2"]
    argv += ["--dtype", "float32", "--dtype", "bfloat16"]
    real = suite.bench_adapt.projected

    def fails(*shape):
        yield next(iter(real(*shape)))
        raise RuntimeError("interrupted")

    monkeypatch.setattr(suite.measure, "copy_bandwidth", lambda size: 1e9)
    monkeypatch.setattr(suite.bench_adapt, "projected", fails)
    with pytest.raises(RuntimeError, match="interrupted"):
        suite.main([*argv, "--out", str(tmp_path)])
    [path] = tmp_path.glob("*.json")
    names = [row["case"] for row in json.loads(path.read_text(encoding="utf-8"))]
    assert names[:2] == ["copy", "read"]
    assert "iteration default" in names
    assert names[-1] == "projected adam"


@pytest.mark.parametrize("text", ["M=1", "M=1,N=1,D=1,K=1,U=0", "M,N", "M=1,N=1,X=1"])
def test_a_shape_that_is_none_is_refused(text, capsys):
    with pytest.raises(SystemExit, match="2"):
        suite.main(["--step", text])
    assert "--step" in capsys.readouterr().err


@pytest.mark.slow
def test_a_whole_fit_is_counted_in_reads(tmp_path):
    argv = ["--fit", "M=60,N=400,D=6,K=2,U=12", "--out", str(tmp_path)]
    suite.main(argv)
    [path] = tmp_path.glob("*.json")
    row = json.loads(path.read_text(encoding="utf-8"))[-1]
    assert row["case"] == "whole default fit"
    # Two trainings of K = 2 on all pairs, and at least three of each rank before.
    steps = row["steps_by_columns"]
    assert steps["2"] >= 2 * 15 + 3 * 150
    assert steps["1"] >= 3 * 150
    assert row["reads_of_search"] > 0
    assert row["ratio_to_search"] > 0
    table = path.with_suffix(".md").read_text(encoding="utf-8")
    assert "single reads" in table


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # PyTorch warns while it compiles.
def test_pytorch_is_timed_beside_it(tmp_path):
    pytest.importorskip("torch")
    argv = ["--torch", "--step", "M=64,N=64,D=16,K=3,U=8", "--out", str(tmp_path)]
    suite.main(argv)
    [path] = tmp_path.glob("*.json")
    rows = json.loads(path.read_text(encoding="utf-8"))
    [row] = [x for x in rows if "ratio_over_torch" in x]
    assert row["ratio_over_torch"] > 0
    assert "the compiled PyTorch step" in path.with_suffix(".md").read_text("utf-8")


@pytest.mark.slow
def test_bytes_of_a_step_are_counted():
    shape = dict(M=64, N=200, D=32, K=3, U=8)
    for name, found in step_bytes.count(**shape).items():
        assert found["table"] == 2 * 4 * 64 * 32
        assert not {"scatter", "sort"} & found.keys()
        # Each of the 200 pairs gathers two rows of 3 rewards, and is gathered twice.
        assert found["gather"] >= 4 * 2 * 200 * 3 * 4, name
    more = step_bytes.count(**shape | {"N": 2000})
    assert more["default"]["dot_general"] > 5 * found["dot_general"]
