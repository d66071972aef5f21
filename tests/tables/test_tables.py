"""Tables of one's own: read rightly, or refused with file, row and what was found."""

import gzip
import json

import pytest
from table_cases import HEADER, LINES, OBJECT, line, write_parquet

pytest.importorskip("pyarrow", reason="needs the extra 'experiments'")

from lore_jax.cli.tables import check_columns, read_columns, read_table

ROW = "a,Hi?,Hello.,Go away.\n"


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
    "column_that_no_row_fills": (
        "t.csv",
        "user,prompt,chosen,rejected,group\na,Hi?,Hello.,Go away.,\n",
    ),
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


@pytest.mark.parametrize("ending", ["csv", "jsonl", "json"])
def test_two_equal_sides_are_refused_with_their_row(put, ending):
    rows = [("a", "Hello.", "Go away."), ("b", "No.", "Yes."), ("c", "Yes.", "Yes.")]
    names = ("user", "chosen", "rejected")
    text = "\n".join(map(",".join, [names, *rows]))
    if ending != "csv":
        text = "\n".join(json.dumps(dict(zip(names, row))) for row in rows)
    if ending == "json":
        text = "[" + text.replace("\n", ",") + "]"
    path = put(f"t.{ending}", text)
    for read in (read_table, read_columns):
        columns = read(path)
        with pytest.raises(ValueError, match="row 2: chosen and rejected are the same"):
            check_columns(columns, path, None)


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
