"""`hf.embed`, on tiny models that are made here."""

import json
import sys
import types

import numpy as np
import pytest
from fixtures import sources
from hf_cases import D, bert, some_texts

torch = pytest.importorskip("torch", reason="needs the extra 'hf'")
transformers = pytest.importorskip("transformers", reason="needs the extra 'hf'")

from lore_jax import hf  # noqa: E402
from lore_jax.hf.text_model import TextModel  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def one_by_one(model, texts, tokenizer=None):
    """float32[M, D]: each text alone, without padding, its last hidden state."""
    tokenizer = tokenizer or sources.tiny_tokenizer()
    rows = []
    for text in texts:
        plain = isinstance(text, str)
        if not plain:
            text = tokenizer.apply_chat_template(text, tokenize=False)
        ids = tokenizer(text, add_special_tokens=plain, return_tensors="pt")
        with torch.inference_mode():
            hidden = model.base_model(ids["input_ids"]).last_hidden_state
        rows.append(hidden[0, -1].float().numpy())
    return np.stack(rows)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["reward", "language"])
def test_features_are_the_last_hidden_states(kind, side):
    model, texts = sources.tiny_model(), some_texts()
    wanted = one_by_one(model, texts)
    given = model if kind == "reward" else model.model
    found = hf.embed(
        texts, given, sources.tiny_tokenizer(), padding_side=side, batch_size=5
    )
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=2e-5)


def test_an_encoder_gives_what_its_head_reads():
    model, tokenizer, texts = bert(labels=2), sources.tiny_tokenizer(), some_texts()
    found = hf.embed(texts, model, tokenizer, batch_size=4)
    head = model.classifier
    for text, row in zip(texts, found):
        plain = isinstance(text, str)
        if not plain:
            text = tokenizer.apply_chat_template(text, tokenize=False)
        ids = tokenizer(text, add_special_tokens=plain, return_tensors="pt")
        with torch.inference_mode():
            logits = model(ids["input_ids"], ids["attention_mask"]).logits[0]
            ours = torch.from_numpy(row) @ head.weight.T + head.bias
        np.testing.assert_allclose(ours, logits, atol=1e-5)


def test_a_bfloat16_model_gives_an_exact_bfloat16_table():
    model, texts = sources.tiny_model().to(torch.bfloat16), some_texts()
    found = hf.embed(texts, model, sources.tiny_tokenizer(), batch_size=1)
    assert str(found.dtype) == "bfloat16"
    # Alone in its batch, a text is computed as in the oracle.
    np.testing.assert_array_equal(found.astype(np.float32), one_by_one(model, texts))


def test_models_by_name_in_the_precision_that_is_asked_for(tmp_path):
    sources.save_tiny(tmp_path)
    texts = some_texts()
    wanted = one_by_one(sources.tiny_model(), texts)
    found = hf.embed(texts, str(tmp_path), device="cpu")
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    half = hf.embed(texts, tmp_path, device="cpu", dtype="bfloat16")
    assert str(half.dtype) == "bfloat16"
    np.testing.assert_allclose(half.astype(np.float32), wanted, atol=0.3)
    with pytest.raises(ValueError, match="dtype is for a model that is loaded by"):
        hf.embed(texts, sources.tiny_model(), tmp_path, dtype="bfloat16")
    with pytest.raises(ValueError, match="tokenizer must be given"):
        hf.embed(texts, sources.tiny_model())


def test_a_language_model_is_no_reward_model(tmp_path):
    sources.tiny_model().model.save_pretrained(tmp_path)
    sources.tiny_tokenizer().save_pretrained(tmp_path)
    texts = some_texts()
    found = hf.embed(texts, tmp_path, device="cpu")
    np.testing.assert_allclose(
        found, one_by_one(sources.tiny_model(), texts), atol=2e-5
    )
    with pytest.raises(ValueError, match=r"lacks \['score\.weight'\]"):
        hf.embed(texts, tmp_path, kind="reward", device="cpu")
    with pytest.raises(ValueError, match="LlamaModel has no linear head"):
        hf.embed(texts, sources.tiny_model().model, tmp_path, kind="reward")


def test_a_pickled_checkpoint_is_not_opened(tmp_path):
    sources.save_tiny(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        hf.embed(["x"], tmp_path, device="cpu")


def test_a_wrong_head_is_noticed(monkeypatch):
    def first_token(self, batch):
        hidden = self.base(**self.inputs(batch)).last_hidden_state
        return hidden[:, 0].detach().float().numpy()

    monkeypatch.setattr(TextModel, "features", first_token)
    with pytest.raises(ValueError, match="model's own logits"):
        hf.embed(some_texts(), sources.tiny_model(), sources.tiny_tokenizer())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_stopped_table_is_continued(tmp_path, monkeypatch, dtype):
    texts, tokenizer = some_texts(), sources.tiny_tokenizer()
    model = sources.tiny_model().to(getattr(torch, dtype))
    whole = hf.embed(texts, model, tokenizer, batch_size=1)
    real, seen = TextModel.features, []

    def stopped(self, batch):
        if len(seen) >= 6:
            raise KeyboardInterrupt
        seen.extend(batch)
        return real(self, batch)

    from lore_jax.hf import table

    monkeypatch.setattr(table, "SAVE_SECONDS", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(TextModel, "features", stopped)
        with pytest.raises(KeyboardInterrupt):
            hf.embed(texts, model, tokenizer, folder=tmp_path, batch_size=3)
    assert json.loads((tmp_path / "features.json").read_text())["done"] == 6

    def counted(self, batch):
        seen.extend(batch)
        return real(self, batch)

    bars = []

    class Bar:
        def __init__(self, **settings):
            self.settings, self.steps = settings, 0
            bars.append(self)

        def update(self, steps):
            self.steps += steps

        def close(self):
            self.closed = True

    monkeypatch.setattr(TextModel, "features", counted)
    settings = dict(folder=tmp_path, batch_size=1)
    found = hf.embed(texts, model, tokenizer, **settings, progress=Bar)
    assert len(seen) == len(texts)
    (bar,) = bars
    assert bar.settings == {"total": 14, "initial": 6, "desc": "embed"}
    assert bar.steps == 8
    assert bar.closed
    assert found.dtype == whole.dtype
    tolerance = 2e-5 if dtype == "float32" else 0.1  # Batches change bfloat16 sums.
    close = dict(atol=tolerance)
    np.testing.assert_allclose(*(x.astype(np.float32) for x in (found, whole)), **close)
    np.testing.assert_array_equal(
        np.load(tmp_path / "head.npy"), model.score.weight.detach().float().numpy().T
    )
    hf.embed(texts, model, tokenizer, **settings)
    assert len(seen) == len(texts)
    with pytest.raises(ValueError, match="table of something else: texts"):
        hf.embed(some_texts(seed=1), model, tokenizer, **settings)
    other = sources.tiny_model(seed=1).to(getattr(torch, dtype))
    with pytest.raises(ValueError, match="table of something else: weights"):
        hf.embed(texts, other, tokenizer, **settings)


def test_batches_hold_texts_of_similar_length_longest_first(monkeypatch):
    real, shapes = TextModel.features, []

    def watched(self, batch):
        shapes.append([len(ids) for ids in batch])
        return real(self, batch)

    monkeypatch.setattr(TextModel, "features", watched)
    texts = some_texts(30)
    hf.embed(texts, sources.tiny_model(), sources.tiny_tokenizer(), batch_tokens=400)
    lengths = [n for batch in shapes for n in batch]
    assert lengths == sorted(lengths, reverse=True)
    assert all(len(b) == 1 or max(b) * len(b) <= 400 for b in shapes)
    assert 1 < len(shapes) < 30


def test_long_texts_keep_their_end():
    model, tokenizer = sources.tiny_model(), sources.tiny_tokenizer()
    reader = TextModel(model, tokenizer, max_length=20)
    whole = TextModel(model, tokenizer).tokens(text := some_texts()[0])
    np.testing.assert_array_equal(reader.tokens(text), [whole[0], *whole[-19:]])
    assert TextModel(bert(), tokenizer).max_length == 512


class SentenceTransformer:
    """Stands in for the package: its class name and `encode`."""

    def __init__(self, *arguments, **settings):
        self.built = arguments, settings

    def encode(self, texts, **settings):
        assert settings["convert_to_numpy"]
        return np.array([[len(text), 1.0] for text in texts], np.float64)


def test_sentence_transformers(monkeypatch):
    wanted = [[1, 1], [2, 1]]
    found = hf.embed(["a", "bb"], SentenceTransformer())
    assert found.dtype == np.float32
    assert found.tolist() == wanted
    package = types.ModuleType("sentence_transformers")
    package.SentenceTransformer = SentenceTransformer
    monkeypatch.setitem(sys.modules, "sentence_transformers", package)
    assert hf.embed(["a", "bb"], "name", kind="sentence").tolist() == wanted
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match="pip install sentence-transformers"):
        hf.embed(["a"], "name", kind="sentence")
    with pytest.raises(TypeError, match="must be strings for a SentenceTransformer"):
        hf.embed(some_texts(), SentenceTransformer())


REFUSED = {
    "one string": (dict(texts="abc"), TypeError, "sequence of texts"),
    "none": (dict(texts=[]), ValueError, "at least one text"),
    "empty": (dict(texts=["a", ""]), ValueError, r"texts\[1\] must not be empty"),
    "content": (
        dict(texts=[[{"role": "user", "content": None}]]),
        TypeError,
        r"texts\[0\], message 0: content must be a string",
    ),
    "kind": (dict(kind="x"), ValueError, "kind must be"),
    "batch": (dict(batch_size=0), ValueError, "batch_size must be at least 1"),
    "length": (dict(max_length=0), ValueError, "max_length must be at least 1"),
    "side": (dict(padding_side="up"), ValueError, "padding_side must be"),
}


@pytest.mark.parametrize(
    ("changes", "kind", "message"), REFUSED.values(), ids=REFUSED.keys()
)
def test_impossible_settings_are_refused(changes, kind, message):
    settings = {"texts": ["a"], "model": sources.tiny_model(), **changes}
    with pytest.raises(kind, match=message):
        hf.embed(tokenizer=sources.tiny_tokenizer(), **settings)


def test_messages_need_a_chat_template():
    tokenizer = sources.tiny_tokenizer()
    tokenizer.chat_template = None
    assert hf.embed(["a"], sources.tiny_model(), tokenizer).shape == (1, D)
    with pytest.raises(ValueError, match="no chat template: pass strings"):
        hf.embed(some_texts(), sources.tiny_model(), tokenizer)
