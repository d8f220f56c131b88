"""What the tests of fitting share."""

import torch

from ritz import Hutchinson, Lanczos

EXACT = (Hutchinson(1000), Lanczos(rtol=1e-6))  # as many probes as points: nothing random, but by products


def standing(gp, report, X, y):
    """The loss at the parameters of ``gp``, as its second stage saw it."""
    gp.preconditioner = report.preconditioner
    with torch.no_grad():
        return float(-(gp.log_marginal_likelihood(X, y) + gp.log_prior()) / y.numel())
