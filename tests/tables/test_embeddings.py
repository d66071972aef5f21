"""Embeddings given with a table, and tables that leave nobody to test on."""

import numpy as np
import pytest
from table_cases import LINES, columns

pytest.importorskip("pyarrow", reason="needs the extra 'experiments'")

from experiments import from_table
from lore_jax.cli.tables import read_embeddings


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
