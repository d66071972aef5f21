"""Low-rank reward modelling: one shared basis, a small mixture for every user.

    r_u(x) = x · V · softmax(w_u) / T

Letters: D features, K rank, U users, M distinct rows, N pairs, A atoms of the prior.
"""

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
from lore_jax.config import AdaptConfig as AdaptConfig
from lore_jax.config import TrainConfig as TrainConfig
from lore_jax.evaluation import accuracy as accuracy
from lore_jax.evaluation import log_loss as log_loss
from lore_jax.fitting import fit as fit
from lore_jax.io.checkpoint import load as load
from lore_jax.io.checkpoint import load_progress as load_progress
from lore_jax.io.checkpoint import load_users as load_users
from lore_jax.io.checkpoint import save as save
from lore_jax.io.checkpoint import save_progress as save_progress
from lore_jax.io.checkpoint import save_users as save_users
from lore_jax.losses import bradley_terry_loss as bradley_terry_loss
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
from lore_jax.prediction import Posterior as Posterior
from lore_jax.prediction import posterior as posterior
from lore_jax.prediction import predict_proba as predict_proba
from lore_jax.preferences import ArraySource as ArraySource
from lore_jax.preferences import FeatureSource as FeatureSource
from lore_jax.preferences import Preferences as Preferences
from lore_jax.preferences import take_pairs as take_pairs
from lore_jax.preferences import take_shots as take_shots
from lore_jax.preferences import take_users as take_users
from lore_jax.prior import Prior as Prior
from lore_jax.results import Adapted as Adapted
from lore_jax.results import Fitted as Fitted
from lore_jax.results import Progress as Progress
from lore_jax.streaming import UserStates as UserStates
from lore_jax.streaming import merge as merge
from lore_jax.streaming import observe as observe
from lore_jax.streaming import start_users as start_users
from lore_jax.streaming import weights as weights

__version__ = "0.1.0"
