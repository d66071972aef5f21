"""`hf.export_head`, on tiny models that are made here."""

import doctest
import importlib
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from fixtures import sources
from hf_cases import D, K, bert, some_texts

torch = pytest.importorskip("torch", reason="needs the extra 'hf'")
transformers = pytest.importorskip("transformers", reason="needs the extra 'hf'")

import lore_jax as lore  # noqa: E402
from lore_jax import hf  # noqa: E402
from lore_jax.hf.text_model import TextModel  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def roberta():
    """Its head is a module of two layers; its positions start behind the padding."""
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        vocab_size=262, hidden_size=D, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=512, num_labels=1,
        initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.RobertaForSequenceClassification(config).eval()


def reward_model(seed=0):
    """A model over the features of `tiny_model`, T = 0.5."""
    basis = np.random.default_rng(seed).normal(size=(D, K)).astype(np.float32)
    return lore.RewardModel(basis, temperature=0.5)


def some_users():
    weights = np.random.default_rng(1).dirichlet(np.ones(K), 2).astype(np.float32)
    one = np.ones(2)
    return lore.Adapted(
        weights, np.log(weights), one, one, one > 0, one.astype(np.int32),
        user_ids=np.array(["ann", "bob"]), std=np.full((2, K), 0.1, np.float32),
    )  # fmt: skip


def logits_of(model, tokenizer, texts, side):
    """As a user of transformers computes them: one padded batch."""
    rendered = [tokenizer.apply_chat_template(text, tokenize=False) for text in texts]
    tokenizer.padding_side = side
    inputs = tokenizer(
        rendered, add_special_tokens=False, padding=True, return_tensors="pt"
    )
    with torch.inference_mode():
        return model(inputs["input_ids"], inputs["attention_mask"]).logits


def scores_of(model, texts, rewards, weights, **settings):
    """`lore.score` of the features of the texts, [M, U]."""
    features = hf.embed(texts, *model, **settings)
    return np.asarray(lore.score(rewards, weights, features)).T


def export(tmp_path, user, base):
    """(folder of a base, folder of its export, weights of the outputs)."""
    users = some_users()
    base.save_pretrained(tmp_path / "base")
    sources.tiny_tokenizer().save_pretrained(tmp_path / "base")
    path = hf.export_head(
        reward_model(), tmp_path / "base", path=tmp_path / "new", user=user, users=users
    )
    weights = np.eye(K, dtype=np.float32) if user is None else users.weights[1:]
    return tmp_path / "base", path, weights


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("user", [None, "bob"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_reloaded_logits_are_rewards(tmp_path, side, user, stored):
    model, texts = sources.tiny_model().to(getattr(torch, stored)), some_texts()[:-2]
    base, path, weights = export(tmp_path, user, model)
    auto = transformers.AutoModelForSequenceClassification
    reloaded, info = auto.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    given, settings = (base,), dict(dtype="float32", device="cpu")
    wanted = scores_of(given, texts, reward_model(), weights, **settings)
    found = logits_of(reloaded, tokenizer, texts, side)
    assert found.shape == (len(texts), len(weights))
    np.testing.assert_allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("user", [None, "bob"])
def test_rewards_in_bfloat16(tmp_path, side, user):
    """`load_head` is exact; transformers alone rounds the head and the logits."""
    texts, half = some_texts()[:-2], dict(dtype="bfloat16", device="cpu")
    base, path, weights = export(tmp_path, user, sources.tiny_model())
    model, tokenizer = hf.load_head(path, **half)
    assert (model.dtype, model.score.weight.dtype) == (torch.bfloat16, torch.float32)
    half |= {"padding_side": side}
    wanted = scores_of((base,), texts, reward_model(), weights, **half)
    reader = TextModel(model, tokenizer, padding_side=side)
    batch = [reader.tokens(text) for text in texts]
    with torch.inference_mode():
        found = model(**reader.inputs(batch)).logits
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    auto = transformers.AutoModelForSequenceClassification
    plain = auto.from_pretrained(path, dtype=torch.bfloat16)
    with torch.inference_mode():
        rounded = plain(**reader.inputs(batch)).logits.float().numpy()
    error = np.abs(rounded - wanted).max() / np.abs(wanted).max()
    assert 1e-4 < error < 2**-6


BASES = {
    "language model": lambda: sources.tiny_model().model,
    "another head": lambda: sources.tiny_model(labels=5),
    "encoder": bert,
    "nested head": roberta,
}


@pytest.mark.parametrize("name", BASES)
def test_other_bases(tmp_path, name):
    base, texts, rewards = BASES[name](), some_texts()[:-2], reward_model()
    before = {key: x.clone() for key, x in base.state_dict().items()}
    tokenizer = sources.tiny_tokenizer()
    path = hf.export_head(rewards, base, path=tmp_path / "new", tokenizer=tokenizer)
    model, tokenizer = hf.load_head(path, device="cpu")
    weights = np.eye(K, dtype=np.float32)
    wanted = scores_of((base, tokenizer), texts, rewards, weights)
    found = logits_of(model, tokenizer, texts, "right")
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    after = base.state_dict()  # The base is not changed.
    assert all(torch.equal(after[key], x) for key, x in before.items())
    assert after.keys() == before.keys()


def test_a_base_by_name_keeps_its_precision(tmp_path):
    sources.tiny_model().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    sources.tiny_tokenizer().save_pretrained(tmp_path / "base")
    path = hf.export_head(reward_model(), tmp_path / "base", path=tmp_path / "new")
    found = transformers.AutoModelForSequenceClassification.from_pretrained(path)
    assert found.dtype == torch.bfloat16
    assert str(tmp_path) not in (path / "README.md").read_text()


def test_a_pipeline_gives_the_scores_by_name(tmp_path):
    path = hf.export_head(
        rewards := reward_model(), base := sources.tiny_model(), path=tmp_path / "new",
        tokenizer=sources.tiny_tokenizer(),
    )  # fmt: skip
    pipe = transformers.pipeline("text-classification", model=str(path), device="cpu")
    found = {x["label"]: x["score"] for x in pipe("A text.", top_k=None)}
    features = hf.embed(["A text."], base, sources.tiny_tokenizer())
    scores = np.asarray(lore.score(rewards, np.eye(K), features))[:, 0]
    assert set(found) == {f"direction_{k}" for k in range(K)}
    np.testing.assert_allclose(
        [found[f"direction_{k}"] for k in range(K)], scores, atol=1e-4
    )


def test_the_card_and_configuration(tmp_path):
    users, rewards = some_users(), reward_model()
    settings = dict(
        tokenizer=sources.tiny_tokenizer(), users=users, licence="apache-2.0",
        data="votes of | two towns", base_name="org/base",
    )  # fmt: skip
    path = hf.export_head(
        rewards, sources.tiny_model(), path=tmp_path / "k", **settings
    )
    card = (path / "README.md").read_text()
    assert card.startswith('---\nlicense: "apache-2.0"\nbase_model: "org/base"\n')
    for line in (
        "| rank K | 3 |",
        "| features D | 16 |",
        "| temperature T | 0.5 |",
        "| users whose weights were estimated | 2 |",
        r"| data | votes of \| two towns |",
        "0.3333, 0.3333, 0.3333",  # Dirichlet(1)
    ):
        assert line in card
    config = json.loads((path / "config.json").read_text())
    assert config["lore"]["temperature"] == 0.5
    assert config["problem_type"] == "regression"
    card = hf.export_head(
        rewards, sources.tiny_model(), path=tmp_path / "one", user="bob", **settings
    ).joinpath("README.md").read_text()  # fmt: skip
    rows = re.findall(r"^\| (\d) \| ([\d.]+) \| ([\d.]+) to ([\d.]+) \|$", card, re.M)
    p = users.weights[1]
    low, high = np.clip(p - 0.1645, 0, 1), np.clip(p + 0.1645, 0, 1)
    wanted = np.stack([np.arange(K), p, low, high], axis=1)
    np.testing.assert_allclose(np.array(rows, float), wanted, atol=6e-5)


@pytest.mark.parametrize("form", ["K outputs", "one user"])
def test_the_code_of_the_card_runs(tmp_path, form):
    user = None if form == "K outputs" else some_users().weights[0]
    path = hf.export_head(
        rewards := reward_model(), base := sources.tiny_model(), user=user,
        path=tmp_path / "new", tokenizer=(tokenizer := sources.tiny_tokenizer()),
    )  # fmt: skip
    (code,) = re.findall(r"```python\n(.*?)```", (path / "README.md").read_text(), re.S)
    text, weights = some_texts()[0], some_users().weights[0]
    names = {"folder": str(path), "messages": text, "weights": torch.tensor(weights)}
    exec(code, names)
    wanted = scores_of((base, tokenizer), [text], rewards, weights[None])[0, 0]
    np.testing.assert_allclose(names["reward"].item(), wanted, atol=1e-4)


EXPORTS = {
    "no users": (dict(user="ann"), "users must be what adapt or fit returned"),
    "unknown": (dict(user="eve", users=some_users()), "'eve', which is not in"),
    "shape": (dict(user=[0.5, 0.5]), r"float\[K\] with K=3"),
    "logits": (dict(user=[3.0, 1.0, 0.0]), "simplex"),
    "features": (
        dict(model=lore.RewardModel(np.eye(5, 3, dtype=np.float32))),
        "base has 16 features and model D=5",
    ),
    "encoder": (
        dict(base=bert().bert),
        "has layers that base lacks|model's own logits",
    ),
    "not empty": (dict(path="."), "path must be a new or an empty folder"),
}


@pytest.mark.parametrize(("changes", "message"), EXPORTS.values(), ids=EXPORTS.keys())
def test_impossible_exports_are_refused(tmp_path, changes, message):
    settings = {
        "model": reward_model(),
        "base": sources.tiny_model(),
        "path": tmp_path / "new",
        "tokenizer": sources.tiny_tokenizer(),
        **changes,
    }
    with pytest.raises(ValueError, match=message):
        hf.export_head(**settings)
    assert not (tmp_path / "new").exists()


def test_a_model_is_expected():
    with pytest.raises(TypeError, match="model must be a RewardModel"):
        hf.export_head(np.eye(3), sources.tiny_model(), path="unused")


@pytest.mark.parametrize("name", ["datasets", "embedding", "export"])
def test_examples_run(name):
    module = importlib.import_module(f"lore_jax.hf.{name}")
    names = {"lore": lore, "np": np, "jax": jax}
    found = doctest.testmod(module, extraglobs=names)
    assert found.attempted
    assert not found.failed


@pytest.mark.filterwarnings("ignore:too few pairs to validate on:UserWarning")
def test_the_page_runs_with_a_tiny_model(tmp_path, monkeypatch):
    """All code of docs/huggingface.md, also what needs torch."""
    page = Path(__file__).parent.parent / "docs" / "huggingface.md"
    blocks = re.findall(r"```(?:python|text)\n(.*?)```", page.read_text(), re.S)
    sources.save_tiny(tmp_path / "my-reward-model")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec("\n".join(blocks), names)
    fitted, prefs = names["fitted"], names["prefs"]
    wanted = lore.score(fitted.model, fitted, prefs.features)[0, 0]
    np.testing.assert_allclose(names["reward"], wanted, atol=1e-4)
    assert (tmp_path / "ann" / "README.md").exists()
