"""The example service, over HTTP on loopback: restarts, kills, 32 clients at a time."""

import concurrent.futures
import contextlib
import functools
import http.client
import inspect
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse

import jax
import numpy as np
import pytest

import lore_jax as lore

pytest.importorskip("fastapi", reason="needs the extra 'serve'")
uvicorn = pytest.importorskip("uvicorn", reason="needs the extra 'serve'")

from experiments import serve, stored  # noqa: E402

ROOT = pathlib.Path(__file__).parent.parent
CLIENTS, REQUESTS = 32, 12


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(folder with a model and features, model, float[50, 8])."""
    folder = tmp_path_factory.mktemp("serve")
    users = lore.data.planted(
        jax.random.key(0), num_users=20, pairs_per_user=10, num_features=8, rank=3
    )
    fitted = lore.fit_prior(users.basis, users.prefs, key=jax.random.key(1))
    lore.save(folder / "model.safetensors", fitted)
    features = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    np.save(folder / "features.npy", features)
    return folder, fitted.model, features


def connect(port):
    """A connection to use in a `with`."""
    return contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60))


def call(port, method, path, connection=None):
    """(status, JSON of the answer)."""
    if connection is None:
        with connect(port) as connection:
            return call(port, method, path, connection)
    connection.request(method, path)
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read() or "null")


class Service:
    """A server process over a log."""

    def __init__(self, folder, log):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        paths = [folder / "model.safetensors", folder / "features.npy", log, self.port]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "experiments.serve", *map(str, paths)],
            cwd=ROOT,
            stderr=subprocess.PIPE,
        )
        for _ in range(1200):
            if self.process.poll() is not None:
                raise AssertionError(self.process.stderr.read().decode())
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            time.sleep(0.1)
        raise AssertionError("the server did not start within two minutes")

    def connect(self):
        return connect(self.port)

    def call(self, method, path, connection=None):
        return call(self.port, method, path, connection)

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.process.stderr.close()


@pytest.fixture
def start(files, tmp_path):
    """Starts a service over the log of this test; kills all at the end."""
    running = []

    def run():
        running.append(Service(files[0], tmp_path / "pairs.log"))
        return running[-1]

    yield run
    for service in running:
        if service.process.poll() is None:
            service.kill()


def path(user, verb="", **query):
    address = f"/users/{urllib.parse.quote(user, safe='')}"
    address += f"/{verb}" if verb else ""
    return (
        f"{address}?{urllib.parse.urlencode(query, doseq=True)}" if query else address
    )


def expected(files, records, user):
    """float[50]: the rewards by a store over the raw features."""
    _, model, features = files
    chosen, rejected, names = zip(*records)
    store = lore.UserStore(model)
    store.observe(lore.Preferences.from_pairs(features, chosen, rejected, names))
    return store.score([user], features)[0]


def test_observe_score_best_forget_and_restart(files, start, tmp_path):
    service, log = start(), tmp_path / "pairs.log"
    said = [(3, 7, "ann"), (1, 2, "ann"), (9, 4, "bøb & co")]
    for chosen, rejected, user in said:
        query = dict(chosen=chosen, rejected=rejected)
        assert service.call("POST", path(user, "pairs", **query)) == (200, None)
    rows = list(range(50))
    for user in ("ann", "bøb & co"):
        status, scores = service.call("GET", path(user, "scores", row=rows))
        assert status == 200
        np.testing.assert_allclose(scores, expected(files, said, user), atol=1e-5)
        status, best = service.call("GET", path(user, "best", k=4))
        assert best == np.argsort(-np.array(scores), kind="stable")[:4].tolist()
    service.kill()
    with open(log, "ab") as file:
        file.write(b'\n[5, 6, "an')  # A crash in the middle of a record.

    service = start()
    assert service.call("GET", path("bøb & co", "scores", row=rows))[1] == scores
    query = dict(chosen=8, rejected=0)
    assert service.call("POST", path("ann", "pairs", **query)) == (200, None)
    assert service.call("DELETE", path("bøb & co")) == (200, None)
    assert "co" not in log.read_text()
    service.kill()

    service = start()
    said = [*said[:2], (8, 0, "ann")]
    _, scores = service.call("GET", path("ann", "scores", row=rows))
    np.testing.assert_allclose(scores, expected(files, said, "ann"), atol=1e-5)
    status, message = service.call("GET", path("bøb & co", "best"))
    assert status == 400
    assert "not in the store" in message


@pytest.mark.parametrize(
    ("method", "address", "status"),
    [
        ("GET", path("nobody", "best"), 400),
        ("DELETE", path("nobody"), 400),
        ("POST", path("ann", "pairs", chosen=1, rejected=1), 400),
        ("POST", path("ann", "pairs", chosen=-1, rejected=1), 422),
        ("POST", path("ann", "pairs", chosen=1, rejected=50), 422),
        ("POST", path("ann", "pairs", chosen=1), 422),
        ("POST", path("a" * 300, "pairs", chosen=1, rejected=2), 400),
        ("GET", path("ann", "scores", row=[0, -1]), 422),
        ("GET", path("ann", "best", k=0), 400),
    ],
)
def test_wrong_requests_are_refused_and_change_nothing(client, method, address, status):
    found, log = client
    before = log.read_text()
    assert found(method, address)[0] == status
    assert log.read_text() == before


@pytest.fixture(scope="module")
def client(files, tmp_path_factory):
    """(calls of a server in a thread of this process, its log); "ann" is known."""
    log = tmp_path_factory.mktemp("client") / "pairs.log"
    app = serve.make_app(*files[1:], log)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    (listener,) = server.servers[0].sockets
    found = functools.partial(call, listener.getsockname()[1])
    assert found("POST", path("ann", "pairs", chosen=1, rejected=2)) == (200, None)
    yield found, log
    server.should_exit = True
    thread.join()


def test_requests_compile_nothing(client, compilations):
    found, _ = client
    before = compilations.count
    for user in ("ann", "new"):
        query = dict(chosen=4, rejected=5)
        assert found("POST", path(user, "pairs", **query)) == (200, None)
        for rows in ([1], [1, 2, 3], list(range(40))):
            assert found("GET", path(user, "scores", row=rows))[0] == 200
        assert found("GET", path(user, "best", k=7))[0] == 200
    assert compilations.count == before


@pytest.mark.slow
def test_what_was_acknowledged_survives_a_kill_under_load(start, tmp_path):
    """Pairs are sent by 8 clients until the process is gone."""
    service = start()

    def send(number):
        kept, gone = [], (OSError, http.client.HTTPException)
        with contextlib.suppress(*gone), service.connect() as connection:
            for chosen in range(10_000):
                query = dict(chosen=chosen % 49, rejected=49)
                where = path(f"user {number}", "pairs", **query)
                if service.call("POST", where, connection)[0] == 200:
                    kept.append([chosen % 49, 49, f"user {number}"])
        return kept

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(send, number) for number in range(8)]
        time.sleep(1.5)
        service.kill()
        told = [future.result() for future in futures]
    logged = stored.read_records(tmp_path / "pairs.log")
    assert sum(map(len, told)) > 8
    for number, kept in enumerate(told):
        mine = [record for record in logged if record[2] == f"user {number}"]
        assert mine[: len(kept)] == kept
        assert len(mine) - len(kept) in (0, 1)  # One may be told to nobody.
    service = start()
    for number in range(8):
        assert service.call("GET", path(f"user {number}", "best"))[0] == 200


@pytest.mark.slow
def test_32_clients_at_a_time(start, record_property, tmp_path):
    """Each observes, scores and asks for the best; the times are only reported."""
    service = start()

    def work(number):
        times, user = [], f"user {number}"
        calls = [
            call
            for step in range(REQUESTS)
            for call in (
                ("POST", path(user, "pairs", chosen=step, rejected=step + 1)),
                ("GET", path(user, "scores", row=[1, 2, 3])),
                ("GET", path(user, "best", k=5)),
            )
        ]
        with service.connect() as connection:
            for method, where in calls:
                before = time.perf_counter()
                assert service.call(method, where, connection)[0] == 200
                times.append(time.perf_counter() - before)
        return times

    start_time = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
        times = np.concatenate(list(pool.map(work, range(CLIENTS))))
    seconds = time.perf_counter() - start_time
    p50, p99 = 1e3 * np.quantile(times, [0.5, 0.99])
    report = f"p50 {p50:.1f} ms, p99 {p99:.1f} ms, {len(times) / seconds:.0f} a second"
    record_property("latency", report)
    print(f"{CLIENTS} clients: {report}")
    assert len(stored.read_records(tmp_path / "pairs.log")) == CLIENTS * REQUESTS


def test_the_service_is_small():
    assert len(inspect.getsource(serve.make_app).splitlines()) <= 40
    assert os.path.getsize(serve.__file__) < 4000
