"""Data: splits, votes, the data set that ships, and simulated users."""

from lore_jax.data.bowling_green import Votes as Votes
from lore_jax.data.bowling_green import load_bowling_green as load_bowling_green
from lore_jax.data.simulate import Planted as Planted
from lore_jax.data.simulate import dirichlet_users as dirichlet_users
from lore_jax.data.simulate import planted as planted
from lore_jax.data.simulate import simulate_choices as simulate_choices
from lore_jax.data.simulate import simulated_preferences as simulated_preferences
from lore_jax.data.splits import FourWay as FourWay
from lore_jax.data.splits import HeldOut as HeldOut
from lore_jax.data.splits import count_judgements as count_judgements
from lore_jax.data.splits import hold_out as hold_out
from lore_jax.data.splits import split_users as split_users
from lore_jax.data.splits import split_votes as split_votes
from lore_jax.data.votes import pairs_from_votes as pairs_from_votes
from lore_jax.preferences import ArraySource as ArraySource
from lore_jax.preferences import store_as as store_as
from lore_jax.preferences import take_pairs as take_pairs
from lore_jax.preferences import take_shots as take_shots
from lore_jax.preferences import take_users as take_users
