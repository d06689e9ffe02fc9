"""Cross-entropy: L = -log p_y. The plain baseline, and the stage 1 of cRT, LWS and tau-norm (Kang et al. 2020)."""

from tailcal.method import Representation


class Method(Representation):
    """Nothing but the defaults of the contract."""
