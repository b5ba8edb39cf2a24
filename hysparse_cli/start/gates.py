"""Gates fitted to the dense layer's attention output.

The exact merge of disjoint key sets S and W has gates sigmoid(LSE_S - LSE_W) and one minus that. It
holds for one set of keys and values; where S is read from another layer's, the gates that do least
damage are found instead, token by token, and a linear map of the layer's input is fitted to them.

Shape suffixes: N tokens, H query heads, C hidden size.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from hysparse_cli.model.gates import Gate
from hysparse_cli.start.result import LayerStart

LARGEST_LOGIT = 6.0
RIDGES = (1e-3, 1e-2, 1e-1, 1.0)
HELD_OUT = 4  # one token in so many, in one stretch at the end, chooses the ridge


class Products(NamedTuple):
    """(N, H) inner products of outputs over the head dim: s block-sparse, w SWA, o the dense."""

    ss: Tensor
    sw: Tensor
    ww: Tensor
    so: Tensor
    wo: Tensor
    oo: Tensor

    def error(self, gates: Tensor) -> Tensor:
        """(N, H): ||g_s s + g_w w - o||^2 of ``gates`` (N, H, 2)."""
        s, w = gates.unbind(-1)
        both = s * s * self.ss + 2 * s * w * self.sw + w * w * self.ww
        return both - 2 * (s * self.so + w * self.wo) + self.oo

    def to(self, device: torch.device) -> "Products":
        return Products(*(product.to(device) for product in self))

    def cpu(self) -> "Products":
        return self.to(torch.device("cpu"))

    @staticmethod
    def joined(parts: list["Products"]) -> "Products":
        return Products(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def rows(self, begin: int, end: int) -> "Products":
        return Products(*(product[begin:end] for product in self))


class Gates(NamedTuple):
    """weight: (n H, C), bias: (n H,), rows head-major as in ``hysparse.gate``; n logits a head."""

    weight: Tensor
    bias: Tensor
    gate: Gate

    def of(self, x: Tensor) -> Tensor:
        """(N, H, 2) gates of the layer's inputs (N, C)."""
        logits = x @ self.weight.T + self.bias
        return self.gate.weights(logits.view(len(x), -1, self.gate.logits_per_head))


def products_of(sparse: Tensor, window: Tensor, dense: Tensor) -> Products:
    """Args: three outputs (B, T, H, D); what is returned has N = B T."""
    s, w, o = (out.float().flatten(0, 1) for out in (sparse, window, dense))
    pairs = ((s, s), (s, w), (w, w), (s, o), (w, o), (o, o))
    return Products(*((a * b).sum(-1) for a, b in pairs))


def best_gates(p: Products) -> Tensor:
    """(N, H, 2): the pair in [0, 1]^2 of least error, for each token and head.

    The error is a convex quadratic: its minimum is inside, or the best of those on the four edges.
    """
    tiny = torch.finfo(p.ss.dtype).tiny
    determinant = p.ss * p.ww - p.sw * p.sw
    inside = torch.stack([p.so * p.ww - p.wo * p.sw, p.wo * p.ss - p.so * p.sw], -1)
    inside = inside / determinant.clamp(min=tiny)[..., None]
    flat = determinant <= 1e-6 * p.ss * p.ww  # the outputs are parallel: an edge is as good
    feasible = (inside >= 0).all(-1) & (inside <= 1).all(-1) & ~flat
    edges = []
    for fixed in (0.0, 1.0):
        held = torch.full_like(p.ss, fixed)
        edges.append(torch.stack([held, _unit((p.wo - fixed * p.sw) / p.ww.clamp(min=tiny))], -1))
        edges.append(torch.stack([_unit((p.so - fixed * p.sw) / p.ss.clamp(min=tiny)), held], -1))
    errors = torch.stack([p.error(edge) for edge in edges])
    order = errors.argmin(0)[None, ..., None].expand(1, *inside.shape)
    edge = torch.stack(edges).gather(0, order)[0]
    return torch.where(feasible[..., None], inside, edge)


def fit_gates(x: Tensor, p: Products, gate: Gate) -> Gates:
    """Fit the logits of the best gates by ridge regression on ``x`` (N, C), float32.

    The ridge of ``RIDGES`` (in units of the inputs' mean variance) is the one whose gates do the
    least damage on the last tokens, which it was not fitted to; all tokens then take part.
    """
    target = gate.logits(best_gates(p), 1e-6).clamp(-LARGEST_LOGIT, LARGEST_LOGIT).flatten(1)
    cut = len(x) - len(x) // HELD_OUT
    tried = _ridge(x[:cut], target[:cut], RIDGES, gate)
    held = p.rows(cut, len(x))
    errors = [float(held.error(gates.of(x[cut:])).sum()) for gates in tried]
    return _ridge(x, target, (RIDGES[errors.index(min(errors))],), gate)[0]


def fit_of(x: Tensor, copied: Products, p: Products, gates: Gates) -> LayerStart:
    """How well ``gates`` do on ``p``, which they were fitted to; ``copied``: without maps."""
    fitted, whole = gates.of(x), p.oo.sum()
    error = p.error(fitted).sum(0)
    half = torch.full_like(fitted, 0.5)
    means = fitted.mean((0, 1)).tolist()
    return LayerStart(
        half=float(copied.error(half).sum() / whole),
        copied=float(copied.error(best_gates(copied)).sum() / whole),
        best=float(p.error(best_gates(p)).sum() / whole),
        fitted=float(error.sum() / whole),
        by_head=tuple((error / p.oo.sum(0)).tolist()),
        gates=(means[0], means[1]),
    )


def _ridge(x: Tensor, y: Tensor, ridges: tuple[float, ...], gate: Gate) -> list[Gates]:
    """Linear maps with bias of x (N, C) to logits y (N, n H), one for each ridge."""
    x_mean, y_mean = x.double().mean(0), y.double().mean(0)
    centred = x.double() - x_mean
    square = centred.T @ centred
    values, vectors = torch.linalg.eigh(square)
    cross = vectors.T @ (centred.T @ (y.double() - y_mean))
    variance = values.clamp(min=0).mean()
    maps = []
    for ridge in ridges:
        weight = (vectors @ (cross / (values.clamp(min=0) + ridge * variance)[:, None])).T
        maps.append(Gates(weight.to(x.dtype), (y_mean - weight @ x_mean).to(x.dtype), gate))
    return maps


def _unit(gate: Tensor) -> Tensor:
    return gate.clamp(0, 1)
