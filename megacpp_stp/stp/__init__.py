"""STP (Semantic Tube Prediction): the objective, its sampler, the taps, the gradient seam and the meter.

``L = 1 - cos(h_r - h_s, h_t - h_r)`` for positions s < r < t of one sequence (arXiv 2602.22617, displayed loss).
"""

from megacpp_stp.stp.objective import compute_stp_loss

__all__ = ["compute_stp_loss"]
