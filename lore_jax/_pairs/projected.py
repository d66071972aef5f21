"""Projected rewards: what every question about one basis is answered from."""

import dataclasses
import functools
from typing import Any

from lore_jax import _checks, _tables
from lore_jax._pairs.blocks import project_rows
from lore_jax._pairs.pack import Pairs, pack
from lore_jax.model import RewardModel, check_model
from lore_jax.preferences import Preferences


@dataclasses.dataclass(frozen=True, eq=False)
class Projected:
    """Pairs and the projection of their table; the table itself is not needed again.

    Attributes:
      proj: features · V, float[M, K], at T = 1.
      pairs: N pairs of U users over its rows.
    """

    proj: Any
    pairs: Pairs

    @functools.cached_property
    def read(self) -> Any:
        """`Pairs.reader` of the projection, made once."""
        return self.pairs.reader(self.proj)

    @property
    def rank(self) -> int:
        """K."""
        return self.proj.shape[1]


def project_pairs(features, basis, pairs: Pairs) -> Projected:
    """One read of the table, without checks."""
    return Projected(project_rows(features, basis), pairs)


def checked_pairs(model: RewardModel, prefs: Preferences) -> Projected:
    """One read of the table, with the checks of a public function.

    Raises:
      ValueError: the model or the table is not finite, or their product overflows.
      TypeError: an argument is something else.
    """
    _checks.check_type(prefs, Preferences, "prefs")
    check_model(model, prefs.num_features)
    found = project_pairs(prefs.features, model.basis, pack(prefs))
    _tables.check_projected(found.proj, prefs.features, model.temperature)
    return found
