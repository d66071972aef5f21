import collections
import json
import types
import zipfile

import numpy as np
import pytest
from fixtures import sources

from experiments import prepare, prepared, stored
from experiments.leaks import LeakError, check_split
from experiments.personal_llm import prepare as personal_llm
from experiments.prism import prepare as prism
from experiments.reddit_tldr import prepare as tldr

SPLITS = ("train", "validation")
EXTRA = "needs the extra 'quickstart'"
EMBED = "needs the extra 'experiments'"


def tldr_splits(**changes):
    return {split: sources.tldr_rows(split, **changes) for split in SPLITS}


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


# --- the whole of prepare --------------------------------------------------------


def write_tldr(folder):
    for split in SPLITS:
        sources.write_jsonl(
            folder / f"comparisons_{split}.jsonl", sources.tldr_rows(split)
        )


def write_prism(folder, *rows):
    rows = rows or sources.prism_rows()
    for name, part in zip(("conversations", "survey", "utterances"), rows):
        sources.write_jsonl(folder / f"{name}.jsonl", part)


def write_personal(folder):
    for split in ("train", "test"):
        sources.write_jsonl(folder / f"{split}.jsonl", sources.personal_rows(split))


CHAINS = {
    "reddit_tldr": (tldr.main, write_tldr, [], None),
    "prism": (prism.main, write_prism, [], None),
    "personal_llm": (
        personal_llm.main,
        write_personal,
        ["--seen-users", "6", "--unseen-users", "4", "--alphas", "0.1", "10"],
        "alpha_0.1",
    ),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::experiments.leaks.LeakWarning")
@pytest.mark.parametrize("name", CHAINS)
def test_prepare_writes_a_folder_that_reads_back(tmp_path, monkeypatch, name):
    for module in ("torch", "transformers"):
        pytest.importorskip(module, reason=EMBED)
    pytest.importorskip("tqdm", reason=EXTRA)
    main, write, flags, variant = CHAINS[name]
    write(tmp_path / "data")
    model = sources.save_tiny(tmp_path / "model")
    argv = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    argv += ["--model", str(model), "--model-dtype", "float32", "--device", "cpu"]
    report = main([*argv, *flags])
    found = prepared.load(tmp_path / "out", variant)
    assert found.features.shape == (report["texts"], 16)
    assert str(found.features.dtype) == "bfloat16"
    assert found.head.shape == (16,)
    assert found.config["dataset"] == name
    assert found.config["versions"]["numpy"] == np.__version__
    assert report["counts"][str(variant)] == found.pairs.counts()
    assert all(part["pairs"] for part in found.pairs.counts().values())
    with monkeypatch.context() as patch:  # all is done: no model is loaded again
        patch.delattr(prepare.RewardModel, "load")
        assert main([*argv, *flags, "--batch-size", "3"]) == report
    assert json.loads((tmp_path / "out/report.json").read_text()) == report
    with pytest.raises(ValueError, match="begun with other arguments: seed 0 → 1"):
        main([*argv, *flags, "--seed", "1"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_killed_prepare_continues(tmp_path, monkeypatch):
    for module in ("torch", "transformers"):
        pytest.importorskip(module, reason=EMBED)
    pytest.importorskip("tqdm", reason=EXTRA)
    write_tldr(tmp_path / "data")
    argv = ["--data", str(tmp_path / "data"), "--device", "cpu", "--save-seconds", "0"]
    argv += ["--model", str(sources.save_tiny(tmp_path / "model"))]
    argv += ["--model-dtype", "float32", "--table-dtype", "float32"]
    tldr.main([*argv, "--out", str(tmp_path / "whole")])
    real, rows = prepare.RewardModel.features, []

    def killed(self, batch):
        if rows:
            raise KeyboardInterrupt
        rows.extend(batch)
        return real(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(prepare.RewardModel, "features", killed)
        with pytest.raises(KeyboardInterrupt):
            tldr.main([*argv, "--out", str(tmp_path / "killed")])
    marker = tmp_path / "killed/features.json"
    assert 0 < json.loads(marker.read_text())["done"] == len(rows) < 320
    assert not (tmp_path / "killed/report.json").exists()
    tldr.main([*argv, "--out", str(tmp_path / "killed")])
    whole, again = (prepared.load(tmp_path / name) for name in ("whole", "killed"))
    np.testing.assert_allclose(again.features, whole.features, atol=1e-5)
    np.testing.assert_array_equal(again.pairs.chosen, whole.pairs.chosen)


def test_prepare_reads_the_hubs_own_types(monkeypatch):
    datasets = pytest.importorskip("datasets", reason=EMBED)
    asked = []

    def load_dataset(*args, split, revision, trust_remote_code):
        asked.append((*args, split, revision, trust_remote_code))
        return datasets.Dataset.from_list(
            sources.tldr_rows(split), features=sources.tldr_features()
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = tldr.SOURCE, tldr.CONFIG
    rows = {s: prepare.read_rows(*source, s, None, "0" * 40) for s in SPLITS}
    assert asked == [(*source, split, "0" * 40, False) for split in SPLITS]
    from_hub, plain = tldr.build(rows), tldr.build(tldr_splits())
    assert from_hub[0].hashes == plain[0].hashes
    np.testing.assert_array_equal(from_hub[1].chosen, plain[1].chosen)


def test_the_commit_of_a_data_set_is_looked_up_and_recorded(monkeypatch, capsys):
    hub = pytest.importorskip("huggingface_hub", reason=EMBED)
    asked = []

    class Api:
        def dataset_info(self, source, revision):
            asked.append((source, revision))
            if revision == "away":
                raise ConnectionError("no network")
            return types.SimpleNamespace(sha="c" * 40)

    monkeypatch.setattr(hub, "HfApi", Api)

    def pinned(*flags):
        args = prepare.make_parser("x", "y").parse_args(flags)
        prepare.pin_data(args, "some/data")
        return args.data_revision

    assert pinned() == "c" * 40
    assert pinned("--data-revision", "v1") == "c" * 40
    assert pinned("--data-revision", "away") == "away"
    assert "some/data is not recorded" in capsys.readouterr().err
    assert asked == [("some/data", name) for name in (None, "v1", "away")]
    assert pinned("--data-revision", "a" * 40) == "a" * 40
    assert pinned("--data", "folder") is None
    assert len(asked) == 3


def test_a_broken_line_of_a_source_is_named(tmp_path):
    path = tmp_path / "train.jsonl"
    for bad in (b'{"b": \n', b'"\xe9"\n', b"[" * 100_000):
        path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n' + bad)
        with pytest.raises(ValueError, match=r"train\.jsonl, row [01]: "):
            prepare.read_rows("x", None, "train", tmp_path)
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n')
    assert prepare.read_rows("x", None, "train", tmp_path) == [{"a": 1}]
    (tmp_path / "test.parquet").write_bytes(b"PAR1")
    pytest.importorskip("pyarrow", reason=EMBED)
    with pytest.raises(ValueError, match=r"test\.parquet is no whole Parquet file"):
        prepare.read_rows("x", None, "test", tmp_path)


def test_prepare_reads_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason=EMBED)
    parquet = pytest.importorskip("pyarrow.parquet", reason=EMBED)
    rows = sources.personal_rows("train")
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    assert prepare.read_rows("x", None, "train", tmp_path) == rows
    with pytest.raises(FileNotFoundError, match=r"none of \['test'\]"):
        prepare.read_rows("x", None, "test", tmp_path)


@pytest.mark.parametrize("main", [tldr.main, prism.main, personal_llm.main])
def test_help(main, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "--leak-threshold" in capsys.readouterr().out


# --- the format ------------------------------------------------------------------


def test_pair_table_keeps_everything(tmp_path):
    table = prepared.PairTable.from_columns(
        user=["b", "a", "b"], unit=["u", "v", "w"], group=["g", "h", "i"],
        chosen=[0, 1, 2], rejected=[3, 4, 5], seen=[True, False, True],
        heldout=[False, False, True], label=[1, 0.5, 1], weight=None,
    )  # fmt: skip
    assert table.users.tolist() == ["a", "b"]
    assert table.seen.tolist() == [False, True]
    table.save(tmp_path / "pairs.npz")
    again = prepared.PairTable.load(tmp_path / "pairs.npz")
    assert again.weight is None
    for name in ("users", "seen", "user", "unit", "chosen", "heldout", "label"):
        np.testing.assert_array_equal(getattr(again, name), getattr(table, name))
    assert list(tmp_path.iterdir()) == [tmp_path / "pairs.npz"]
    with pytest.raises(ValueError, match="compares row 1 with itself"):
        prepared.PairTable.from_columns(
            user=["a"], unit=["u"], group=["g"], chosen=[1], rejected=[1],
            seen=[True], heldout=[True],
        )  # fmt: skip


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_ready_embeddings_are_written_and_read(tmp_path, dtype):
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="comes with jax")
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    features = np.random.default_rng(0).normal(size=(6, 3)).astype(kind)
    prepared.write_features(tmp_path, features, head=np.ones((1, 3)))
    found = prepared.load_features(tmp_path)
    assert str(found.dtype) == ("bfloat16" if dtype == "bfloat16" else "float32")
    np.testing.assert_array_equal(found, features.astype(found.dtype))
    assert np.load(tmp_path / "head.npy").shape == (3,)


def two_pairs(**changes):
    return prepared.PairTable.from_columns(
        **{
            **dict(user=["a", "b"], unit=["u", "v"], group=["g", "h"]),
            **dict(chosen=[0, 1], rejected=[2, 3], seen=[True, False]),
            **dict(heldout=[False, True], weight=[1.0, 2.0]),
            **changes,
        }
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(user=np.array([0, 5], np.int32)), "user must hold integers from 0 to 1"),
        (dict(chosen=np.array([-1, 1], np.int32)), "chosen must hold integers"),
        (dict(chosen=np.array([2, 1], np.int32)), "chosen and rejected are the same"),
        (dict(chosen=np.array([0, 1, 2], np.int32)), r"chosen has shape \(3,\)"),
        (dict(weight=np.array([np.nan, 1])), "weight must be from 0"),
        (dict(seen=np.array([1, 2])), "seen must be bool"),
        (dict(users=np.array([1, 2])), "users must be texts"),
    ],
)
def test_a_pair_table_that_cannot_be_is_refused(tmp_path, change, message):
    path = tmp_path / "pairs.npz"
    stored.write_arrays(path, **{**vars(two_pairs()), "label": np.ones(2), **change})
    with pytest.raises(ValueError, match=rf"pairs\.npz is damaged: {message}"):
        prepared.PairTable.load(path)


def test_damaged_npz_files_are_refused(tmp_path):
    path = tmp_path / "pairs.npz"
    two_pairs().save(path)
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    for trial in range(200):
        changed = bytearray(content)
        changed[rng.integers(len(changed))] ^= 1 << rng.integers(8)
        path.write_bytes(
            changed if trial % 2 else content[: rng.integers(len(content))]
        )
        try:
            found = prepared.PairTable.load(path)
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017
        else:  # Dates and such in the archive's directory.
            np.testing.assert_array_equal(found.chosen, [0, 1])
    with zipfile.ZipFile(path, "w") as archive:
        head = {"descr": "<f8", "fortran_order": False, "shape": (1 << 50,)}
        text = repr(head).encode()
        size = len(text).to_bytes(2, "little")
        archive.writestr("users.npy", b"\x93NUMPY\x01\x00" + size + text)
    with pytest.raises(ValueError, match=r"pairs\.npz is no whole .*makes 9007"):
        prepared.PairTable.load(path)
    stored.write_arrays(path, evil=np.zeros(3))
    with pytest.raises(ValueError, match=r"no pair table: .*unexpected \['evil'\]"):
        prepared.PairTable.load(path)


def test_a_head_of_another_table_is_refused(tmp_path):
    features = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    two_pairs().save(tmp_path / "pairs.npz")
    stored.write_json(tmp_path / "config.json", {})
    prepared.write_features(tmp_path, features, head=np.ones(3))
    assert prepared.load(tmp_path).head.tolist() == [1, 1, 1]
    stored.write_array(tmp_path / "head.npy", np.zeros(3, np.float32))
    with pytest.raises(ValueError, match=r"head\.npy belongs to another feature table"):
        prepared.load(tmp_path)
    prepared.write_features(tmp_path, features)
    assert prepared.load(tmp_path).head is None
    assert not (tmp_path / "head.npy").exists()
    prepared.write_features(tmp_path, features[:3])
    with pytest.raises(ValueError, match="a pair asks for row 3, but there are 3"):
        prepared.load(tmp_path)


def test_damaged_feature_files_name_themselves(tmp_path):
    features = np.ones((6, 3), np.float32)
    prepared.write_features(tmp_path, features)
    path = tmp_path / "features.npy"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"features\.npy is no whole \.npy file"):
        prepared.load_features(tmp_path)
    (tmp_path / "features.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"features\.json is no JSON"):
        prepared.load_features(tmp_path)


def test_prepared_pairs_become_preferences(tmp_path):
    features = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    table = prepared.PairTable.from_columns(
        user=["b", "a", "b"], unit=["u", "v", "w"], group=["g", "h", "i"],
        chosen=[0, 1, 2], rejected=[3, 4, 5], seen=[True, False, True],
        heldout=[False, False, True],
    )  # fmt: skip
    found = prepared.Prepared(tmp_path, table, features, None, {})
    prefs = found.preferences(table.select(table.mask(seen=True)))
    assert prefs.num_users == 1
    np.testing.assert_array_equal(np.asarray(prefs.features), features[[0, 2, 3, 5]])
    np.testing.assert_array_equal(np.asarray(prefs.chosen), [0, 1])
    np.testing.assert_array_equal(np.asarray(prefs.rejected), [2, 3])
