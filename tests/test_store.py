"""`UserStore`: users by name, in place, agreeing with the pure functions."""

import threading

import jax
import numpy as np
import pytest

import lore_jax as lore

RANK, WIDTH = 3, 6


@pytest.fixture
def model(small_basis, small_prior):
    return lore.RewardModel(small_basis, small_prior, 2.0)


@pytest.fixture
def table():
    return np.random.default_rng(2).normal(size=(30, WIDTH)).astype(np.float32)


def pairs_of(table, users, seed=0):
    """Three random pairs of each user."""
    rng = np.random.default_rng(seed)
    user = np.repeat(np.asarray(users), 3)
    chosen = rng.integers(30, size=len(user))
    rejected = (chosen + rng.integers(1, 30, size=len(user))) % 30
    return lore.Preferences.from_pairs(table, chosen, rejected, user)


def test_it_agrees_with_the_pure_functions(model, table):
    first = pairs_of(table, ["ann", "bob", "cy"])
    second = pairs_of(table, ["dan", "bob"], seed=1)
    store = lore.UserStore(model)
    store.observe(first)
    store.observe(second)
    users = ["ann", "bob", "cy", "dan"]
    state = lore.streaming.init(model, user_ids=users)
    for pairs in (first, second):
        state = lore.streaming.update(model, state, pairs)
    want = lore.streaming.weights(state)
    np.testing.assert_allclose(store.weights(users), want, atol=1e-6)
    order = ["dan", "ann", "dan"]
    np.testing.assert_allclose(store.weights(order), want[[3, 0, 3]], atol=1e-6)
    assert list(store.states().user_ids) == users


def test_an_empty_store_is_legal_and_kept(model, table, tmp_path):
    store = lore.UserStore(model)
    assert len(store) == 0
    assert "ann" not in store
    assert list(store) == []
    store.save(tmp_path / "users")
    again = lore.UserStore.load(tmp_path / "users", model)
    assert len(again) == 0
    again.add(["ann"])
    mean = model.prior.mean
    np.testing.assert_allclose(again.weights(["ann"])[0], mean, atol=1e-6)


def test_scores_are_those_of_the_model(model, table):
    store = lore.UserStore(model)
    store.observe(pairs_of(table, ["ann", "bob"]))
    weights = store.weights(["bob", "ann"])
    want = np.asarray(lore.score(model, weights, table))
    np.testing.assert_allclose(store.score(["bob", "ann"], table), want, rtol=1e-5)
    scores, rows = store.top_k(["bob", "ann"], table, k=4)
    best, places = lore.top_k(model, weights, table, user=[0, 1], k=4)
    np.testing.assert_array_equal(rows, places)
    np.testing.assert_allclose(scores, best, rtol=1e-5)


def test_excluded_rows_are_not_returned(model, table):
    store = lore.UserStore(model)
    store.observe(pairs_of(table, ["ann", "bob"]))
    _, rows = store.top_k(["ann", "bob"], table, k=30)
    seen = [rows[0, :3], rows[1, 5:]]
    scores, left = store.top_k(["ann", "bob"], table, k=10, exclude=seen)
    np.testing.assert_array_equal(left[0], rows[0, 3:13])
    np.testing.assert_array_equal(left[1, :5], rows[1, :5])
    assert (left[1, 5:] == -1).all()
    assert np.isneginf(scores[1, 5:]).all()


def test_deleted_users_are_in_no_array_and_no_file(model, table, tmp_path):
    store = lore.UserStore(model)
    store.observe(pairs_of(table, ["ann", "secret-name", "cy"]))
    before = store.weights(["cy"])
    store.delete(["secret-name"])
    assert "secret-name" not in store
    assert not any("secret-name" in str(x) for x in vars(store).values())
    for total in (*store._sums, store._weights):
        assert (total != 0).any(tuple(range(1, total.ndim))).sum() <= 2
    store.save(tmp_path / "users")
    assert b"secret-name" not in (tmp_path / "users").read_bytes()
    np.testing.assert_array_equal(store.weights(["cy"]), before)
    with pytest.raises(ValueError, match="'secret-name' is not in the store"):
        store.weights(["secret-name"])
    store.add(["new"])  # It gets the place, and nothing that stood there.
    mean = model.prior.mean
    np.testing.assert_allclose(store.weights(["new"])[0], mean, atol=1e-6)


def test_a_refused_deletion_deletes_nobody(model):
    store = lore.UserStore(model)
    store.add(["ann", "bob"])
    with pytest.raises(ValueError, match="'nobody' is not in the store"):
        store.delete(["ann", "nobody"])
    assert sorted(store) == ["ann", "bob"]


def test_it_grows_and_reuses_places(model, table):
    store = lore.UserStore(model)
    users = [f"u{i}" for i in range(300)]
    for start in range(0, 300, 30):
        store.observe(pairs_of(table, users[start : start + 30], seed=start))
    want = store.weights(users)
    store.delete(users[:100])
    store.add([f"v{i}" for i in range(50)])
    np.testing.assert_array_equal(store.weights(users[100:]), want[100:])
    assert len(store._solved) == 512
    assert len(store) == 250


def test_stores_and_states_merge(model, table, tmp_path):
    first, second = lore.UserStore(model), lore.UserStore(model)
    one, two = pairs_of(table, ["ann", "bob"]), pairs_of(table, ["bob", "cy"], seed=1)
    first.observe(one)
    second.observe(two)
    first.merge(second)
    both = lore.UserStore(model)
    both.observe(two)
    both.observe(one)
    users = ["ann", "bob", "cy"]
    np.testing.assert_allclose(first.weights(users), both.weights(users), atol=1e-6)
    first.save(tmp_path / "users")
    again = lore.UserStore.load(tmp_path / "users", model)
    np.testing.assert_array_equal(again.weights(users), first.weights(users))


def test_another_model_is_refused(model, table, tmp_path):
    store = lore.UserStore(model)
    store.observe(pairs_of(table, ["ann"]))
    store.save(tmp_path / "users")
    for other, reason in (
        (model.replace(basis=model.basis + 1), "fingerprint"),
        (model.replace(temperature=1.0), "temperatures disagree"),
        (model.replace(prior=model.prior.replace(decay=np.float32(0.7))), "decay"),
    ):
        with pytest.raises(ValueError, match=reason):
            lore.UserStore.load(tmp_path / "users", other)
        with pytest.raises(ValueError, match=reason):
            lore.UserStore(other).merge(store)


@pytest.mark.parametrize(
    ("call", "error", "reason"),
    [
        (lambda s, t: s.weights("ann"), TypeError, "sequence of names"),
        (lambda s, t: s.weights([None]), ValueError, "missing"),
        (lambda s, t: s.weights(["bob"]), ValueError, "'bob' is not in"),
        (lambda s, t: s.add([3]), ValueError, "all strings or all integers"),
        (lambda s, t: s.score(["ann"], t[:, :2]), ValueError, "D=2"),
        (lambda s, t: s.top_k(["ann"], t, k=31), ValueError, "at most M=30"),
        (lambda s, t: s.top_k(["ann"], t, k=0), ValueError, "k must be at least 1"),
        (
            lambda s, t: s.top_k(["ann"], t, k=1, exclude=[[30]]),
            ValueError,
            r"exclude\[0\] must be in 0 … 29",
        ),
        (
            lambda s, t: s.top_k(["ann"], t, k=1, exclude=5),
            TypeError,
            "exclude must be a sequence of rows per user, got 5",
        ),
        (
            lambda s, t: s.top_k(["ann"], t, k=1, exclude=[]),
            ValueError,
            "one sequence of rows per user",
        ),
        (
            lambda s, t: s.observe(lore.Preferences.from_pairs(t, [0], [1], [0])),
            ValueError,
            "pairs must name its users",
        ),
        (lambda s, t: s.observe("pairs"), TypeError, "prefs must be Preferences"),
        (lambda s, t: s.merge(3), TypeError, "other must be UserStates"),
        (lambda s, t: lore.UserStore(t), TypeError, "model must be a RewardModel"),
    ],
)
def test_bad_input_is_refused(model, table, call, error, reason):
    store = lore.UserStore(model)
    store.add(["ann"])
    with pytest.raises(error, match=reason):
        call(store, table)
    assert list(store) == ["ann"]


def test_one_writer_and_many_readers(model, table):
    """Readers see whole writes: everybody's sums are those of n equal batches."""
    users = [f"u{i}" for i in range(20)]
    pairs = pairs_of(table, users)
    store, alone = lore.UserStore(model), lore.UserStore(model)
    store.observe(pairs)
    legal = []
    for _ in range(6):
        alone.observe(pairs)
        legal.append(alone.weights(users))
    failed, stop = [], threading.Event()

    def read():
        while not stop.is_set():
            got = store.weights(users)
            if not any(np.array_equal(got, want) for want in legal):
                failed.append(got)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        store.observe(pairs)
    stop.set()
    for thread in threads:
        thread.join()
    assert not failed
    np.testing.assert_array_equal(store.weights(users), legal[-1])


def test_reading_solves_for_the_read_users_alone(model, table, monkeypatch):
    from lore_jax import store as module

    store = lore.UserStore(model)
    store.observe(pairs_of(table, [f"u{i}" for i in range(50)]))
    solved, real = [], module.solve_sums

    def solve(sums, prior):
        solved.append(len(sums[0]))
        return real(sums, prior)

    monkeypatch.setattr(module, "solve_sums", solve)
    store.weights(["u3", "u4", "u3"])
    store.weights(["u3", "u4"])
    assert solved == [2]
    store.observe(pairs_of(table, ["u4"], seed=1))
    store.weights(["u3", "u4"])
    assert solved == [2, 1]


def test_the_prior_may_be_missing(small_basis, table):
    model = lore.RewardModel(jax.numpy.asarray(small_basis))
    store = lore.UserStore(model)
    store.observe(pairs_of(table, [7, 10**12]))
    assert store.weights([10**12]).shape == (1, RANK)


@pytest.mark.parametrize("order", [1, -1])
def test_names_that_no_file_can_hold_are_refused(model, order):
    first, second = [-1, 2**63 + 1][::order]
    store = lore.UserStore(model)
    store.add([first])
    for call in (
        lambda: store.add([5, second]),
        lambda: store.merge(lore.streaming.init(model, user_ids=[second])),
    ):
        with pytest.raises(ValueError, match="all signed or all unsigned"):
            call()
    assert list(store) == [first]
    store.delete([first])
    store.add([second])
    assert store.states().user_ids.tolist() == [second]
