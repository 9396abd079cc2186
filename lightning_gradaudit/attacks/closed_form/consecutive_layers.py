"""The batch from two consecutive linear layers: inputs in the span of one gradient with features in that of the next.

dL/dW = D Xᵀ of a linear layer has rank B and its rows span the layer's inputs. If what follows, z -> f(z) for each
unit, feeds another linear layer, the rows of that one's gradient span the features f(W x + b) of the same batch. Each
image alone has to satisfy both: some hundreds of equations for B unknowns, which are linear as long as no unit of a
ReLU switches. Unlike the search for zeros in D (SPEAR, arXiv:2403.03945) this needs none.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_gradaudit.attacks.closed_form.row_space import SPARSE, RowSpace, outer_products, row_space, solve_damped
from lightning_gradaudit.attacks.labels.head import placeholder_labels
from lightning_gradaudit.attacks.labels.recovery import noise_images
from lightning_gradaudit.simulation.layer_trace import LayerCall
from lightning_gradaudit.simulation.observation import Observation


@dataclass(frozen=True)
class ChainedSearchSettings:
    """Settings of the search for inputs that two consecutive layers agree on."""

    steps: int = 25  # of Gauss-Newton from each start
    feature_rounding: float = 2e-7  # of features in fp32, relative
    most_feature_error: float = 1e-5  # relative: up to it the second span can tell an input from similar ones
    start_pixel: float = 0.5  # root mean square of a start's entries where nothing gives its scale
    most_misfit: float = 10.0  # of features, in units of rounding, up to which an input belongs to the batch
    most_input_error: float = 1e-3  # relative, estimated from rounding; above it nothing is certain
    kink_share: float = 1e-3  # of the root mean square over units: nearer to 0 a unit may be on either side
    same_distance: float = 1e-3  # relative: below it two inputs are one
    least_found: int = 2  # inputs, from which on starts avoid them


SETTINGS = ChainedSearchSettings()
_ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    torch.relu,
    functional.leaky_relu,
    functional.gelu,
    functional.silu,
    functional.elu,
    functional.softplus,
    torch.tanh,
    torch.sigmoid,
    functional.relu6,
)


@dataclass(frozen=True)
class Chain:
    """Two linear layers with a known function of each unit between them.

    Attributes:
        weight, bias: (m, d), (m,) or None: the first layer's.
        activation: Elementwise, (N, m) to (N, m).
        first: Span of the inputs.
        second: Span of the inputs of the second layer.
    """

    weight: Tensor
    bias: Tensor | None
    activation: Callable[[Tensor], Tensor]
    first: RowSpace
    second: RowSpace

    def slopes(self, z: Tensor) -> Tensor:
        """Return the activation's derivative at z, of the same shape."""
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            (slopes,) = torch.autograd.grad(self.activation(z).sum(), z)
        return slopes


class ChainedSearch:
    """Gauss-Newton for inputs x in the span of the first gradient whose features lie in that of the second.

    With x = x0 + y T the features f(W x + b) must have nothing outside the second span: far more equations than
    unknowns for each image alone, linear in y as long as no unit of a ReLU switches.
    """

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        space = chain.first
        if space.ones is None:
            self.origin, self.directions = torch.zeros_like(space.s), torch.eye(space.rank).to(space.s)
        else:  # inputs whose entry for the bias is 1
            self.origin = space.ones / space.ones.square().sum()
            self.directions = torch.linalg.svd(space.ones[None]).Vh[1:]
        weight = chain.weight.double()
        self._slope = weight @ (self.directions @ space.v).T
        self._offset = weight @ (self.origin @ space.v) + (0 if chain.bias is None else chain.bias.double())
        second = chain.second
        self._span = second.v
        self._squares = outer_products(self._slope, self._slope)
        self._cross = outer_products(self._span.T, self._slope)

    def starts(self, number: int, found: Tensor, generator: torch.Generator) -> Tensor:
        """Draw starts (number, d), half of them guided by the inputs (K, d) found so far."""
        fresh = self._draw_rows(number, generator)
        if len(found) < SETTINGS.least_found:
            return fresh
        away, zeros = self._move_away(found, fresh, generator), self._guess_zeros(found, number, generator)
        kind = torch.randint(4, (number, 1), generator=generator).to(fresh.device)
        return torch.where(kind == 0, fresh, torch.where(kind == 1, away, zeros))

    def _draw_rows(self, number: int, generator: torch.Generator) -> Tensor:
        """Draw rows of the gradient: they are mixtures of the inputs, some of few."""
        space = self.chain.first
        rows = space.u * space.s
        chosen = rows[torch.randint(len(rows), (number,), generator=generator).to(rows.device)]
        if space.ones is None:
            sign = torch.randint(2, (number, 1), generator=generator).to(rows) * 2 - 1
            chosen = chosen / chosen.norm(dim=1, keepdim=True) * sign * SETTINGS.start_pixel * space.v.shape[1] ** 0.5
        else:
            ones = chosen @ space.ones
            chosen = chosen / torch.where(ones.abs() < 1e-9, torch.ones_like(ones), ones)[:, None]
        return (chosen - self.origin) @ self.directions.T

    def _move_away(self, found: Tensor, starts: Tensor, generator: torch.Generator) -> Tensor:
        """Move starts along the directions that the inputs found so far leave free."""
        number = len(starts)
        centre = found.mean(0)
        spread = (found - centre).norm(dim=1).mean()
        basis = torch.linalg.svd(found - centre, full_matrices=False).Vh[: len(found) - 1]
        free = starts - centre
        free = free - free @ basis.T @ basis
        free = free / free.norm(dim=1, keepdim=True).clamp_min(1e-30)
        along = torch.randn((number, len(basis)), generator=generator).to(found) @ basis
        along = along / along.norm(dim=1, keepdim=True).clamp_min(1e-30)
        lengths = torch.rand((number, 2), generator=generator).to(found) * found.new_tensor([1.5, 4.0])
        return centre + spread * (lengths[:, :1] * along + (lengths[:, 1:] - 2) * free)

    def _guess_zeros(self, found: Tensor, number: int, generator: torch.Generator) -> Tensor:
        """Guess which units are off for an input not yet found, and solve for it.

        Vectors orthogonal to the inputs found so far take from the gradient a mixture of the other columns of D: a
        single column if one input is missing, else the mixture that is zero in a few rows drawn at random.
        """
        space = self.chain.first
        missing = space.rank - len(found)
        free = torch.linalg.svd(self.coordinates(found)).Vh[len(found) :]  # (missing, r)
        rows = (space.u * space.s) @ free.T
        chosen = torch.randint(len(rows), (number, max(missing - 1, 1)), generator=generator).to(rows.device)
        mixture = torch.ones((number, missing)).to(rows)
        if missing > 1:
            mixture = torch.linalg.svd(rows[chosen]).Vh[:, -1]
        columns = mixture @ rows.T
        on = columns.abs() > SPARSE.nearly_zero * columns.square().mean(1, keepdim=True).sqrt()
        mask = torch.zeros((number, len(self._offset))).to(rows)
        mask[:, space.rows] = on.to(mask)
        return self._solve(mask, mask * self._offset, torch.zeros_like(mixture[:, :1]).expand(-1, found.shape[1]))

    def descend(self, y: Tensor) -> Tensor:
        """Take Gauss-Newton steps from each start (N, d)."""
        for _ in range(SETTINGS.steps):
            y = self._step(y)
        return y

    def _step(self, y: Tensor) -> Tensor:
        z = self._offset + y @ self._slope.T
        slopes = self.chain.slopes(z)
        return self._solve(slopes, self.chain.activation(z) - slopes * (y @ self._slope.T), y)

    def _solve(self, df: Tensor, rest: Tensor, otherwise: Tensor) -> Tensor:
        """Minimise the part of rest + df (slope y) outside the second span; return `otherwise` where that fails."""
        d, r = self._slope.shape[1], len(self._span)
        cross = (df @ self._cross).reshape(-1, r, d)
        normal = (df.square() @ self._squares).reshape(-1, d, d) - cross.transpose(1, 2) @ cross
        inside = rest @ self._span.T
        if self.chain.second.ones is not None:
            inside = inside + self.chain.second.ones
        right = (inside[:, None] @ cross)[:, 0] - (df * rest) @ self._slope
        moved = solve_damped(normal, right, damping=1e-12)
        return torch.where(moved.isfinite().all(1, keepdim=True), moved, otherwise)

    def misfit(self, y: Tensor) -> Tensor:
        """Return the part of each input's features outside the second span, in units of what rounding explains."""
        second = self.chain.second
        f = self.chain.activation(self._offset + y @ self._slope.T)
        if second.ones is not None:
            f = torch.cat([f, torch.ones_like(f[:, :1])], dim=1)
        inside = f @ second.whole.T
        outside = (f - inside @ second.whole).norm(dim=1)
        # Noise turns the span by noise / s in each direction.
        turned = second.noise * f.shape[1] ** 0.5 * (inside / second.s).norm(dim=1)
        size = f.norm(dim=1)
        return outside / (turned + SETTINGS.feature_rounding * size).minimum(SETTINGS.most_feature_error * size)

    def error(self, y: Tensor) -> Tensor:
        """Return the possible error of each input (N, d) along its least determined direction, relative to its length.

        Images that switch the same units on leave their mixtures undetermined, up to the point where another unit
        switches, so that a unit at its kink does not count.
        """
        z = self._offset + y @ self._slope.T
        f, df = self.chain.activation(z), self.chain.slopes(z)
        settled = z.abs() > SETTINGS.kink_share * z.square().mean(1, keepdim=True).sqrt()
        jacobian = (df * settled)[:, :, None] * self._slope
        jacobian = jacobian - self._span.T @ (self._span @ jacobian)
        weakest = torch.linalg.svdvals(jacobian)[:, -1]
        return SETTINGS.feature_rounding * f.norm(dim=1) / weakest.clamp_min(1e-300) / self.coordinates(y).norm(dim=1)

    def coordinates(self, y: Tensor) -> Tensor:
        """Return the inputs in terms of the rows of `RowSpace.v`, (N, r)."""
        return self.origin + y @ self.directions


def solve_chain(chain: Chain, generator: torch.Generator, *, starts: int, rounds: int, deadline: float) -> Tensor:
    """Search for the inputs of a chain until all are found or a limit is reached.

    Args:
        chain: Where to search.
        generator: Draws the starts.
        starts, rounds: Descents in a round, and rounds at most.
        deadline: On the clock of `time.monotonic`; read after each round.

    Returns:
        (K, r) in terms of the rows of `chain.first.v`, K <= r: those that both spans determine, each by itself.
    """
    search = ChainedSearch(chain)
    rank = chain.first.rank
    found = search.directions.new_zeros((0, len(search.directions)))
    for _ in range(rounds):
        ends = search.descend(search.starts(starts, found, generator))
        ends = ends[search.misfit(ends) < SETTINGS.most_misfit]
        for end in ends[search.error(ends) < SETTINGS.most_input_error]:
            distance = (found - end).norm(dim=1)
            if not bool((distance < SETTINGS.same_distance * search.coordinates(end[None]).norm()).any()):
                found = torch.cat([found, end[None]])
        if len(found) >= rank or time.monotonic() > deadline:
            break
    return search.coordinates(found[:rank])


def shared_space(
    observation: Observation, weight: str, bias: str | None, generator: torch.Generator
) -> RowSpace | None:
    """Return the span of a layer's inputs, or None where its gradient is not of rank B to single precision."""
    gradients = observation.gradients
    return row_space(
        gradients[weight],
        None if bias is None else gradients[bias],
        size=observation.batch_size,
        generator=generator,
    )


def find_chains(observation: Observation, name: str, space: RowSpace, generator: torch.Generator) -> Iterator[Chain]:
    """Find linear layers that an activation alone separates from the one called `name`, by a forward pass on noise."""
    labels = placeholder_labels(observation)
    with torch.no_grad():
        calls = observation.trace(noise_images(observation, generator), labels)
    names = [call.name for call in calls]
    first = calls[names.index(name)]
    for call in calls[names.index(name) + 1 :]:
        if names.count(call.name) > 1 or call.weight not in observation.gradients:
            continue
        activation = _find_activation(observation, first, call)
        if activation is None:
            continue
        bias = call.bias if call.bias in observation.gradients else None
        second = shared_space(observation, call.weight, bias, generator)
        if second is None or second.rank < space.rank or (space.ones is None and second.ones is None):
            continue
        offset = None if first.module.bias is None else observation.parameters[first.bias]
        yield Chain(observation.parameters[first.weight], offset, activation, space, second)


def _find_activation(
    observation: Observation, first: LayerCall, second: LayerCall
) -> Callable[[Tensor], Tensor] | None:
    """Return the module or function that turns each output of one layer into an input of the next."""
    if first.outputs.ndim != 2 or first.outputs.shape != second.inputs.shape:
        return None
    kept: list[Callable[[Tensor], Tensor]] = [
        module
        for module in observation.client.module.modules()
        if type(module).__module__ == nn.ReLU.__module__ and not isinstance(module, nn.RReLU)
        if not list(module.parameters()) and not list(module.children())
    ]
    half = first.outputs.shape[1] // 2
    for function in (*kept, *_ACTIVATIONS):
        try:
            whole, part = function(first.outputs.clone()), function(first.outputs[:, :half].clone())
        except (RuntimeError, TypeError, ValueError):  # modules that take no single (N, m) tensor
            continue
        same = whole.shape == second.inputs.shape and torch.allclose(whole, second.inputs, atol=1e-6)
        if same and torch.allclose(whole[:, :half], part, atol=1e-6):  # a softmax is no function of each unit
            return lambda z, function=function: function(z.clone())  # type: ignore[misc] # modules may work in place
    return None
