"""Low-rank reward modelling: one shared basis, a small mixture for every user.

    r_u(x) = x · V · softmax(w_u) / T

Letters: D features, K rank, U users, M distinct rows, N pairs, A atoms of the prior.
"""

import importlib
import typing

from lore_jax import acquisition as acquisition
from lore_jax import data as data
from lore_jax import diagnostics as diagnostics
from lore_jax import evaluation as evaluation
from lore_jax import losses as losses
from lore_jax import prediction as prediction
from lore_jax import streaming as streaming
from lore_jax.acquisition import best_pairs as best_pairs
from lore_jax.acquisition import score_pairs as score_pairs
from lore_jax.adaptation import adapt as adapt
from lore_jax.adaptation import adapt_users as adapt_users
from lore_jax.choosing import best_of_n as best_of_n
from lore_jax.choosing import jury as jury
from lore_jax.comparison import align as align
from lore_jax.comparison import compare as compare
from lore_jax.config import MAP as MAP
from lore_jax.config import Marginal as Marginal
from lore_jax.config import MaximumLikelihood as MaximumLikelihood
from lore_jax.config import PosteriorMean as PosteriorMean
from lore_jax.config import PriorSearch as PriorSearch
from lore_jax.config import PublishedAdam as PublishedAdam
from lore_jax.config import PublishedAlternating as PublishedAlternating
from lore_jax.config import PublishedJoint as PublishedJoint
from lore_jax.config import Search as Search
from lore_jax.evaluation import accuracy as accuracy
from lore_jax.evaluation import log_loss as log_loss
from lore_jax.fitting import fit as fit
from lore_jax.fitting import fit_prior as fit_prior
from lore_jax.io.checkpoint import load as load
from lore_jax.io.checkpoint import load_progress as load_progress
from lore_jax.io.checkpoint import load_users as load_users
from lore_jax.io.checkpoint import save as save
from lore_jax.io.checkpoint import save_progress as save_progress
from lore_jax.io.checkpoint import save_users as save_users
from lore_jax.losses import bradley_terry_loss as bradley_terry_loss
from lore_jax.model import RewardModel as RewardModel
from lore_jax.model import RewardParams as RewardParams
from lore_jax.model import init_params as init_params
from lore_jax.model import margins as margins
from lore_jax.model import mixture_weights as mixture_weights
from lore_jax.model import project as project
from lore_jax.model import reward as reward
from lore_jax.model import reward_from_weights as reward_from_weights
from lore_jax.model import score as score
from lore_jax.model import score_rows as score_rows
from lore_jax.model import top_k as top_k
from lore_jax.prediction import posterior as posterior
from lore_jax.prediction import predict_proba as predict_proba
from lore_jax.prediction import warm_up as warm_up
from lore_jax.preferences import ArraySource as ArraySource
from lore_jax.preferences import FeatureSource as FeatureSource
from lore_jax.preferences import Preferences as Preferences
from lore_jax.preferences import store_as as store_as
from lore_jax.preferences import take_pairs as take_pairs
from lore_jax.preferences import take_shots as take_shots
from lore_jax.preferences import take_users as take_users
from lore_jax.prior import Prior as Prior
from lore_jax.prior import uniform_prior as uniform_prior
from lore_jax.results import Adapted as Adapted
from lore_jax.results import Fitted as Fitted
from lore_jax.results import Posterior as Posterior
from lore_jax.results import Progress as Progress
from lore_jax.store import UserStore as UserStore
from lore_jax.streaming import UserStates as UserStates

if typing.TYPE_CHECKING:
    from lore_jax import heads as heads

__version__ = "0.1.0"


def __getattr__(name: str):
    # On first use: `flax.nnx` takes a tenth of the time of all other imports.
    if name == "heads":
        return importlib.import_module("lore_jax.heads")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
