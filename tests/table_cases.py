"""What the tests of tables share."""

import json

import numpy as np

HEADER = "user,prompt,chosen,rejected\n"
OBJECT = {"user": "a", "prompt": "x", "chosen": "Yes x.", "rejected": "No x."}
LINES = "".join(
    json.dumps({"user": u, "prompt": q, "chosen": f"Yes {q}.", "rejected": f"No {q}."})
    + "\n"
    for u in "ab"
    for q in "xyz"
)


def line(**changes):
    return json.dumps({**OBJECT, **changes}) + "\n"


def write_parquet(path, **columns):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def columns(users, prompts, **more):
    user = [u for u in users for _ in range(prompts)]
    prompt = [f"{u} {q}" for u in users for q in range(prompts)]
    rows = np.arange(2 * len(user)).reshape(2, -1).tolist()
    return {
        "user": user,
        "prompt": prompt,
        "chosen": rows[0],
        "rejected": rows[1],
        **more,
    }
