import string
import warnings

import numpy as np
import pytest
from fixtures import sources

from experiments import leaks
from experiments.prepared import PairTable


def random_pairs(number, seed=0):
    rng = np.random.default_rng(seed)
    chosen = [sources.sentence(rng) for _ in range(number)]
    rejected = [sources.sentence(rng) for _ in range(number)]
    return chosen, rejected, np.arange(number) // 3


def table(**changes):
    columns = {
        "user": ["a", "a", "b", "b"],
        "unit": ["p", "q", "r", "s"],
        "group": ["p", "q", "r", "s"],
        "chosen": [0, 2, 4, 6],
        "rejected": [1, 3, 5, 7],
        "seen": [True, True, False, False],
        "heldout": [False, True, False, True],
        **changes,
    }
    return PairTable.from_columns(**columns)


def test_clean_pairs_pass_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = leaks.check_formatting(*random_pairs(300))
    assert 0.35 < report.accuracy < 0.65
    assert report.one_sided == []


def test_the_published_list_repr_is_caught():
    chosen, rejected, groups = random_pairs(200)
    rejected = [str([text]) for text in rejected]
    report = leaks.formatting_report(chosen, rejected, groups)
    assert report.accuracy == 1.0
    with pytest.raises(leaks.LeakError, match=r"100\.0%.*bracket"):
        leaks.check_formatting(chosen, rejected, groups)


def test_a_leak_in_a_fifth_of_the_pairs_is_caught_by_its_marker():
    chosen, rejected, groups = random_pairs(300)
    rejected = [str([t]) if i % 5 == 0 else t for i, t in enumerate(rejected)]
    with pytest.raises(leaks.LeakError, match="starts with a bracket"):
        leaks.check_formatting(chosen, rejected, groups)


def test_a_rare_marker_only_warns():
    chosen, rejected, groups = random_pairs(1000)
    rejected = [f'"{t}' if i % 25 == 0 else t for i, t in enumerate(rejected)]
    with pytest.warns(leaks.LeakWarning, match="starts with a quote"):
        leaks.check_formatting(chosen, rejected, groups)


def test_length_that_often_wins_warns_and_one_that_always_wins_raises():
    chosen, rejected, groups = random_pairs(300)
    longer = [f"{text} {text}" if i % 5 else text for i, text in enumerate(chosen)]
    with pytest.warns(leaks.LeakWarning, match="log words"):
        report = leaks.check_formatting(longer, rejected, groups)
    assert 0.75 < report.accuracy < 0.95
    with pytest.raises(leaks.LeakError):
        leaks.check_formatting([f"{t} {t} {t}" for t in chosen], rejected, groups)


def test_which_text_is_called_first_does_not_matter():
    chosen, rejected, groups = random_pairs(120, seed=3)
    first = leaks.formatting_report(chosen, rejected, groups)
    swapped = leaks.formatting_report(rejected, chosen, groups)
    assert first.accuracy == swapped.accuracy


def test_surface_features_of_a_text():
    text = '["Ab 1"] \u00e9\n'
    found = dict(zip(leaks.SURFACE_NAMES, leaks.surface_features(text)))
    assert len(found) == len(leaks.surface_features(""))
    assert np.isfinite(leaks.surface_features("")).all()
    for kind, count in {
        "upper-case": 1, "digits": 1, "punctuation": 4, "white space": 3, "non-ASCII": 1
    }.items():  # fmt: skip
        assert found[f"share of {kind}"] == pytest.approx(count / len(text))
    assert found["log words"] == pytest.approx(np.log(4))
    assert found["starts with a bracket"] == found["ends with a space"] == 1
    assert found["contains a bracketed quote"] == 1
    assert found["starts with a quote"] == found["ends with a bracket"] == 0


def test_folds_keep_groups_whole():
    # Copies of 12 pairs of noise: known by heart, they would all be right.
    rng, characters = np.random.default_rng(0), list(string.printable)
    groups, accuracy = np.repeat(np.arange(12), 10), {"whole": [], "cut": [], "one": []}
    for _ in range(10):
        texts = [
            "".join(rng.choice(characters, rng.integers(20, 60))) for _ in "ab" * 12
        ]
        pairs = [[texts[g + shift] for g in groups] for shift in (0, 12)]
        for how, by in (
            ("whole", groups),
            ("cut", np.arange(120)),
            ("one", groups * 0),
        ):
            accuracy[how].append(leaks.formatting_report(*pairs, by).accuracy)
    assert np.mean(accuracy["whole"]) < 0.65
    assert np.mean(accuracy["cut"]) > 0.95
    assert set(accuracy["one"]) == {0.5}  # a single group leaves nothing to learn from


def test_a_clean_split_passes_and_reports():
    texts = [sources.sentence(np.random.default_rng(i)) for i in range(8)]
    found = leaks.check_pairs(table(), texts)
    assert found["split"] == "ok"
    assert found["formatting"]["num_pairs"] == 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"chosen": [0, 0, 4, 6]}, "identical text"),
        ({"rejected": [1, 3, 1, 1]}, "identical text"),
        ({"unit": ["p", "p", "r", "s"]}, "unit"),
    ],
)
def test_a_text_or_dialogue_on_both_sides_is_refused(changes, words):
    with pytest.raises(leaks.LeakError, match=f"{words}.*both sides"):
        leaks.check_split(table(**changes))


def test_a_user_seen_and_unseen_is_refused():
    with pytest.raises(ValueError, match="'a' is both seen and unseen"):
        table(seen=[True, False, False, False])
    with pytest.raises(leaks.LeakError, match=r"1 users.*first: a"):
        leaks.check_two_sides("user", ["a", "a", "b"], [True, False, False])


def test_bad_feature_rows_are_refused():
    good = np.random.default_rng(0).normal(size=(10, 6)).astype(np.float32)
    leaks.check_features(good, block=3)
    for row, value, words in (
        (4, 0.0, "row 4 is constant"),
        (9, np.nan, "row 9 is not finite"),
        (7, good[2], "rows 2 and 7 are equal"),
    ):
        bad = good.copy()
        bad[row] = value
        with pytest.raises(leaks.LeakError, match=words):
            leaks.check_features(bad, block=3)
        leaks.check_features(bad, rows=[0, 1, 2], block=3)


def test_soft_labels_turn_the_pair_round():
    chosen, rejected, _ = random_pairs(100)
    texts = [*chosen, *(str([text]) for text in rejected)]
    flip = np.arange(100) % 2 == 0
    names = np.arange(100).astype(str)
    pairs = PairTable.from_columns(
        user=names, unit=names, group=names, seen=np.ones(100), heldout=np.zeros(100),
        chosen=np.where(flip, np.arange(100) + 100, np.arange(100)),
        rejected=np.where(flip, np.arange(100), np.arange(100) + 100),
        label=np.where(flip, 0.1, 0.9),
    )  # fmt: skip
    with pytest.raises(leaks.LeakError):
        leaks.check_pairs(pairs, texts)
