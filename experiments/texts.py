"""Distinct texts and their rows: what is embedded, each once.

A text is a whole conversation (chat messages) that ends with the response to be
scored. Its hash covers roles and contents, so the same response to the same history
has one row wherever it occurs.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from experiments.prepared import digest, replacing
from lore_jax.cli.table_files import lone_surrogate


class TextIndex:
    """Distinct texts in order of arrival: hash of the messages → row."""

    def __init__(self) -> None:
        """Start empty."""
        self.messages: list[list[dict]] = []
        self.hashes: list[str] = []
        self._row: dict[str, int] = {}

    def __len__(self) -> int:
        """Number of distinct texts, M."""
        return len(self.messages)

    def add(self, messages: Sequence[dict], where: str) -> int:
        """The row of a text, a new one if it has not been seen before.

        Args:
            messages: chat messages ``{"role": str, "content": str}``.
            where: what to call this row of the source in an error.

        Raises:
            TypeError: if a role or content is not a string. A list of strings as
                content would be printed into the text, and tell the answer.
            ValueError: if there is no message, or a text is none: no file and no
                tokenizer takes half of a surrogate pair.
        """
        if not messages:
            raise ValueError(f"{where}: no messages")
        for place, message in enumerate(messages):
            for key in ("role", "content"):
                if not isinstance(value := message.get(key), str):
                    raise TypeError(
                        f"{where}: message {place} ({message.get('role')!r}): {key} "
                        f"must be a string, got {type(value).__name__}: "
                        f"{str(value)[:60]!r}"
                    )
                if (half := lone_surrogate(value)) >= 0:
                    raise ValueError(
                        f"{where}: message {place}: {key} holds half a character, the "
                        f"lone surrogate U+{ord(value[half]):X}, at place {half}"
                    )
        plain = [{"role": m["role"], "content": m["content"]} for m in messages]
        key = text_hash(plain)
        row = self._row.setdefault(key, len(self.messages))
        if row == len(self.messages):
            self.messages.append(plain)
            self.hashes.append(key)
        return row

    def fingerprint(self) -> str:
        """One hash of all texts in their order."""
        return digest("".join(self.hashes))[:16]

    def save(self, path, responses: Sequence[str] | None = None) -> None:
        """Write ``texts.jsonl``, all at once.

        Args:
            path: where to.
            responses: what the chat template made of each response, if known; the
                leak checks look at these, later without any tokenizer.
        """
        with replacing(Path(path)) as temporary:
            with open(temporary, "w", encoding="utf-8") as file:
                for row, key in enumerate(self.hashes):
                    line = {"row": row, "hash": key, "messages": self.messages[row]}
                    if responses is not None:
                        line["response"] = responses[row]
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path) -> "TextIndex":
        """Read what :meth:`save` wrote."""
        index = cls()
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file):
                index.add(json.loads(line)["messages"], f"{path}, line {number + 1}")
        return index


def load_responses(folder) -> list[str]:
    """The responses of a prepared folder, by row, as the model reads them."""
    found = []
    with open(Path(folder) / "texts.jsonl", encoding="utf-8") as file:
        for line in map(json.loads, file):
            found.append(line.get("response", line["messages"][-1]["content"]))
    return found


def text_hash(messages: Sequence[dict]) -> str:
    """Hash of a conversation: roles and contents in order."""
    plain = [[m["role"], m["content"]] for m in messages]
    return digest(json.dumps(plain, ensure_ascii=False))[:32]
