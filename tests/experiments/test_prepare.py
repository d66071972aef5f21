"""The whole of prepare, from raw files to a folder."""

import json
import types

import numpy as np
import pytest
from fixtures import sources
from prepare_cases import SPLITS, tldr_splits, write_prism

from experiments import prepare, prepared
from experiments.personal_llm import prepare as personal_llm
from experiments.prism import prepare as prism
from experiments.reddit_tldr import prepare as tldr

EXTRA = "needs the extra 'quickstart'"
EMBED = "needs the extra 'experiments'"


def write_tldr(folder):
    for split in SPLITS:
        sources.write_jsonl(
            folder / f"comparisons_{split}.jsonl", sources.tldr_rows(split)
        )


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
