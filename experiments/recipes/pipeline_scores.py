"""K scores by a pipeline of transformers, mixed into the rewards of any user.

    python -m experiments.recipes.pipeline_scores exported "A text." "Another text."

``hf.export_head(model, base, path="exported")`` writes the model, with K outputs. The
scores are computed once; a user's reward is a weighted sum of K numbers.
"""

import argparse

import numpy as np


def scores(folder, texts, *, batch_size: int = 8, device=None) -> np.ndarray:
    """float32[M, K] scores of texts by the exported model.

    Args:
        folder: what ``hf.export_head`` wrote without ``user``.
        texts: M strings or lists of chat messages.
        batch_size: texts of a batch.
        device: of the pipeline.
    """
    from transformers import pipeline

    pipe = pipeline("text-classification", model=str(folder), device=device)
    render, out = pipe.tokenizer.apply_chat_template, []
    for plain in (True, False):  # The chat template brings its own special tokens.
        rows = [i for i, text in enumerate(texts) if isinstance(text, str) == plain]
        some = [texts[i] for i in rows]
        if not plain:
            some = [render(text, tokenize=False) for text in some]
        settings = dict(top_k=None, batch_size=batch_size, add_special_tokens=plain)
        out += zip(rows, pipe(some, **settings) if rows else [])
    found = np.empty((len(texts), pipe.model.config.num_labels), np.float32)
    place = pipe.model.config.label2id
    for row, entries in out:  # They come sorted by score.
        for entry in entries:
            found[row, place[entry["label"]]] = entry["score"]
    return found


def rewards(found: np.ndarray, weights) -> np.ndarray:
    """float32[U, M]: weights float[U, K] on the simplex times scores float[M, K]."""
    return np.asarray(weights, np.float32) @ found.T


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("texts", nargs="+")
    args = parser.parse_args()
    for text, row in zip(args.texts, scores(args.folder, args.texts)):
        print(text, row.round(4).tolist(), sep="\t")
