"""The recipes for TRL and transformers, on tiny models that are made here."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fixtures import sources

torch = pytest.importorskip("torch", reason="needs the extra 'hf'")
transformers = pytest.importorskip("transformers", reason="needs the extra 'hf'")

import lore_jax as lore  # noqa: E402
from experiments import reward_bench  # noqa: E402
from experiments.recipes import (  # noqa: E402
    bench_users,
    grpo_reward,
    guided_decoding,
    pipeline_scores,
    reward_trainer,
)
from lore_jax import hf  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
ROOT = Path(__file__).parent.parent
D, K = 16, 3
RECIPES = sorted((ROOT / "experiments" / "recipes").glob("*.py"))
SMALL = lore.Marginal(
    num_steps=3,
    num_starts=1,
    search=lore.Search(num_atoms=4, ridges=(0.1,), holdout="judgements"),
)


@pytest.fixture
def rewards():
    basis = np.random.default_rng(0).normal(size=(D, K)).astype(np.float32)
    return lore.RewardModel(basis, temperature=2.0)


@pytest.fixture
def users():
    weights = np.random.default_rng(1).dirichlet(np.ones(K), 2).astype(np.float32)
    one = np.ones(2)
    return lore.Adapted(
        weights, np.log(weights), one, one, one > 0, one.astype(np.int32),
        user_ids=np.array(["ann", "bob"]),
    )  # fmt: skip


@pytest.fixture
def exported(tmp_path, rewards):
    base, tokenizer = sources.tiny_model(), sources.tiny_tokenizer()
    path = tmp_path / "exported"
    return hf.export_head(rewards, base, path=path, tokenizer=tokenizer)


def oracle(texts, rewards, weights):
    """x · V · p / T of the same features, in float64."""
    x = hf.embed(texts, sources.tiny_model(), sources.tiny_tokenizer())
    x, basis = x.astype(np.float64), np.asarray(rewards.basis, np.float64)
    return (x @ basis * np.asarray(weights, np.float64)).sum(1) / rewards.temperature


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 60


def test_there_are_five():
    assert len(RECIPES) == 5


@pytest.mark.parametrize("chat", [False, True])
def test_grpo_rewards_are_the_annotators_own(rewards, users, chat):
    prompts = ["The sky is", "The sky is", "The sun is"]
    completions = [" blue.", " green.", " hot."]
    if chat:
        prompts = [[{"role": "user", "content": text}] for text in prompts]
        completions = [[{"role": "assistant", "content": x}] for x in completions]
    parts = sources.tiny_model(), sources.tiny_tokenizer()
    reward = grpo_reward.make_reward(rewards, users, *parts)
    # What GRPOTrainer passes: prompts, completions, ids, the state, and all columns.
    found = reward(
        prompts=prompts,
        completions=completions,
        completion_ids=[[1], [2], [3]],
        trainer_state=transformers.TrainerState(),
        annotator_id=["ann", "bob", "bob"],
    )
    assert [type(x) for x in found] == [float] * 3
    texts = [p + c for p, c in zip(prompts, completions)]
    wanted = oracle(texts, rewards, users.weights[[0, 1, 1]])
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert reward.__name__ == "lore_reward"  # TRL logs it under this name.
    with pytest.raises(ValueError, match="'eve', which is not in"):
        reward(prompts=prompts, completions=completions, annotator_id=["eve"] * 3)
    with pytest.raises(ValueError, match="has no column 'annotator_id'"):
        reward(prompts=prompts, completions=completions)


def pairs(number=40):
    rng = np.random.default_rng(0)
    return [
        {
            "annotator_id": ("ann", "bob")[i % 2],
            "prompt": sources.sentence(rng),
            "chosen": " " + sources.sentence(rng),
            "rejected": " " + sources.sentence(rng),
        }
        for i in range(number)
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder with a reward model, what the recipe returned of it)."""
    folder = tmp_path_factory.mktemp("trained")
    model = sources.save_tiny(folder / "model")
    return folder, reward_trainer.fit_users(model, pairs(), folder, recipe=SMALL)


def test_a_model_of_reward_trainer_becomes_rewards_of_users(trained):
    folder, fitted = trained
    assert fitted.user_ids.tolist() == ["ann", "bob"]
    assert fitted.model.basis.shape == (D, 2)
    # Features are read at the end-of-sequence token that RewardTrainer appends.
    found = hf.from_dataset(pairs(), "annotator_id")
    texts = [text + "</s>" for text in found.texts]
    wanted = hf.embed(texts, sources.tiny_model(), sources.tiny_tokenizer())
    stored = np.load(folder / "features.npy")
    np.testing.assert_allclose(stored, wanted, atol=2e-5)
    again = lore.load(folder / "fit.safetensors")
    np.testing.assert_array_equal(again.weights, fitted.weights)


def test_pipeline_scores_mix_into_rewards(exported, rewards, users):
    ask = {"role": "user", "content": "Which colour?"}
    texts = ["A text.", [ask, {"role": "assistant", "content": "Blue."}], "Another."]
    scores = pipeline_scores.scores(exported, texts, device="cpu")
    for k in range(K):
        wanted = oracle(texts, rewards, np.eye(K)[[k] * 3])
        np.testing.assert_allclose(scores[:, k], wanted, atol=1e-4)
    found = pipeline_scores.rewards(scores, users.weights)
    for row, weights in zip(found, users.weights):
        wanted = oracle(texts, rewards, np.stack([weights] * 3))
        np.testing.assert_allclose(row, wanted, atol=1e-4)


def language_model():
    torch.manual_seed(0)
    config = sources.tiny_model().config
    return transformers.LlamaForCausalLM(config).eval()


def test_guided_decoding_follows_the_users_reward(exported, rewards, users):
    """Each greedy step is the best of log p + strength · reward, found by hand."""
    model, tokenizer = language_model(), sources.tiny_tokenizer("left")
    reader = transformers.AutoModelForSequenceClassification.from_pretrained(exported)
    inputs = tokenizer(["The sky", "The sun is"], padding=True, return_tensors="pt")
    guide = guided_decoding.RewardGuide(
        reader, users.weights, strength=2.0, num_tokens=4, pad=tokenizer.pad_token_id
    )
    settings = dict(
        max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    found = model.generate(
        **inputs,
        **settings,
        logits_processor=transformers.LogitsProcessorList([guide]),
    )
    plain = model.generate(**inputs, **settings)
    head = reader.score.weight.detach().double().numpy()
    changed = False
    for row, weights in enumerate(users.weights):
        ids = inputs["input_ids"][row][inputs["attention_mask"][row] == 1].tolist()
        for _ in range(3):
            with torch.inference_mode():
                logits = model(torch.tensor([ids])).logits[0, -1].double()
                logp = torch.log_softmax(logits, -1).numpy()
                values = {}
                for token in np.argsort(-logp)[:4].tolist():
                    text = torch.tensor([[*ids, token]])
                    x = reader.model(text).last_hidden_state[0, -1].double().numpy()
                    values[token] = logp[token] + 2.0 * (head @ x @ weights)
            ids.append(max(values, key=lambda token: values[token]))
        assert found[row, -3:].tolist() == ids[-3:]
        changed |= plain[row, -3:].tolist() != ids[-3:]
    assert changed


def bench_rows():
    rng = np.random.default_rng(0)

    def row(name, subset, right, wrong):
        chosen, rejected = (
            [sources.sentence(rng) for _ in range(n)] for n in (right, wrong)
        )
        return {
            **{"id": name, "prompt": sources.sentence(rng), "subset": subset},
            **{"chosen": chosen, "rejected": rejected},
        }

    rows = [row(str(n), "Math", 1, 3) for n in range(40)]
    return [*rows, row("ref:0", "Ties", 1, 3), row("tied:0", "Ties", 2, 3)]


def test_reward_bench_with_mixtures_of_users(rewards, users):
    parts = sources.tiny_model(), sources.tiny_tokenizer()
    table = bench_users.bench(bench_rows(), rewards, users, ["ann", "bob"], *parts)
    assert list(table) == ["population", "ann", "bob"]
    texts = reward_bench.TextIndex()
    prompts = reward_bench.read_prompts(bench_rows(), texts)
    x = hf.embed(texts.messages, *parts).astype(np.float64)
    scores = x @ np.asarray(rewards.basis, np.float64) / rewards.temperature
    for name, weights in zip(table, [np.full(K, 1 / K), *users.weights]):
        own = scores @ weights
        assert table[name] == pytest.approx(reward_bench.evaluate(prompts, own))
    assert len({scores["Math"] for scores in table.values()}) > 1


def test_the_commands_run(trained, exported):
    """Of the recipes that are commands, on files."""
    folder, _ = trained
    sources.write_jsonl(folder / "rows.jsonl", bench_rows())
    calls = {
        "pipeline_scores": [exported, "A text."],
        "bench_users": [
            *(folder / name for name in ("fit.safetensors", "model", "rows.jsonl"))
        ],
    }
    out = {}
    for name, arguments in calls.items():
        command = [sys.executable, "-m", f"experiments.recipes.{name}"]
        done = subprocess.run(
            [*command, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
        )
        assert not done.returncode, done.stderr
        out[name] = done.stdout
    text, row = out["pipeline_scores"].strip().split("\t")
    assert text == "A text."
    assert len(json.loads(row)) == K
    assert set(json.loads(out["bench_users"])["population"]) == {"Math", "Ties", "mean"}
