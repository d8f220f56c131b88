"""A sink that writes down every use of a weight, and the gradients that its rows make, example by example."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from ritz.curvature import Capture, OneHot, discover


@dataclass
class Use:
    """One reported use: input rows a (n, R, d_in), one-hot ones written out, and output gradients g (n, R, d_out)."""

    site: object
    a: torch.Tensor
    g: torch.Tensor
    first_row: int
    again: bool
    batch: int


class Recorder:
    """Takes everything while ``on``."""

    def __init__(self):
        self.uses, self.on, self.capture = [], True, None

    def wanted(self, site, entries):
        return self.on

    def used(self, site, x, g, y, first_row, again, batch):
        if self.on:
            rule, module = site.rule, site.module
            g = rule.outputs(module, g, x)
            a = rule.inputs(module, x, y)
            if isinstance(a, OneHot):
                a = F.one_hot(a.index, a.size).to(g.dtype)
            self.uses.append(Use(site, a, g, first_row, again, batch))

    def of(self, weight):
        return [use for use in self.uses if use.site.weight is weight]


def watch(model, **settings):
    """A recorder on all weights of a model that have a rule, and what was discovered."""
    found = discover(model)
    recorder = Recorder()
    recorder.capture = Capture([site for own in found.values() for site in own.sites], recorder, **settings)
    return recorder, found


def row_gradients(uses):
    """Σ_r g_r a_rᵀ (n, d_out, d_in) and Σ_r g_r (n, d_out) over all uses of one weight."""
    site = uses[0].site
    d_out, d_in = site.rule.to_matrix(site.module, site.weight.detach()).shape
    n = uses[0].g.shape[0]
    weight, bias = torch.zeros(n, d_out, d_in).double(), torch.zeros(n, d_out).double()
    for use in uses:
        rows = slice(use.first_row, use.first_row + use.g.shape[-1])
        for i in range(n):
            weight[i, rows] += use.g[i].mT @ use.a[i]
            bias[i, rows] += use.g[i].sum(0)
    return weight, bias


def close(found, expected, tol=1e-12):
    """Whether two tensors agree to ``tol`` of the largest entry."""
    found, expected = found.detach(), expected.detach()
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return float((found - expected).abs().max()) <= tol * float(expected.abs().max())
