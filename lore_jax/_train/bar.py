"""A progress bar of a fit."""

import threading
from typing import Any

_TRAININGS = 14  # of one hold-out, as a rule: the search decides as it goes


class Bar:
    """Counts steps of all trainings; the total is an estimate that may grow.

    Candidates train in threads, so that updates take turns.
    """

    def __init__(self, num_steps: int, trainings: int, shown: bool = True):
        """Opens the bar; one that is not shown counts nothing.

        Raises:
          ImportError: tqdm is not installed.
        """
        try:
            from tqdm.auto import tqdm
        except ImportError as error:
            raise ImportError(
                "progress=True needs tqdm: pip install lore_jax[quickstart]"
            ) from error
        self._turn = threading.Lock()
        self._bar: Any = tqdm(
            total=num_steps * trainings,
            desc="fit",
            unit="step",
            mininterval=0.2,
            disable=not shown,
        )

    def __call__(self, name: str, steps: int) -> None:
        """So many more steps of the training of this name."""
        with self._turn:
            if self._bar.n + steps > self._bar.total:
                self._bar.total = self._bar.n + steps
            self._bar.set_postfix_str(_stage(name), refresh=False)
            self._bar.update(steps)

    def close(self) -> None:
        """Ends the line, at what was really trained."""
        with self._turn:
            self._bar.total = self._bar.n
            self._bar.refresh()
            self._bar.close()


def _stage(name: str) -> str:
    """What the training of this name belongs to."""
    part = name.split(" ", 1)[0]
    return {"all": "all pairs", "judgements": "search", "items": "search"}.get(
        part, part
    )


def expected_trainings(num_holdouts: int, num_starts: int) -> int:
    """How many trainings a default fit has, as a rule."""
    return _TRAININGS * num_holdouts + num_starts
