"""Old import path of `metamorph.mini`, kept for one release."""

from metamorph.mini import *  # noqa: F403
from metamorph.quickstart import warn_of_move


warn_of_move(__name__, "metamorph.mini")
