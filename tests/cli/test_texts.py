"""The command `lore`: the quickstart, texts, export, reports."""

import json
import pathlib
import re

import jax.numpy as jnp
import numpy as np
import pytest

import lore_jax as lore

pytest.importorskip("typer", reason="needs the extra 'cli'")
pytest.importorskip("pyarrow", reason="needs the extra 'cli'")
pytest.importorskip("tqdm", reason="needs the extra 'cli'")

from fixtures import sources

from lore_jax.cli import inputs, output, quickstart, tables

pytestmark = pytest.mark.filterwarnings("ignore:too few pairs:UserWarning")


# --- the quickstart --------------------------------------------------------------


def test_the_quickstart_of_the_experiments_is_the_commands(monkeypatch):
    from experiments import quickstart as experiment

    calls = []
    monkeypatch.setattr(quickstart, "run", lambda *args: calls.append(args))
    experiment.main(["--splits", "2", "--rank", "3", "--out", "here"])
    experiment.main([])
    default = pathlib.Path("runs/quickstart")
    assert calls == [(2, 3, pathlib.Path("here"), print), (4, 2, default, print)]
    with pytest.raises(SystemExit, match="2"):
        experiment.main(["--splits", "0"])


def few_votes():
    """Votes of the 40 people with most of them, on the 40 statements with most."""
    votes = lore.data.load_bowling_green()
    people = np.argsort(-np.bincount(votes.user), kind="stable")[:40]
    items = np.argsort(-np.bincount(votes.item), kind="stable")[:40]
    keep = np.isin(votes.user, people) & np.isin(votes.item, items)
    return votes._replace(
        features=votes.features[items],
        user=np.argsort(people)[np.searchsorted(np.sort(people), votes.user[keep])],
        item=np.argsort(items)[np.searchsorted(np.sort(items), votes.item[keep])],
        vote=votes.vote[keep],
        text=votes.text[items],
        user_ids=votes.user_ids[people],
        item_ids=votes.item_ids[items],
    )


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.slow
def test_quickstart_says_and_writes_two_tables(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="needs the extra 'quickstart'")
    monkeypatch.setattr(quickstart, "SHOTS", (0, None))
    few = lore.Marginal(num_steps=2, num_starts=1, search=lore.Search(ridges=(1.0,)))
    monkeypatch.setattr(lore, "Marginal", lambda **_: few)
    fit = lore.fit
    monkeypatch.setattr(
        lore, "fit", lambda p, recipe=None, **k: fit(p, recipe=recipe or few, **k)
    )
    joint = lore.PublishedJoint(num_steps=5)
    monkeypatch.setattr(lore, "PublishedJoint", lambda: joint)
    lines = []
    found = quickstart.run(1, 2, tmp_path / "out", lines.append, few_votes())
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == found
    for holdout, title in quickstart.SETTINGS.items():
        assert (tmp_path / "out" / f"accuracy_{holdout}.png").stat().st_size > 1000
        table = lines.index(f"\nMacro accuracy over people on {title}, %")
        rows = lines[table + 3 : table + 3 + len(quickstart.METHODS)]
        for row, (name, said) in zip(rows, quickstart.METHODS.items()):
            assert row.startswith(said)
            seen = found[holdout]["accuracy"][name]["seen"]["mean"]
            assert float(re.search(r"\d+\.\d", row[25:]).group()) == round(seen, 1)


# --- texts -----------------------------------------------------------------------

TEXTS = [
    {"user": u, "prompt": f"{q}?", "chosen": f"yes {q}", "rejected": f"no {q}"}
    for u in "ab"
    for q in "xyz"
]


@pytest.fixture
def texts(folder):
    """A table of texts and a tiny reward model."""
    pytest.importorskip("torch", reason="needs the extra 'hf'")
    pytest.importorskip("transformers", reason="needs the extra 'hf'")
    sources.save_tiny(folder / "tiny")
    sources.write_jsonl(folder / "texts.jsonl", TEXTS)
    answers = [{"prompt": "x?", "response": text} for text in ("yes x", "maybe")]
    sources.write_jsonl(folder / "answers.jsonl", answers)
    return folder


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_texts_embedded_once_or_every_time_are_the_same(texts, lore_command):
    tiny = ("--model", "tiny", "--chat")
    rest = ("--rank", 1, "--steps", 3, "--recipe", "joint", "--out")
    code, said, err = lore_command(
        "embed", "texts.jsonl", *tiny, "--out", "e", "--json"
    )
    assert code == 0, err
    assert json.loads(said)["texts"] == 6
    features = ("--features", "e/features.npy")
    code, _, err = lore_command(
        "fit", "e/pairs.jsonl", *features, *rest, "a.safetensors"
    )
    assert code == 0, err
    code, _, err = lore_command("fit", "texts.jsonl", *tiny, *rest, "b.safetensors")
    assert code == 0, err
    found = [lore.load(f"{name}.safetensors") for name in "ab"]
    assert found[0].user_ids.tolist() == found[1].user_ids.tolist() == ["a", "b"]
    assert found[0].model.num_features == 16
    np.testing.assert_allclose(*(fit.model.basis for fit in found), rtol=1e-5)

    code, _, err = lore_command("embed", "answers.jsonl", *tiny, "--out", "r")
    assert code == 0, err
    once = ("r/responses.jsonl", "--features", "r/features.npy")
    said = [
        lore_command("score", "a.safetensors", *given, "--user", "a")[1]
        for given in (once, ("answers.jsonl", *tiny))
    ]
    scores = [[float(x.split("\t")[2]) for x in text.splitlines()] for text in said]
    assert len(scores[0]) == 2
    np.testing.assert_allclose(*scores, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_export_writes_what_transformers_reads(texts, lore_command):
    from transformers import AutoModelForSequenceClassification

    rest = ("--rank", 2, "--steps", 3, "--recipe", "joint", "--out", "m.safetensors")
    lore_command("fit", "texts.jsonl", "--model", "tiny", "--chat", *rest)
    for options, outputs in (((), 2), (("--user", "a"), 1)):
        out = f"exported {outputs}"
        code, said, err = lore_command(
            *("export", "m.safetensors", "--base", "tiny", "--out", out, "--json"),
            *options,
        )
        assert code == 0, err
        assert json.loads(said) == {"folder": out, "outputs": outputs}
        found = AutoModelForSequenceClassification.from_pretrained(out)
        assert found.config.num_labels == outputs
    code, _, err = lore_command(
        *("export", "m.safetensors", "--base", "tiny", "--out", "z", "--user", "zoe")
    )
    assert code == 2
    assert err.count("\n") == 1
    assert "zoe" in err


def test_tables_that_embed_wrote_are_read_in_bfloat16_and_only_whole(folder):
    values = np.arange(6, dtype=np.float32).reshape(3, 2).astype(jnp.bfloat16)
    np.save("features.npy", values.view(np.uint16))
    path, marker = pathlib.Path("features.npy"), {"rows": 3, "dtype": "bfloat16"}
    pathlib.Path("features.json").write_text(json.dumps({**marker, "done": 3}))
    found = tables.read_embeddings(path)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found.astype(np.float32), values.astype(np.float32))
    pathlib.Path("features.json").write_text(json.dumps({**marker, "done": 2}))
    with pytest.raises(ValueError, match="not all of its rows are embedded"):
        tables.read_embeddings(path)


# --- parts -----------------------------------------------------------------------


def test_reports_are_lines_or_json():
    interval = lore.evaluation.Interval(0.5, 0.25, 1.0, 3)
    result = {"a": interval, "long": np.float32(2.0), "x": [1, 2], "p": np.arange(2)}
    assert output.report(result, False).splitlines()[:3] == [
        "a     0.5000 [0.2500, 1.0000]",
        "long  2.0000",
        "x     1, 2",
    ]
    found = json.loads(output.report({**result, "inf": np.inf}, True))
    assert found["a"] == {"mean": 0.5, "low": 0.25, "high": 1.0, "num_users": 3}
    assert (found["inf"], found["p"]) == (None, [0, 1])


@pytest.mark.parametrize(
    ("names", "known", "want"),
    [
        (["1", "-2"], np.array([1, -2]), [1, -2]),
        ([1, 2], np.array(["1", "2"]), ["1", "2"]),
        (["a"], np.array(["a", "bb"]), ["a"]),
    ],
)
def test_names_as_the_known_kind(names, known, want):
    assert inputs.like(names, known).tolist() == want


@pytest.mark.parametrize(
    "name", ["ann", "--5", "²", "0101", " 101", "+101", "1_01", "-0", "9" * 20]
)
def test_only_the_same_digits_are_a_known_integer(name):
    with pytest.raises(ValueError, match=f"user '?{re.escape(name)}'? is not known"):
        inputs.like(["101", name], np.array([101, 5]))


@pytest.mark.parametrize("names", [[2**53 + 1, 7], [2**63 + 1, 7], ["a", "b"]])
def test_a_list_of_names_is_exact(names):
    array, distinct = tables.names(names)
    assert (array.tolist(), distinct.tolist()) == (names, sorted(names))
