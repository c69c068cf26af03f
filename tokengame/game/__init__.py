"""The Markov game: every patch token of an image is an agent that decides, stage after stage, whether it is kept."""

from tokengame.game.env import TokenGame
from tokengame.game.state import Decide, Observation, State

__all__ = ["Decide", "Observation", "State", "TokenGame"]
