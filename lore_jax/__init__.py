"""Low-rank reward modelling: one shared basis, a small mixture for every user.

    r_u(x) = x · V · softmax(w_u) / T

Letters: D features, K rank, U users, M distinct rows, N pairs, A atoms of the prior.
"""

from lore_jax import acquisition as acquisition
from lore_jax import checkpoint as checkpoint
from lore_jax import data as data
from lore_jax import datasets as datasets
from lore_jax import diagnostics as diagnostics
from lore_jax import evaluate as evaluate
from lore_jax import losses as losses
from lore_jax import population as population
from lore_jax import predict as predict
from lore_jax import simplex as simplex
from lore_jax import streaming as streaming
from lore_jax.acquisition import best_pairs as best_pairs
from lore_jax.acquisition import score_pairs as score_pairs
from lore_jax.adapt import adapt as adapt
from lore_jax.adapt import adapt_users as adapt_users
from lore_jax.checkpoint import load as load
from lore_jax.checkpoint import save as save
from lore_jax.config import AdaptConfig as AdaptConfig
from lore_jax.config import TrainConfig as TrainConfig
from lore_jax.evaluate import accuracy as accuracy
from lore_jax.evaluate import log_loss as log_loss
from lore_jax.losses import bradley_terry_loss as bradley_terry_loss
from lore_jax.predict import Posterior as Posterior
from lore_jax.predict import posterior as posterior
from lore_jax.predict import predict_proba as predict_proba
from lore_jax.results import Adapted as Adapted
from lore_jax.results import Fitted as Fitted
from lore_jax.results import Progress as Progress
from lore_jax.reward import init_params as init_params
from lore_jax.reward import margins as margins
from lore_jax.reward import mixture_weights as mixture_weights
from lore_jax.reward import project as project
from lore_jax.reward import reward as reward
from lore_jax.reward import reward_from_weights as reward_from_weights
from lore_jax.reward import score as score
from lore_jax.reward import score_rows as score_rows
from lore_jax.reward import top_k as top_k
from lore_jax.streaming import UserStates as UserStates
from lore_jax.streaming import merge as merge
from lore_jax.streaming import observe as observe
from lore_jax.streaming import start_users as start_users
from lore_jax.streaming import weights as weights
from lore_jax.train import fit as fit
from lore_jax.types import FeatureSource as FeatureSource
from lore_jax.types import Preferences as Preferences
from lore_jax.types import Prior as Prior
from lore_jax.types import RewardParams as RewardParams

__version__ = "0.1.0"
