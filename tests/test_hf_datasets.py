"""`hf.from_dataset`: every format gives the same pairs. Needs no torch."""

import json

import jax
import numpy as np
import pytest

import lore_jax as lore
from lore_jax import hf

# user, prompt, chosen, rejected. The second answer of row 1 is the first one's rival
# of row 0; rows 0 and 3 share a response against different rivals.
ROWS = (
    ("ann", "The sky is", " blue.", " green."),
    ("bob", "The sky is", " green.", " blue."),
    ("bob", "The sun is", " hot.", " cold."),
    ("ann", "The sky is", " blue.", " black."),
)
TEXTS = ["The sky is" + x for x in (" blue.", " green.", " black.")]
CHOSEN, REJECTED = [0, 1, 2, 0], [1, 0, 3, 4]


def said(role, content):
    return [{"role": role, "content": content}]


def standard():
    names = ("annotator_id", "prompt", "chosen", "rejected")
    return {name: [row[i] for row in ROWS] for i, name in enumerate(names)}


def formats():
    """The four formats of TRL's documentation, of the same content."""
    plain = standard()
    prompts = [said("user", text) for text in plain["prompt"]]
    sides = {
        side: [said("assistant", text) for text in plain[side]]
        for side in ("chosen", "rejected")
    }
    user = {"annotator_id": plain["annotator_id"]}

    def joined(columns, before):
        return {s: [p + x for p, x in zip(before, columns[s])] for s in sides}

    return {
        "explicit standard": plain,
        "implicit standard": user | joined(plain, plain["prompt"]),
        "explicit conversational": {**user, "prompt": prompts, **sides},
        "implicit conversational": user | joined(sides, prompts),
    }


def assert_equal(first, second):
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)
    assert jax.tree.structure(first) == jax.tree.structure(second)


def expected(features):
    return lore.Preferences.from_pairs(
        features, CHOSEN, REJECTED, [row[0] for row in ROWS]
    )


@pytest.mark.parametrize("name", formats())
def test_all_formats_of_trl_give_equal_preferences(name):
    found = hf.from_dataset(formats()[name], user="annotator_id")
    features = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    assert_equal(found.preferences(features), expected(features))
    contents = [
        text if isinstance(text, str) else "".join(m["content"] for m in text)
        for text in found.texts
    ]
    assert contents == [*TEXTS[:2], "The sun is hot.", "The sun is cold.", TEXTS[2]]


def rows_of(columns):
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


def as_pandas(columns):
    return pytest.importorskip("pandas").DataFrame(columns)


def as_pyarrow(columns):
    return pytest.importorskip("pyarrow").table(columns)


def as_dataset(columns):
    return pytest.importorskip("datasets").Dataset.from_dict(columns)


CONTAINERS = {
    "rows": rows_of,
    "generator": lambda columns: iter(rows_of(columns)),
    "arrays": lambda columns: {k: np.array(v, object) for k, v in columns.items()},
    "pandas": as_pandas,
    "pyarrow": as_pyarrow,
    "dataset": as_dataset,
    "dataset with numpy": lambda columns: as_dataset(columns).with_format("numpy"),
    "dataset as pandas": lambda columns: as_dataset(columns).to_pandas(),
    "stream": lambda columns: as_dataset(columns).to_iterable_dataset(),
}


@pytest.mark.parametrize("name", ["explicit standard", "implicit conversational"])
@pytest.mark.parametrize("container", CONTAINERS)
def test_anything_with_columns(container, name):
    columns = formats()[name]
    found = hf.from_dataset(CONTAINERS[container](columns), user="annotator_id")
    plain = hf.from_dataset(columns, user="annotator_id")
    assert found.texts == plain.texts
    features = np.eye(5, dtype=np.float32)
    assert_equal(found.preferences(features), plain.preferences(features))


def test_chat_makes_messages_of_strings():
    found = hf.from_dataset(standard(), user="annotator_id", chat=True)
    same = hf.from_dataset(formats()["explicit conversational"], user="annotator_id")
    assert found.texts == same.texts
    with pytest.raises(ValueError, match="row 0, chosen: chat=True needs a prompt"):
        hf.from_dataset(formats()["implicit standard"], "annotator_id", chat=True)


def test_a_string_prompt_with_messages_that_may_repeat_it():
    answer, other = said("assistant", "Blue."), said("assistant", "Red.")
    ask = said("user", "Which?")
    rows = [
        {"who": 90, "prompt": "Which?", "chosen": answer, "rejected": other},
        {
            "who": 17,
            "prompt": "Which?",
            "chosen": ask + other,
            "rejected": ask + answer,
        },
        {"who": 17, "prompt": ask, "chosen": ask + other, "rejected": answer},
        {"who": 17, "prompt": ask, "chosen": "Red.", "rejected": "Blue."},
    ]
    found = hf.from_dataset(rows, user="who")
    assert found.texts == [ask + answer, ask + other]
    assert found.chosen.tolist() == [0, 1, 1, 1]
    prefs = found.preferences(np.eye(2, dtype=np.float32))
    assert prefs.user_ids.tolist() == [17, 90]


def test_optional_columns_and_other_names():
    rows = {
        "who": ["ann", "bob"], "ask": ["A", "B"], "yes": ["1", "2"], "no": ["3", "4"],
        "sure": [0.75, 1], "weight": [2, 3], "session": ["s", "t"],
    }  # fmt: skip
    found = hf.from_dataset(
        rows, "who", prompt="ask", chosen="yes", rejected="no", label="sure",
        sample_weight="weight", group="session",
    )  # fmt: skip
    prefs = found.preferences(np.eye(4, dtype=np.float32), user_ids=["bob", "ann"])
    assert found.texts == ["A1", "A3", "B2", "B4"]
    assert prefs.user_ids.tolist() == ["bob", "ann"]
    assert prefs.label.tolist() == [1.0, 0.75]  # Stored by user: bob comes first.
    assert prefs.sample_weight.tolist() == [3, 2]
    assert prefs.group.tolist() == [1, 0]


def test_scored_responses_become_pairs():
    rows = {
        "who": ["ann", "bob"],
        "prompt": ["x", "y"],
        "texts": [["1", "2", "3"], ["1", "2", None]],
        "scores": [[1, 2, 2.0], [3, 0, None]],
        "weight": [0.5, 2.0],
    }
    found = hf.from_dataset(
        rows, "who", responses="texts", scores="scores", sample_weight="weight"
    )
    assert found.texts == ["x1", "x2", "x3", "y1", "y2"]
    pairs = list(zip(found.user, found.chosen, found.rejected))
    assert pairs == [("ann", 1, 0), ("ann", 2, 0), ("bob", 3, 4)]
    assert found.group.tolist() == [0, 0, 1]
    assert found.sample_weight.tolist() == [0.5, 0.5, 2.0]


def test_scores_in_columns_of_their_own():
    rows = {"who": ["ann", "bob"], "a": ["1", "2"], "b": ["3", "4"]}
    rows |= {"score_a": [0.5, 1], "score_b": [1.5, 0]}
    found = hf.from_dataset(
        rows, "who", responses=("a", "b"), scores=("score_a", "score_b")
    )
    assert found.texts == ["1", "3", "2", "4"]
    assert (found.chosen.tolist(), found.rejected.tolist()) == ([1, 2], [0, 3])


def test_conversations_keep_their_other_fields():
    tool = [{"role": "user", "content": "x", "name": "eve", "tool_calls": None}]
    rows = [{"who": "ann", "prompt": tool, "chosen": "1", "rejected": "2"}]
    (first, _) = hf.from_dataset(rows, "who").texts
    assert first[0] == {"role": "user", "content": "x", "name": "eve"}


def one(**changes):
    return [{"who": "ann", "prompt": "x", "chosen": "1", "rejected": "2", **changes}]


REFUSED = {
    "same text": (one(rejected="1"), {}, ValueError, "row 0: both responses"),
    "user column": (one(), {"user": "nobody"}, ValueError, "user='nobody' is no col"),
    "prompt column": (one(), {"prompt": "ask"}, ValueError, "prompt='ask' is no col"),
    "no user": (one(who=None), {}, ValueError, r"who\[0\] is missing"),
    "no text": (one(chosen=None), {}, TypeError, "row 0, chosen must be a string"),
    "empty": (one(chosen=""), {}, ValueError, "row 0, chosen must not be empty"),
    "surrogate": (one(chosen="\ud800"), {}, ValueError, "lone surrogate U\\+D800"),
    "content": (
        one(chosen=[{"role": "assistant", "content": ["a"]}]),
        {},
        TypeError,
        "row 0, chosen, message 0: content must be a string",
    ),
    "last role": (
        one(chosen=said("user", "a")),
        {},
        ValueError,
        "row 0, chosen: the last message must be the assistant's",
    ),
    "no rows": (7, {}, TypeError, "ds must have columns or rows"),
    "strings": (["a"], {}, TypeError, "row 0 of ds must be a mapping"),
    "scores alone": (one(), {"scores": "chosen"}, ValueError, "belong together"),
    "no list": (
        one(),
        {"scores": "chosen", "responses": "chosen"},
        TypeError,
        "row 0: responses must be a list",
    ),
    "lengths": (
        one(r=["a", "b"], s=[1]),
        {"scores": "s", "responses": "r"},
        ValueError,
        "row 0: 2 responses and 1 scores",
    ),
    "score": (
        one(r=["a", "b"], s=[1, None]),
        {"scores": "s", "responses": "r"},
        ValueError,
        r"row 0, score 1\[0\] is missing",
    ),
    "label": (one(sure=2), {"label": "sure"}, ValueError, r"sure\[0\] is 2"),
}


@pytest.mark.parametrize(
    ("rows", "settings", "kind", "message"), REFUSED.values(), ids=REFUSED.keys()
)
def test_bad_data_are_refused_with_their_place(rows, settings, kind, message):
    with pytest.raises(kind, match=message):
        hf.from_dataset(rows, **{"user": "who", **settings})


def test_splits_are_not_one_data_set():
    datasets = pytest.importorskip("datasets")
    split = datasets.Dataset.from_list(one())
    with pytest.raises(TypeError, match=r"got splits \['train'\]"):
        hf.from_dataset(datasets.DatasetDict(train=split), "who")


def test_a_table_of_another_size_is_refused():
    found = hf.from_dataset(one(), "who")
    with pytest.raises(ValueError, match="one row per text, M=2, got 3"):
        found.preferences(np.eye(3, dtype=np.float32))
    assert repr(found) == "PreferenceTexts(1 pairs of 1 users over 2 texts)"


def test_the_library_does_not_import_hf_and_hf_does_not_import_torch():
    import subprocess
    import sys

    code = (
        "import json, sys, lore_jax; before = 'lore_jax.hf' in sys.modules\n"
        "import lore_jax.hf\n"
        "heavy = {'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
        "print(json.dumps([before, sorted(heavy)]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert json.loads(done.stdout) == [False, []]
