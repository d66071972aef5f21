"""Pairs and splits of the published data sets."""

import collections

import numpy as np
import pytest
from fixtures import sources
from prepare_cases import SPLITS, tldr_splits, write_prism

from experiments import prepare
from experiments.leaks import LeakError, check_split
from experiments.personal_llm import prepare as personal_llm
from experiments.prism import prepare as prism
from experiments.reddit_tldr import prepare as tldr


def unpack(texts, table, n):
    """Pair n as (user id, history, chosen text, rejected text)."""
    chosen, rejected = (
        texts.messages[side[n]] for side in (table.chosen, table.rejected)
    )
    assert chosen[:-1] == rejected[:-1]
    user = str(table.users[table.user[n]])
    return user, chosen[:-1], chosen[-1]["content"], rejected[-1]["content"]


# --- RedditTLDR ------------------------------------------------------------------


def test_tldr_pairs_are_the_sources_choices():
    splits = tldr_splits()
    texts, table, dropped = tldr.build(splits)
    truth = {}
    for split in SPLITS:
        for row in splits[split]:
            pair = [row["summaries"][i]["text"].strip() for i in (0, 1)]
            picked = pair if row["choice"] == 0 else pair[::-1]
            truth[row["worker"], row["info"]["post"], *picked] = split
    assert len(table) == 160
    for n in range(len(table)):
        user, (ask,), chosen, rejected = unpack(texts, table, n)
        post = ask["content"].split("\n\n")[-1]
        split = truth[user, post, chosen, rejected]
        assert table.heldout[n] == (split == "validation")
    assert dropped["no post (news articles)"] == 1
    assert dropped["workers not in both splits"] == 2
    check_split(table)


def test_tldr_workers_are_halved_and_limited():
    splits = tldr_splits()
    _, table, dropped = tldr.build(splits, seen_pairs=6, unseen_pairs=4)
    assert table.seen.sum() == 4
    assert len(table.users) == 8
    for side in (False, True):
        for seen, limit in ((True, 6), (False, 4)):
            pairs = table.select(table.mask(seen=seen, heldout=side))
            assert set(collections.Counter(pairs.user.tolist()).values()) == {limit}
    assert dropped["pairs above the limit of a worker"] == 160 - 2 * 4 * (6 + 4)


def test_tldr_split_does_not_depend_on_the_order_of_rows():
    splits = tldr_splits()
    texts, table, _ = tldr.build(splits, seed=5, seen_pairs=6, unseen_pairs=4)
    mixed = {split: rows[::-1] for split, rows in splits.items()}
    texts2, table2, _ = tldr.build(mixed, seed=5, seen_pairs=6, unseen_pairs=4)
    pairs, pairs2 = (
        {(*map(str, unpack(x, t, n)), bool(t.heldout[n])) for n in range(len(t))}
        for x, t in ((texts, table), (texts2, table2))
    )
    assert pairs == pairs2
    np.testing.assert_array_equal(table.seen, table2.seen)
    others = [tldr.build(splits, seed=seed)[1].seen for seed in range(4)]
    assert len({tuple(seen) for seen in others}) > 1


def test_tldr_news_articles_are_never_rendered_as_none():
    splits = tldr_splits()
    texts, _, _ = tldr.build(splits)
    kept, _, dropped = tldr.build(splits, articles=True)
    assert "no post (news articles)" not in dropped
    assert len(kept) == len(texts) + 2
    for messages in (*texts.messages, *kept.messages):
        assert "None" not in messages[0]["content"]
    assert sum("news article" in m[0]["content"] for m in kept.messages) == 2


def test_tldr_training_pairs_on_a_held_out_post_are_left_out():
    splits = tldr_splits()
    splits["train"][0]["info"] = splits["validation"][0]["info"]
    _, table, dropped = tldr.build(splits)
    assert dropped["training pairs on a held-out post"] == 1
    check_split(table)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"choice": 2}, ValueError, "validation, row 3: 2 summaries, choice 2"),
        (
            {"summaries": [{"text": ["a"]}, {"text": "b"}]},
            TypeError,
            "row 3: summary 0 must be a string, got list",
        ),
    ],
)
def test_tldr_bad_rows_are_named(change, error, words):
    splits = tldr_splits()
    splits["validation"][3].update(change)
    with pytest.raises(error, match=words):
        tldr.build(splits)


# --- PRISM -----------------------------------------------------------------------


def test_prism_gives_one_pair_for_each_rejected_answer_with_its_history():
    rng = np.random.default_rng(1)
    said = [sources.sentence(rng) for _ in range(12)]
    history = sources.prism_turn(0, said[0], said[1:5], chosen=2)
    history += sources.prism_turn(1, said[5], said[6:8], chosen=1)
    history += sources.prism_turn(2, said[8], said[9:10], chosen=0)
    history += sources.prism_turn(3, said[10], [said[11], said[11]], chosen=0)
    conversation = sources.prism_conversation("c", "u", history[::-1])
    conversation["conversation_history"] = history
    dropped = collections.Counter()
    pairs = prism.dialogue_pairs(conversation, dropped)
    assert [(p["turn"], p["chosen"], p["rejected"]) for p in pairs] == [
        (0, said[3], said[1]),
        (0, said[3], said[2]),
        (0, said[3], said[4]),
        (1, said[7], said[6]),
    ]
    assert [m["content"] for m in pairs[0]["history"]] == [said[0]]
    assert [(m["role"], m["content"]) for m in pairs[3]["history"]] == [
        ("user", said[0]),
        ("assistant", said[3]),
        ("user", said[5]),
    ]
    assert +dropped == {
        "turns without a rejected answer": 1,
        "empty or repeated answers": 1,
    }


def test_prism_stops_a_dialogue_where_its_history_is_lost():
    conversations, survey, utterances = sources.prism_rows()
    texts, table, dropped = prism.build(conversations, survey, utterances)
    assert dropped["rest of a dialogue: unknown role in a turn"] == 1
    assert dropped["rest of a dialogue: not one chosen answer in a turn"] == 1
    assert dropped["dialogues of people not in the survey"] == 1
    assert dropped["dialogues without a pair"] == 1
    assert dropped["people with fewer than 6 dialogues"] == 1
    assert "user0" not in table.users
    # 9 people x 7 dialogues x (3 + 1) pairs, and one pair before the odd role.
    assert len(table) == 9 * 7 * 4 + 1
    assert table.num_judgements() == 9 * 7 * 2 + 1
    assert len(texts) == 9 * 7 * 6 + 2


def test_prism_splits_people_and_dialogues():
    conversations, survey, utterances = sources.prism_rows()
    _, table, _ = prism.build(conversations, survey, utterances)
    assert (len(table.users), table.seen.sum()) == (9, 7)
    for user in range(9):
        mine = table.select(table.user == user)
        held = set(mine.unit[mine.heldout])
        assert not held & set(mine.unit[~mine.heldout])
        assert len(held) in (3, 4)
    check_split(table)
    # A dialogue more for one person moves nobody else.
    more = [c for c in conversations if c["user_id"] != "user3"]
    _, fewer, _ = prism.build(more, survey, utterances)
    sides = (dict(zip(t.units[t.unit], t.heldout)) for t in (fewer, table))
    few, many = sides
    assert all(many[name] == side for name, side in few.items())


def test_prism_the_published_mistake_is_refused():
    conversations, survey, _ = sources.prism_rows()
    entry = conversations[9]["conversation_history"][2]
    entry["content"] = [entry["content"]]
    name = conversations[9]["conversation_id"]
    words = rf"conversation {name}, turn 0, entry 2 .*must be a string, got list"
    with pytest.raises(TypeError, match=words):
        prism.build(conversations, survey)


def test_prism_the_list_as_a_string_is_caught_by_the_leak_check(tmp_path):
    conversations, survey, _ = sources.prism_rows()
    for conversation in conversations:
        for entry in conversation["conversation_history"]:
            if entry["if_chosen"] is False:
                entry["content"] = str([entry["content"]])
    write_prism(
        tmp_path, conversations, survey, sources.prism_utterances(conversations)
    )
    argv = ["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--texts-only"]
    with pytest.raises(LeakError, match="starts with a bracket"):
        prism.main(argv)
    assert not (tmp_path / "out/pairs.npz").exists()


def test_prism_a_text_shared_between_people_leaves_the_training_side():
    conversations, survey, _ = sources.prism_rows()
    turn = sources.prism_turn(0, "Hello", ["Hi there.", "Good day."])
    for conversation in conversations[10:40:4]:
        conversation["conversation_history"] = turn
    _, table, dropped = prism.build(conversations, survey)
    assert dropped["training pairs whose text is held out too"] > 0
    check_split(table)


def test_prism_utterances_that_contradict_are_left_out():
    conversations, survey, utterances = sources.prism_rows()
    first = next(u for u in utterances if u["user_id"] == "user4" and u["if_chosen"])
    first["model_response"] = "Something else."
    _, _, dropped = prism.build(conversations, survey, utterances)
    assert dropped["pairs that utterances contradict"] == 3


# --- PersonalLLM -----------------------------------------------------------------


def personal(**changes):
    texts = prepare.TextIndex()
    ids, places, rewards = {}, {}, {}
    for split in ("train", "test"):
        rows = sources.personal_rows(split)
        found = personal_llm.read_prompts(rows, split, texts)
        ids[split], places[split], rewards[split] = found
    settings = {"alpha": 1.0, "seen_users": 6, "unseen_users": 4, **changes}
    built = personal_llm.build(places, ids, rewards, **settings)
    return texts, places, rewards, *built


def test_personal_llm_pairs_are_each_users_best_and_worst():
    texts, places, rewards, table, weights, _ = personal(
        seen_share=0.5, unseen_share=0.2
    )
    assert len(texts) == 2 * 20 * 8
    assert weights.shape == (10, 10)
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-6)
    where = {}
    for split in ("train", "test"):
        for prompt, rows in enumerate(places[split]):
            where.update({row: (split, prompt) for row in rows})
    for n in range(len(table)):
        split, prompt = where[table.chosen[n]]
        scores = rewards[split][prompt] @ weights[table.user[n]]
        assert table.chosen[n] == places[split][prompt][scores.argmax()]
        assert table.rejected[n] == places[split][prompt][scores.argmin()]
        assert table.heldout[n] == (split == "test")


def test_personal_llm_sizes():
    *_, table, _, _ = personal(seen_share=0.5, unseen_share=0.001)
    assert table.seen.sum() == 6
    counts = table.counts()
    assert counts["seen_train"]["pairs"] == 6 * 10
    assert counts["unseen_train"]["pairs"] == 4 * 1
    assert counts["seen_heldout"]["pairs"] == 6 * 20
    assert counts["unseen_heldout"]["pairs"] == 4 * 20
    check_split(table)


def test_personal_llm_alpha_spreads_the_users():
    spread = [personal(alpha=alpha)[4].max(1).mean() for alpha in (0.1, 1.0, 10.0)]
    assert spread[0] > spread[1] > spread[2]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            ("del", "response_3_beaver_7b"),
            ValueError,
            r"missing .*'response_3_beaver_7b",
        ),
        (
            ("response_3_beaver_7b", None),
            ValueError,
            "no number in response_3_beaver_7b",
        ),
        (("response_8", None), TypeError, "response_8 must be a string, got NoneType"),
    ],
)
def test_personal_llm_bad_cells_are_named(change, error, words):
    rows = sources.personal_rows("train")
    if change[0] == "del":
        del rows[4][change[1]]
    else:
        rows[4][change[0]] = change[1]
    with pytest.raises(error, match=f"train, row 4: .*{words}"):
        personal_llm.read_prompts(rows, "train", prepare.TextIndex())
