"""Lists of messages in a table's cells: texts, or refused."""

import json

import pytest
from table_cases import HEADER, write_parquet

pytest.importorskip("pyarrow", reason="needs the extra 'experiments'")

from experiments import from_table, prepared
from experiments.texts import TextIndex
from lore_jax.cli.tables import read_table


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
