"""Which samples make which batch: lengths are measured once on each machine, then planned."""

import logging


logger = logging.getLogger(__name__)
