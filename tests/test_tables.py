"""Tables of one's own: read rightly, or refused with file, row and what was found."""

import gzip
import json

import numpy as np
import pytest

pytest.importorskip("pyarrow", reason="needs the extra 'experiments'")

from experiments import from_table, prepared
from experiments.texts import TextIndex
from lore_jax.cli.tables import read_embeddings, read_table

HEADER = "user,prompt,chosen,rejected\n"
ROW = "a,Hi?,Hello.,Go away.\n"
OBJECT = {"user": "a", "prompt": "x", "chosen": "Yes x.", "rejected": "No x."}
LINES = "".join(
    json.dumps({"user": u, "prompt": q, "chosen": f"Yes {q}.", "rejected": f"No {q}."})
    + "\n"
    for u in "ab"
    for q in "xyz"
)


@pytest.fixture
def put(tmp_path):
    """Writes a file, and returns its path."""

    def write(name, content, encoding="utf-8"):
        path = tmp_path / name
        if isinstance(content, str):
            content = content.encode(encoding, "surrogatepass")
        path.write_bytes(content)
        return path

    return write


def line(**changes):
    return json.dumps({**OBJECT, **changes}) + "\n"


CSV = {
    "unquoted_comma": (
        HEADER + ROW + "a,Well, how are you?,Fine.,Bad.\n",
        r"row 1: 5 cells \['a', 'Well', ' how are you\?'.*4 columns.*must be quoted",
    ),
    "short_row": (HEADER + ROW + "a,Hi?,Hello.\n", "row 1: 3 cells"),
    "repeated_header": (
        "user,prompt,chosen,rejected,chosen\na,Hi?,1,2,3\n",
        r"columns \['chosen'\] stand twice",
    ),
    "unclosed_quote": (HEADER + ROW + 'a,"Hi?,Hello.,No.\n' + ROW, "row 1: .*broken"),
    "unclosed_last": (HEADER + ROW + 'a,Hi?,Hello.,"No.\n', "row 1: .*broken"),
    "quote_inside": (
        HEADER + 'a,"Hi,Hello,No\na,"Yo",Fine.,Bad.\n',
        "row 0: .*broken",
    ),
    "no_rows": (HEADER, "holds no rows"),
    "empty": ("", "holds no rows"),
    "no_user": (HEADER + ROW + ",Hi?,Hello.,No.\n", "row 1: no user"),
    "blank_user": (HEADER + ROW + "  ,Hi?,Hello.,No.\n", "row 1: no user"),
    "other_columns": (
        "who;what\na;b\n",
        r"missing columns \['user', 'chosen', 'rejected'\]; found \['who;what'\].*"
        "--user-column",
    ),
    "utf_16": ((HEADER + ROW).encode("utf-16"), "row -1: byte 0xff is not utf-8"),
    "latin_1": (
        (HEADER + ROW + "René,Hi?,Hello.,No.\n").encode("latin-1"),
        "row 1: byte 0xe9 is not utf-8; give .*--encoding",
    ),
    "latin_1_after_lines": (
        (HEADER + 'a,"Hi\n\nyou",Hello.,No.\n\nb,Hi?,Hé.,No.\n').encode("latin-1"),
        "row 1: byte 0xe9",
    ),
}


@pytest.mark.parametrize(("content", "message"), CSV.values(), ids=CSV)
def test_a_broken_csv_is_refused_with_its_row(put, content, message):
    path = put("t.csv", content)
    with pytest.raises(ValueError, match=message) as caught:
        read_table(path)
    assert str(path) in str(caught.value)


JSON = {
    "broken_line": (LINES + '{"user": "a", "prompt": \n', "row 6: Expecting value"),
    "broken_before": ('{"user": "a"\n' + LINES, "row 0: "),
    "nan_user": (LINES + line(user=float("nan")), "row 6: no user"),
    "null_user": (LINES + line(user=None), "row 6: no user"),
    "empty_user": (LINES + line(user=""), "row 6: no user"),
    "no_user": (LINES + '{"prompt": "x", "chosen": "1", "rejected": "2"}\n', "row 6"),
    "nan_group": (line(group=float("nan")) + line(group="t"), "row 0: no group"),
    "null_group": (line(group="t") + line(group=None), "row 1: no group"),
    "empty_group": (line(group="t") + line(group=""), "row 1: no group"),
    "text_and_number": (
        line(user="1") + line(user=1),
        "row 1: user is 1, but in row 0",
    ),
    "number_and_text": (line(user=1) + line(user="1"), "row 1: user is '1', but in"),
    "bool_user": (line(user=True) + line(user=False), "row 0: user must be a text"),
    "list_user": (line(user=["a"]), "row 0: user must be a text or an integer"),
    "half_user": (line(user=0.5), "row 0: user must be a text or an integer, got 0.5"),
    "name_twice": ('{"user": "a", "user": "b"}\n', "row 0: a name stands twice"),
    "no_object": (LINES + '"a"\n', "row 6: must be an object of columns"),
    "deep": (LINES + '{"user": ' + "[" * 100_000 + "\n", "row 6: "),
    "lone_surrogate_user": (
        LINES + line(user="a \ud83d"),
        "row 6: user holds half a character, the lone surrogate U\\+D83D, at place 2",
    ),
    "lone_surrogate": (
        LINES + line(chosen="Yes \ud83d."),
        "row 6: chosen holds half a character.*at place 4",
    ),
    "latin_1": (
        LINES.encode() + line().replace("a", "é", 1).encode("latin-1"),
        "row 6: byte 0xe9 is not utf-8",
    ),
}


@pytest.mark.parametrize(("content", "message"), JSON.values(), ids=JSON)
def test_a_broken_jsonl_is_refused_with_its_row(put, content, message):
    path = put("t.jsonl", content)
    with pytest.raises(ValueError, match=message) as caught:
        read_table(path)
    assert str(path) in str(caught.value)


WANTED = {"user": ["a"], "chosen": ["Hello."], "rejected": ["Go away."]}
WANTED["prompt"] = ["Hi?"]
READ = {
    "plain": ("t.csv", HEADER + ROW),
    "mark": ("t.csv", "\ufeff" + HEADER + ROW),
    "carriage_returns": ("t.csv", (HEADER + ROW).replace("\n", "\r\n")),
    "empty_lines": ("t.csv", "\n" + HEADER + "\n" + ROW + "\n\n"),
    "quoted": ("t.csv", HEADER + '"a","Hi?","Hello.","Go away."'),
    "semicolons": ("t.csv", (HEADER + ROW).replace(",", ";")),
    "tabs_in_csv": ("t.csv", (HEADER + ROW).replace(",", "\t")),
    "tsv": ("t.tsv", (HEADER + ROW).replace(",", "\t")),
    "upper_case": ("T.CSV", HEADER + ROW),
    "gzip": ("t.csv.gz", gzip.compress((HEADER + ROW).encode())),
    "upper_gzip": ("t.TSV.GZ", gzip.compress((HEADER + ROW).encode())),
}
OBJECT_ROW = json.dumps({name: values[0] for name, values in WANTED.items()})
READ |= {
    "jsonl": ("t.jsonl", OBJECT_ROW),
    "jsonl_mark": ("t.jsonl", "\ufeff" + OBJECT_ROW + "\n\n"),
    "jsonl_crlf": ("t.JSONL", OBJECT_ROW + "\r\n"),
    "jsonl_gzip": ("t.jsonl.gz", gzip.compress(OBJECT_ROW.encode())),
    "json_list": ("t.json", f"[\n{OBJECT_ROW}\n]"),
    "json_lines": ("t.json", OBJECT_ROW),
    "one_more_field": ("t.jsonl", OBJECT_ROW[:-1] + ', "x": [1, {"y": 2}]}'),
}


@pytest.mark.parametrize(("name", "content"), READ.values(), ids=READ)
def test_what_can_be_read_is_read_rightly(put, name, content):
    assert read_table(put(name, content)) == WANTED


def test_a_quote_inside_an_unquoted_cell_is_a_quote(put):
    path = put("t.csv", HEADER + 'a,5" pipe?,"say ""yes""",No.\n')
    found = read_table(path)
    assert (found["prompt"], found["chosen"]) == (['5" pipe?'], ['say "yes"'])


def test_a_cell_may_be_long_and_have_lines(put):
    text = "x,\n" * 70_000
    found = read_table(put("t.csv", f'{HEADER}a,Hi?,"{text}",No.\n'))
    assert found["chosen"] == [text]
    huge = "y" * (1 << 24)
    found = read_table(put("t.csv", f"{HEADER}a,Hi?,{huge},No.\n"))
    assert found["chosen"] == [huge]


def test_another_encoding_can_be_given(put):
    path = put("t.csv", HEADER + "René,Hi?,Hello.,No.\n", "latin-1")
    assert read_table(path, encoding="latin-1")["user"] == ["René"]
    path = put("t.csv", HEADER + "René,Hi?,Hello.,No.\n", "utf-16")
    assert read_table(path, encoding="utf-16")["user"] == ["René"]
    with pytest.raises(ValueError, match=r"t\.csv: unknown encoding: klingon"):
        read_table(path, encoding="klingon")


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_columns_may_have_other_names(put, tmp_path, ending):
    names = {"user": "who", "chosen": "better", "rejected": "worse", "label": "p"}
    row = {"who": "a", "better": "1", "worse": "2", "p": "0.5", "user": "not this"}
    if ending == "parquet":
        import pyarrow
        import pyarrow.parquet

        path = tmp_path / "t.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    else:
        csv = ",".join(row) + "\n" + ",".join(row.values())
        path = put(f"t.{ending}", csv if ending == "csv" else json.dumps(row))
    found = read_table(path, names)
    assert found == {
        "user": ["a"],
        "chosen": ["1"],
        "rejected": ["2"],
        "label": ["0.5"],
    }
    with pytest.raises(ValueError, match=r"missing columns \['g'\]; found \[.*'who'"):
        read_table(path, {**names, "group": "g"})
    with pytest.raises(ValueError, match=r"got \['users'\]"):
        read_table(path, {"users": "who"})


def write_parquet(path, **columns):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_missing_values_of_parquet_are_refused(tmp_path):
    path, texts = tmp_path / "t.parquet", {"chosen": ["1", "2"], "rejected": ["3", "4"]}
    with pytest.raises(ValueError, match=r"t\.parquet, row 1: no user"):
        read_table(write_parquet(path, user=["a", None], **texts))
    with pytest.raises(ValueError, match="row 1: no user"):
        read_table(write_parquet(path, user=[7.0, float("nan")], **texts))
    found = read_table(write_parquet(path, user=[7.0, 8.0], **texts))
    assert found["user"] == [7, 8]
    assert all(isinstance(user, int) for user in found["user"])
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"t\.parquet is no whole Parquet file"):
        read_table(path)


def test_truncated_gzip_and_unknown_endings_are_refused(put):
    path = put("t.csv.gz", gzip.compress((HEADER + ROW).encode())[:-9])
    with pytest.raises(ValueError, match=r"t\.csv\.gz is no whole gzip file"):
        read_table(path)
    for name in ("t.xlsx", "t.gz", "t", "csv"):
        with pytest.raises(ValueError, match=rf"{name} must end in \.parquet, \.csv"):
            read_table(put(name, "x"))


def test_arrow_and_python_read_the_same_lines(put, monkeypatch):
    """Texts that look like dates, numbers and nothing stay texts."""
    rows = [
        {**OBJECT, "user": text, "prompt": text}
        for text in ("2020-01-01", "7", "true", "null", "NaN", "é 𝄞", "a\u2028b")
    ]
    path = put("t.jsonl", "\n".join(map(json.dumps, rows)))
    fast = read_table(path)
    monkeypatch.setattr("lore_jax.cli.table_files._read_plain_json", lambda *_: None)
    assert read_table(path) == fast
    assert fast["user"] == [row["user"] for row in rows]


# --- texts and messages ----------------------------------------------------------


def say(*contents):
    roles = ("user", "assistant") * len(contents)
    return [{"role": r, "content": c} for r, c in zip(roles, contents)]


MESSAGES = {
    "whole": {"chosen": say("Hi?", "Yes."), "rejected": say("Hi?", "No.")},
    "whole_beside_a_prompt": {
        **{"prompt": "Hi?", "chosen": say("Hi?", "Yes.")},
        "rejected": say("Hi?", "No."),
    },
    "answers_after_a_text": {
        **{"prompt": "Hi?", "chosen": say("Hi?", "Yes.")[1:]},
        "rejected": say("Hi?", "No.")[1:],
    },
    "answers_after_messages": {
        **{"prompt": say("Hi?"), "chosen": say("Hi?", "Yes.")[1:]},
        "rejected": say("Hi?", "No.")[1:],
    },
    "texts_after_messages": {"prompt": say("Hi?"), "chosen": "Yes.", "rejected": "No."},
    "whole_after_messages": {
        **{"prompt": say("Hi?"), "chosen": say("Hi?", "Yes.")},
        "rejected": say("Hi?", "No."),
    },
}


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize("row", MESSAGES.values(), ids=MESSAGES)
def test_lists_of_messages_are_texts(put, tmp_path, row, ending):
    row = {"user": "a", **row}
    if ending == "parquet":
        columns = {name: [value] for name, value in row.items()}
        path = write_parquet(tmp_path / "t.parquet", **columns)
    else:
        path = put("t.jsonl", json.dumps(row))
    texts = TextIndex()
    found = from_table.text_rows(read_table(path), texts)
    assert texts.messages == [say("Hi?", "Yes."), say("Hi?", "No.")]
    assert (found["chosen"], found["rejected"]) == ([0], [1])
    assert len(found["prompt"]) == 1


WRONG = {
    "other_history": (
        {"chosen": say("Hi?", "Yes."), "rejected": say("Yo?", "No.")},
        ValueError,
        "row 0: chosen and rejected answer different messages",
    ),
    "no_answer": (
        {"chosen": say("Hi?"), "rejected": say("Hi?", "No.")},
        ValueError,
        "row 0, chosen: the last message must be the assistant's, the role is 'user'",
    ),
    "from_and_value": (
        {"chosen": [{"from": "gpt", "value": "x"}], "rejected": say("Hi?", "No.")},
        ValueError,
        "row 0, chosen: the last message must be the assistant's, the role is None",
    ),
    "parts": (
        {"chosen": say("Hi?", [{"text": "x"}]), "rejected": say("Hi?", "No.")},
        TypeError,
        "row 0, chosen: message 1 .*must be a string, got list",
    ),
    "strings": (
        {"prompt": "Hi?", "chosen": ["Yes."], "rejected": ["No."]},
        TypeError,
        "row 0, chosen: message 1 .*must be a string, got list",
    ),
    "surrogate": (
        {"chosen": say("Hi?", "Yes \ud83d"), "rejected": say("Hi?", "No.")},
        ValueError,
        "row 0, chosen: message 1: content holds half a character.*U\\+D83D",
    ),
}


@pytest.mark.parametrize(("row", "error", "message"), WRONG.values(), ids=WRONG)
def test_messages_that_cannot_be_meant_are_refused(put, tmp_path, row, error, message):
    path = put("t.jsonl", json.dumps({"user": "a", **row}))
    with pytest.raises(error, match=message) as caught:
        from_table.main([str(path), "--texts-only", "--out", str(tmp_path / "out")])
    assert str(path) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_table_of_messages_becomes_pairs(put, tmp_path):
    rows = [
        {"user": u, "chosen": say(q, f"Yes {u}."), "rejected": say(q, f"No {u}.")}
        for u in "abcd"
        for q in ("x?", "y?", "z?", "w?")
    ]
    path = put("t.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    argv = [str(path), "--texts-only", "--out", str(tmp_path / "out")]
    assert from_table.main(argv) == []
    assert len(prepared.PairTable.load(tmp_path / "out/prepared/pairs.npz")) > 0


def test_column_flags_of_the_command(put, tmp_path):
    rows = [line.split(",") for line in LINES_AS_CSV.splitlines()]
    text = "\n".join(",".join(row) for row in rows)
    path = put("t.csv", text.replace("user,", "who,", 1), "latin-1")
    argv = [str(path), "--texts-only", "--out", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="--encoding"):
        from_table.main(argv)
    argv += ["--encoding", "latin-1"]
    with pytest.raises(ValueError, match=r"missing columns \['user'\]; found \['who'"):
        from_table.main(argv)
    assert from_table.main([*argv, "--user-column", "who"]) == []
    with pytest.raises(ValueError, match="other arguments: columns"):
        from_table.main([*argv, "--user-column", "who", "--group-column", "prompt"])


LINES_AS_CSV = HEADER + "".join(
    f"{user},Frage {q}?,Gut {q} {user}.,Nein {q} {user}.\n"
    for user in ("René", "Zoë", "Ann")
    for q in "uvwxyz"
)


# --- nobody left, nothing weighs -------------------------------------------------


def columns(users, prompts, **more):
    user = [u for u in users for _ in range(prompts)]
    prompt = [f"{u} {q}" for u in users for q in range(prompts)]
    rows = np.arange(2 * len(user)).reshape(2, -1).tolist()
    return {
        "user": user,
        "prompt": prompt,
        "chosen": rows[0],
        "rejected": rows[1],
        **more,
    }


@pytest.mark.parametrize(
    ("users", "prompts", "message"),
    [
        ("a", 9, "at least two users"),
        ("ab", 1, "there are no held-out pairs of seen people.*--heldout-share"),
    ],
)
def test_nobody_left_to_test_on_is_refused(users, prompts, message):
    with pytest.raises(ValueError, match=message):
        from_table.build(columns(users, prompts))


def test_a_part_that_weighs_nothing_is_refused():
    found = columns("abcd", 5)
    table, *_ = from_table.build(found)
    for seen in (True, False):
        for heldout in (True, False):
            part = table.select(table.mask(seen=seen, heldout=heldout))
            weight = [0.0 if row in part.chosen else 1.0 for row in found["chosen"]]
            with pytest.raises(ValueError, match=r"every weight of the .* is 0"):
                from_table.build({**found, "weight": weight})


def test_one_person_on_a_side_is_said(put, tmp_path, capsys):
    path = put("t.jsonl", LINES)
    from_table.main([str(path), "--texts-only", "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert "only 1 person is unseen: intervals over people say nothing" in said


# --- embeddings ------------------------------------------------------------------


def test_other_embeddings_than_npy_and_safetensors_are_refused(put):
    for name in ("e.pt", "e.bin", "e.pkl", "e.npz"):
        with pytest.raises(
            ValueError, match=rf"{name} must end in \.npy or .*run code"
        ):
            read_embeddings(put(name, b"\x80\x04K\x01."))


def test_damaged_embeddings_are_refused(put, tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((4, 3), np.float32))
    content = (tmp_path / "x.npy").read_bytes()
    huge = content.replace(b"(4, 3), ", b"(4, 300000000000), ", 1)
    for damaged in (content[:-3], content[:20], b"", huge, b"\x80\x04K\x01."):
        with pytest.raises(ValueError, match=r"x\.npy cannot be read"):
            read_embeddings(put("x.npy", damaged))
    np.save(tmp_path / "o.npy", np.array([[{}]]), allow_pickle=True)
    with pytest.raises(ValueError, match=r"o\.npy cannot be read.*values are .*O"):
        read_embeddings(tmp_path / "o.npy")
    np.save(tmp_path / "i.npy", np.zeros((4, 3), np.int64))
    with pytest.raises(ValueError, match=r"i\.npy must hold floating numbers"):
        read_embeddings(tmp_path / "i.npy")
    with pytest.raises(FileNotFoundError):
        read_embeddings(tmp_path / "absent.npy")
    header = b'{"a": {"dtype": "F32", "shape": [99999999999], "data_offsets": [0, 4]}}'
    for damaged in (b"", b"x" * 99, len(header).to_bytes(8, "little") + header):
        with pytest.raises(ValueError, match=r"x\.safetensors cannot be read"):
            read_embeddings(put("x.safetensors", damaged))


def test_bfloat16_embeddings_are_read(tmp_path):
    import ml_dtypes
    from safetensors.numpy import save_file

    features = np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16)
    save_file({"x": features}, tmp_path / "x.safetensors")
    found = read_embeddings(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(found.astype(np.float32), features.astype(np.float32))
