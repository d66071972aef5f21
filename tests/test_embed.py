import json

import numpy as np
import pytest
from fixtures import sources

torch = pytest.importorskip("torch", reason="needs the extra 'experiments'")
pytest.importorskip("transformers", reason="needs the extra 'experiments'")
pytest.importorskip("tqdm", reason="needs the extra 'quickstart'")

from experiments import embed, prepared  # noqa: E402
from experiments.texts import TextIndex, load_responses  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
FLOAT = {"model_dtype": "float32", "table_dtype": "float32", "save_seconds": 0.0}


def reward_model(side="right", model=None, **changes):
    config = embed.EmbedConfig(
        model="tiny", device="cpu", padding_side=side, **{**FLOAT, **changes}
    )
    model = sources.tiny_model() if model is None else model
    return embed.RewardModel(model, sources.tiny_tokenizer(), config)


def some_texts(number=12):
    rng = np.random.default_rng(0)
    texts = TextIndex()
    for i in range(number):
        ask = {"role": "user", "content": sources.sentence(rng)}
        answer = {"role": "assistant", "content": sources.sentence(rng, 1, 30)}
        texts.add([ask, answer], f"row {i}")
    return texts


def one_by_one(reward, texts):
    """Each text alone, without padding: hidden state of the last token."""
    rows = []
    for messages in texts.messages:
        ids = torch.from_numpy(reward.tokens(messages).astype(np.int64))[None]
        with torch.inference_mode():
            rows.append(reward.model.model(input_ids=ids).last_hidden_state[0, -1])
    return torch.stack(rows).numpy()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(tmp_path, side):
    reward, texts = reward_model(side), some_texts()
    table = embed.embed_texts(reward, texts, tmp_path)
    np.testing.assert_allclose(table, one_by_one(reward, texts), atol=2e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_with_absolute_positions(side):
    from transformers import GPT2Config, GPT2ForSequenceClassification

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=262, n_embd=16, n_layer=2, n_head=2, n_positions=512, num_labels=1,
        initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    reward = reward_model(side, GPT2ForSequenceClassification(config))
    batch = [reward.tokens(messages) for messages in some_texts().messages]
    together = reward.features(batch)
    alone = np.concatenate([reward.features([ids]) for ids in batch])
    np.testing.assert_allclose(together, alone, atol=1e-4)
    assert reward.check_head(batch, together) < 1e-4


def test_head_times_features_is_the_models_own_logit(tmp_path):
    reward, texts = reward_model(), some_texts()
    table = embed.embed_texts(reward, texts, tmp_path)
    inputs = reward.inputs([reward.tokens(m) for m in texts.messages])
    with torch.inference_mode():
        logits = reward.model(**inputs).logits[:, 0].numpy()
    head = np.load(tmp_path / "head.npy")
    assert head.shape == (16,)
    np.testing.assert_allclose(table @ head, logits, atol=1e-5)
    marker = json.loads((tmp_path / "features.json").read_text())
    assert marker["head_error"] < 1e-4


def test_a_wrong_head_stops_the_run(tmp_path):
    reward = reward_model()
    reward.head = reward.model.model.layers[-1].mlp.down_proj.weight[:, 0]
    reward.head = reward.head.detach().numpy()
    with pytest.raises(ValueError, match="model's own logits"):
        embed.embed_texts(reward, some_texts(), tmp_path)
    assert not (tmp_path / "features.json").exists()


def test_wrong_pooling_stops_the_run(tmp_path, monkeypatch):
    def first_token(self, batch):
        hidden = self.base(**self.inputs(batch)).last_hidden_state
        return hidden[:, 0].detach().float().numpy()

    monkeypatch.setattr(embed.RewardModel, "features", first_token)
    with pytest.raises(ValueError, match="model's own logits"):
        embed.embed_texts(reward_model(), some_texts(), tmp_path)


def test_a_killed_run_continues_where_it_stopped(tmp_path, monkeypatch):
    texts = some_texts()
    whole = np.array(embed.embed_texts(reward_model(), texts, tmp_path / "whole"))
    real, calls = embed.RewardModel.features, []

    def killed(self, batch):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(len(batch))
        return real(self, batch)

    reward = reward_model(batch_size=3)
    monkeypatch.setattr(embed.RewardModel, "features", killed)
    with pytest.raises(KeyboardInterrupt):
        embed.embed_texts(reward, texts, tmp_path / "killed")
    assert json.loads((tmp_path / "killed/features.json").read_text())["done"] == 6
    with pytest.raises(ValueError, match="6 of 12"):
        prepared.load_features(tmp_path / "killed")

    def counted(self, batch):
        calls.append(len(batch))
        return real(self, batch)

    monkeypatch.setattr(embed.RewardModel, "features", counted)
    # Another batch size: only the numbers must be the same, not the batches.
    rest = embed.embed_texts(reward_model(batch_size=4), texts, tmp_path / "killed")
    assert sum(calls) == 12
    np.testing.assert_allclose(rest, whole, atol=1e-5)
    embed.embed_texts(reward_model(), texts, tmp_path / "killed")
    assert sum(calls) == 12


def test_a_table_of_something_else_is_not_continued(tmp_path):
    embed.embed_texts(reward_model(), some_texts(), tmp_path)
    with pytest.raises(ValueError, match="rows 12 → 13, texts"):
        embed.embed_texts(reward_model(), some_texts(13), tmp_path)
    with pytest.raises(ValueError, match="max_length 4096 → 40"):
        embed.embed_texts(reward_model(max_length=40), some_texts(), tmp_path)


def test_batches_hold_texts_of_similar_length_longest_first(tmp_path, monkeypatch):
    real, shapes = embed.RewardModel.features, []

    def watched(self, batch):
        shapes.append([len(ids) for ids in batch])
        return real(self, batch)

    monkeypatch.setattr(embed.RewardModel, "features", watched)
    embed.embed_texts(reward_model(batch_tokens=400), some_texts(30), tmp_path)
    lengths = [n for batch in shapes for n in batch]
    assert lengths == sorted(lengths, reverse=True)
    assert all(len(b) == 1 or max(b) * len(b) <= 400 for b in shapes)
    assert 1 < len(shapes) < 30


@pytest.mark.parametrize("model_dtype", ["float32", "bfloat16"])
def test_bfloat16_tables(tmp_path, model_dtype):
    model = sources.tiny_model().to(getattr(torch, model_dtype))
    model.model.norm.weight.data[:] = 3.0
    texts = some_texts(24)
    reward = reward_model(model=model, model_dtype=model_dtype, table_dtype="bfloat16")
    table = embed.embed_texts(reward, texts, tmp_path)
    assert str(table.dtype) == "bfloat16"
    exact = reward.features([reward.tokens(m) for m in texts.messages])
    center = np.float32(0)
    if model_dtype == "float32":  # a bfloat16 model is stored as it is
        center = np.load(tmp_path / "center.npy")
    else:
        assert not (tmp_path / "center.npy").exists()
    error = np.abs(table.astype(np.float32) + center - exact)
    assert (
        error.max()
        < 2**-8 * np.abs(exact - center).max()
        + 1e-2 * (model_dtype == "bfloat16") * np.abs(exact).max()
    )  # padding changes bfloat16 sums a little


def test_a_text_is_embedded_once_and_equal_tokens_are_refused(tmp_path):
    texts = some_texts(2)
    again = texts.add(texts.messages[0], "again")
    assert again == 0
    assert len(texts) == 2
    ask, answer = texts.messages[0]
    texts.add([ask, {**answer, "content": answer["content"] + " "}], "a blank more")
    with pytest.raises(ValueError, match="texts 0 and 2 differ, but not to the model"):
        embed.embed_texts(reward_model(), texts, tmp_path)


def test_the_template_is_applied_once():
    reward = reward_model()
    messages = some_texts(1).messages[0]
    assert list(reward.tokens(messages)[:2]) == [1, 3]  # one <s>, then <|user|>
    assert list(reward.tokens(messages)).count(1) == 1


def test_long_texts_keep_their_response():
    reward = reward_model(max_length=20)
    messages = some_texts(1).messages[0]
    whole = reward_model().tokens(messages)
    cut = reward.tokens(messages)
    assert len(cut) == 20
    np.testing.assert_array_equal(cut, [whole[0], *whole[-19:]])


def test_the_response_is_what_the_template_makes_of_it(tmp_path):
    reward, texts = reward_model(), some_texts(3)
    assert reward.response(texts.messages[0]) == texts.messages[0][-1]["content"]
    responses = [reward.response(m) for m in texts.messages]
    texts.save(tmp_path / "texts.jsonl", responses)
    assert load_responses(tmp_path) == responses
    assert TextIndex.load(tmp_path / "texts.jsonl").hashes == texts.hashes


@pytest.mark.parametrize("content", [["a list"], None, {"text": "x"}])
def test_content_must_be_a_string(content):
    texts = TextIndex()
    ask = {"role": "user", "content": "Why?"}
    with pytest.raises(TypeError, match=r"row 7: message 1 \('assistant'\): content"):
        texts.add([ask, {"role": "assistant", "content": content}], "row 7")


def test_only_a_trained_single_output_head_will_do(tmp_path):
    with pytest.raises(ValueError, match="3 outputs"):
        reward_model(model=sources.tiny_model(labels=3))
    with pytest.raises(ValueError, match="no linear head"):
        reward_model(model=sources.tiny_model().model)
    folder = tmp_path / "language_model"
    sources.tiny_model().model.save_pretrained(folder)
    sources.tiny_tokenizer().save_pretrained(folder)
    with pytest.raises(ValueError, match=r"lacks \['score\.weight'\]"):
        embed.RewardModel.load(embed.EmbedConfig(model=str(folder), device="cpu"))


def test_a_marker_left_from_before_calls_no_new_row_finished(tmp_path, monkeypatch):
    """The table is gone, and the run that begins it again is killed at once."""
    texts, real = some_texts(), embed.RewardModel.features
    whole = np.array(embed.embed_texts(reward_model(), texts, tmp_path))
    (tmp_path / "features.npy").unlink()

    def killed(self, batch):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(embed.RewardModel, "features", killed)
        with pytest.raises(KeyboardInterrupt):
            embed.embed_texts(reward_model(), texts, tmp_path)
    assert not embed.is_complete(tmp_path, reward_model().config, texts)
    monkeypatch.setattr(embed.RewardModel, "features", real)
    again = embed.embed_texts(reward_model(), texts, tmp_path)
    np.testing.assert_array_equal(again, whole)


@pytest.mark.parametrize("change", ["zeros", "shape", "digest"])
def test_finished_rows_that_have_changed_are_not_continued(tmp_path, change):
    texts = some_texts()
    table = np.array(embed.embed_texts(reward_model(), texts, tmp_path))
    if change == "digest":
        marker = json.loads((tmp_path / "features.json").read_text())
        del marker["rows_digest"]
        (tmp_path / "features.json").write_text(json.dumps(marker))
    else:
        table[3] = 0
        np.save(tmp_path / "features.npy", table[: 12 if change == "zeros" else 11])
    with pytest.raises(ValueError, match=r"features\.npy is not the table whose 12"):
        embed.embed_texts(reward_model(), texts, tmp_path)


def test_models_are_read_without_their_code_or_pickles(tmp_path, monkeypatch):
    import transformers

    asked = {}
    for name in ("AutoModelForSequenceClassification", "AutoTokenizer"):

        class Loader:
            @classmethod
            def from_pretrained(cls, model, name=name, **settings):
                asked[name] = settings
                if name == "AutoTokenizer":
                    return sources.tiny_tokenizer()
                return sources.tiny_model(), {"missing_keys": []}

        monkeypatch.setattr(transformers, name, Loader)
    config = embed.EmbedConfig(model="x", revision="r", device="cpu", **FLOAT)
    embed.RewardModel.load(config)
    assert [settings["trust_remote_code"] for settings in asked.values()] == [False] * 2
    assert [settings["revision"] for settings in asked.values()] == ["r"] * 2
    assert asked["AutoModelForSequenceClassification"]["use_safetensors"] is True


def test_a_pickled_checkpoint_is_not_opened(tmp_path):
    sources.save_tiny(tmp_path)
    weights = tmp_path / "model.safetensors"
    torch.save({}, tmp_path / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(OSError, match="safetensors"):
        embed.RewardModel.load(embed.EmbedConfig(model=str(tmp_path), device="cpu"))


TEMPLATES = {
    "long": ("x" * 200_000, "has 200000 characters, expected at most 100000"),
    "much": ("{{ 'x' * 1000000 }}", "makes 1000000 characters of"),
    "slow": (
        "{% for a in range(99999) %}{% for b in range(99999) %}"
        "{% endfor %}{% endfor %}",
        "the chat template takes more than 0.2 seconds",
    ),
}


@pytest.mark.parametrize(
    ("template", "message"), TEMPLATES.values(), ids=TEMPLATES.keys()
)
def test_chat_templates_are_bounded(monkeypatch, template, message):
    monkeypatch.setattr(embed, "TEMPLATE_SECONDS", 0.2)
    tokenizer = sources.tiny_tokenizer()
    tokenizer.chat_template = template
    config = embed.EmbedConfig(model="tiny", device="cpu", **FLOAT)

    def render():
        reward = embed.RewardModel(sources.tiny_model(), tokenizer, config)
        reward.render(some_texts(1).messages[0])

    with pytest.raises(ValueError, match=message):
        render()


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="table_dtype"):
        embed.EmbedConfig(table_dtype="int8")
    with pytest.raises(ValueError, match="padding_side"):
        embed.EmbedConfig(padding_side="up")
    with pytest.raises(ValueError, match="batch_size"):
        embed.EmbedConfig(batch_size=0)
