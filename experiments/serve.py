"""An example service, `lore.UserStore` behind HTTP: observe, score, best, forget.

    python -m experiments.serve model.safetensors features.npy pairs.log 8000

A pair is in the log, on disk, before it is acknowledged; a restart replays the log, and
forgetting a user rewrites it. Responses are row numbers of the features.
"""

import sys
import threading
from typing import Annotated

import numpy as np
import uvicorn
from fastapi import FastAPI, Query
from fastapi.responses import JSONResponse
from pydantic import Field

import lore_jax as lore
from experiments.stored import append_record, load_array, read_records, write_records


def make_app(model: lore.RewardModel, features: np.ndarray, log: str) -> FastAPI:
    """The service; every request works on K numbers a response, projected once."""
    table = np.asarray(lore.project(features, model.basis))
    store = lore.UserStore(model.replace(basis=np.eye(model.rank, dtype=table.dtype)))
    app, turn = FastAPI(), threading.Lock()
    Row = Annotated[int, Field(ge=0, lt=len(table))]

    def pairs(records: list) -> lore.Preferences:
        return lore.Preferences.from_pairs(table, *zip(*records))

    @app.post("/users/{user}/pairs")
    def observe(user: str, chosen: Row, rejected: Row) -> None:
        record = chosen, rejected, user
        new = pairs([record])
        with turn:
            append_record(log, record)
            store.observe(new)

    @app.get("/users/{user}/scores")
    def score(user: str, row: Annotated[list[Row], Query()]) -> list[float]:
        return store.score([user], table[row])[0].tolist()

    @app.get("/users/{user}/best")
    def best(user: str, k: int = 10) -> list[int]:
        return store.top_k([user], table, k=k)[1][0].tolist()

    @app.delete("/users/{user}")
    def forget(user: str) -> None:
        with turn:
            store.delete([user])
            write_records(log, [x for x in read_records(log) if x[2] != user])

    app.exception_handler(ValueError)(lambda _, error: JSONResponse(str(error), 400))
    trial = lore.UserStore(store.model)  # Compiles what requests need.
    trial.observe(pairs([(0, 1, "anyone")]))
    trial.score(["anyone"], table)
    if records := read_records(log):
        store.observe(pairs(records))
    return app


if __name__ == "__main__":
    model, features, log, port = sys.argv[1:]
    app = make_app(lore.load(model).model, load_array(features), log)
    uvicorn.run(app, port=int(port), log_level="warning")
