"""Theorem A.2 of the paper, certified and tried: ``python -m lamp_fast.reproduce.theorem``.

A frozen layer of attention and MLP (Eq. 12) sees X_1 = [x_1, x_0] and X_2 = [x_2, x_0]; prompts are
to make it answer y_10 and y_20 at the shared token x_0. With a prompt P that is the same for both,

    Attn(x_0, [P, X_i]) = lambda_i Attn(x_0, X_i) + (1 - lambda_i) p,     p = Attn(x_0, P),

with 0 < lambda_i < 1 and one p for both. So p lies in the open cone of a - x_0 and -Attn(x_0, X_1)
and in that of b - x_0 and -Attn(x_0, X_2), for some of the at most two inputs a that the MLP maps
to y_10 and b that it maps to y_20. :func:`certify` shows that no p does.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Polygon
from scipy.optimize import linprog
from torch import Tensor

from lamp_fast import cli
from lamp_fast.errors import InputError
from lamp_fast.ops import retrieve
from lamp_fast.runs.figures import save_figure

ARMS = ("vanilla", "shared prompts only", "LAMP queried with x_0", "LAMP queried with x_i")
ROUNDS = 10


def _rows(*rows: Sequence[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


@dataclass(frozen=True)
class Toy:
    """The frozen layer and the two sequences; float64, width 2 so that it can be drawn.

    Attributes:
        w_q, w_k, w_v: [2, 2], of the attention (scores are not scaled).
        w_1, w_2: [2, 2], of the MLP.
        x_0: [2], shared.
        x: [2, 2], the token that tells the sequences apart, of each.
        y_0: [2, 2], the answer that is asked for at x_0, of each sequence.
    """

    w_q: Tensor
    w_k: Tensor
    w_v: Tensor
    w_1: Tensor
    w_2: Tensor
    x_0: Tensor
    x: Tensor
    y_0: Tensor

    def sequence(self, which: int) -> Tensor:
        """X_1 (``which`` = 0) or X_2, [2, 2]: the telling token, then x_0."""
        return torch.stack([self.x[which], self.x_0])

    def attend(self, queries: Tensor, context: Tensor) -> Tensor:
        """Attn(x, X) for x [N, 2] and X [L, 2]."""
        scores = (queries @ self.w_q.T) @ (context @ self.w_k.T).T
        return scores.softmax(dim=-1) @ (context @ self.w_v.T)

    def mlp(self, x: Tensor) -> Tensor:
        """Eq. 12, x [N, 2]."""
        gate = (x @ self.w_1.T)[:, :1] > 0
        return torch.where(gate, x @ self.open_gate.T, x)

    def preimages(self, y: Tensor) -> Tensor:
        """[2, 2]: every input that the MLP can map to y [2]. Not each need lie on its own side of
        the gate; one too many only makes the certificate harder."""
        return torch.stack([y, torch.linalg.solve(self.open_gate, y)])

    def answers(self, prompts: Tensor, which: int) -> Tensor:
        """T([P, X]) at the tokens of a sequence, [2, 2]; prompts [n, 2]."""
        x = self.sequence(which)
        return self.mlp(self.attend(x, torch.cat([prompts, x])) + x)

    @property
    def open_gate(self) -> Tensor:
        """W_2 W_1 + I, [2, 2]."""
        return self.w_2 @ self.w_1 + torch.eye(2, dtype=torch.float64)


TOY = Toy(
    w_q=_rows((1, 0), (0, 1)),
    w_k=_rows((0.2, 0), (0, 0.2)),
    w_v=_rows((1, 0), (0, 1)),
    w_1=_rows((1, 0), (0, 1)),
    w_2=_rows((1, 0), (0, 0.5)),
    x_0=_rows((0, 0.5))[0],
    x=_rows((-1, 3), (1, -3)),
    y_0=_rows((1, 2), (-1, -1)),
)


@dataclass(frozen=True)
class Certificate:
    """That no prompt which is the same for both sequences gives both answers.

    Attributes:
        normal: [2], a unit vector, positive on what generates the cones of the first sequence and
            negative on what generates those of the second.
        margin: the least of these products in size, generators scaled to length 1. Rounding in the
            few operations behind it is below 1e-14.
        bound: whatever the prompt, one of the two answers at x_0 is off by at least this much.
    """

    normal: np.ndarray
    margin: float
    bound: float


def certify(toy: Toy) -> Certificate | None:
    """Separate the two sequences' cones by a linear programme; None where no line does.

    With u_1 = a - x_0 and v_1 = -Attn(x_0, X_1) for both a, and u_2, v_2 for both b, let w have
    w.u_1, w.v_1 > 0 > w.u_2, w.v_2. Then w is positive on the closed cones of the first sequence
    but for 0, negative on those of the second but for 0: they meet only in 0. Nor can 0 be the p of
    a prompt: w is positive on the open cones of the first sequence, which therefore miss 0.

    w also bounds the error. Let h_i = Attn(x_0, [P, X_i]), which should be a u_i. If w.p <= 0, then
    w.h_1 <= 0 < w.u_1, so |h_1 - u_1| >= w.u_1; if w.p > 0, then w.h_2 > 0 > w.u_2, so
    |h_2 - u_2| >= -w.u_2. Behind the MLP a distance from an answer is at least the distance from
    one of its preimages, times the smallest singular value of W_2 W_1 + I where the gate is open.
    """
    wanted = [toy.preimages(toy.y_0[which]) - toy.x_0 for which in (0, 1)]
    pulls = [-toy.attend(toy.x_0[None], toy.sequence(which)) for which in (0, 1)]
    first, second = (torch.cat(each) for each in zip(wanted, pulls, strict=True))
    generators = torch.cat([first, -second]).numpy()
    generators = generators / np.linalg.norm(generators, axis=1, keepdims=True)
    # The largest t with w.g >= t for every generator g and |w| <= 1 in the maximum norm.
    count = len(generators)
    answer = linprog(
        c=[0, 0, -1],
        A_ub=np.hstack([-generators, np.ones((count, 1))]),
        b_ub=np.zeros(count),
        bounds=[(-1, 1), (-1, 1), (None, None)],
    )
    normal = answer.x[:2]
    if not (generators @ normal).min() > 1e-9:
        return None
    normal = normal / np.linalg.norm(normal)
    slack = min((wanted[0].numpy() @ normal).min(), (-wanted[1].numpy() @ normal).min())
    shrinking = min(1.0, float(torch.linalg.svdvals(toy.open_gate).min()))
    return Certificate(normal, float((generators @ normal).min()), float(shrinking * slack))


class Lamp(torch.nn.Module):
    """LAMP on the toy: M pool entries of which K are retrieved, S shared ones, an affine projector.

    Args:
        toy: the frozen layer.
        query: "x_i" retrieves with the token that tells the sequences apart, "x_0" with the shared
            one, as the paper's toy is printed; None has shared prompts alone.
    """

    def __init__(self, toy: Toy, query: str | None, *, m: int = 4, k: int = 2, s: int = 1) -> None:
        super().__init__()
        self.toy, self.query, self.k = toy, query, k
        self.pool = torch.nn.Parameter(torch.randn(m, 2, dtype=torch.float64))
        self.shared = torch.nn.Parameter(torch.randn(s, 2, dtype=torch.float64))
        self.phi = torch.nn.Linear(2, 2, dtype=torch.float64)
        if query is None:
            self.pool.requires_grad_(False)

    def chosen(self, which: int) -> list[int]:
        """Pool entries that a sequence retrieves."""
        if self.query is None:
            return []
        query = self.toy.x[which] if self.query == "x_i" else self.toy.x_0
        keys = self.phi(self.pool).detach()
        indices, _, _ = retrieve(query[None], keys, torch.zeros(len(keys)).double(), self.k)
        return indices[0].tolist()

    def forward(self, which: int) -> Tensor:
        """The prompts of a sequence, [K + S, 2]."""
        return self.phi(torch.cat([self.pool[self.chosen(which)], self.shared]))


class Vanilla(torch.nn.Module):
    """Prompts [n, 2] that are the same for every sequence."""

    def __init__(self, n: int = 3) -> None:
        super().__init__()
        self.prompts = torch.nn.Parameter(torch.randn(n, 2, dtype=torch.float64))

    def forward(self, which: int) -> Tensor:
        """The same whatever the sequence."""
        return self.prompts


def error_at_x_0(toy: Toy, prompts: Callable[[int], Tensor]) -> float:
    """The larger distance of the two answers at x_0 from what is asked for."""
    with torch.no_grad():
        return max(
            float((toy.answers(prompts(which), which)[1] - toy.y_0[which]).norm())
            for which in (0, 1)
        )


def fit(toy: Toy, model: torch.nn.Module, rounds: int = ROUNDS) -> list[float]:
    """Minimise the squared error at x_0 with L-BFGS.

    Args:
        toy: the frozen layer.
        model: gives the prompts of a sequence.
        rounds: of 20 iterations each.

    Returns:
        :func:`error_at_x_0` at the start and after every round.
    """
    optimiser = torch.optim.LBFGS(
        [each for each in model.parameters() if each.requires_grad],
        max_iter=20,
        history_size=20,
        tolerance_grad=0,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        answers = torch.stack([toy.answers(model(which), which)[1] for which in (0, 1)])
        loss = (answers - toy.y_0).square().sum()
        loss.backward()
        return loss

    errors = [error_at_x_0(toy, model)]
    for _ in range(rounds):
        optimiser.step(closure)
        errors.append(error_at_x_0(toy, model))
    return errors


def try_arm(toy: Toy, arm: str, seed: int) -> tuple[torch.nn.Module, list[float]]:
    """One start of one of :data:`ARMS`: the fitted prompts and their errors."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        queries = {"vanilla": None, ARMS[1]: None, ARMS[2]: "x_0", ARMS[3]: "x_i"}
        model = Vanilla() if arm == "vanilla" else Lamp(toy, queries[arm])
        return model, fit(toy, model)


def draw(
    toy: Toy,
    certificate: Certificate,
    errors: Mapping[str, Sequence[Sequence[float]]],
    found: Mapping[str, torch.nn.Module],
) -> Figure:
    """The cones with what the prompts of each arm attend to, and the errors of every start."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    plane, curves = figure.subplots(1, 2)
    _draw_cones(plane, toy, certificate)
    for number, (arm, model) in enumerate(found.items()):
        with torch.no_grad():
            points = [toy.attend(toy.x_0[None], model(which))[0].tolist() for which in (0, 1)]
        points = points if arm == ARMS[3] else points[:1]
        for which, point in enumerate(points):
            label = arm if which == 0 else None
            plane.plot(*point, "osD*"[number], color=f"C{number + 2}", markersize=8, label=label)
    plane.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    for number, (arm, starts) in enumerate(errors.items()):
        for start, values in enumerate(starts):
            shown = np.maximum(values, 1e-16)
            label = arm if start == 0 else None
            curves.semilogy(shown, color=f"C{number + 2}", alpha=0.7, label=label)
    curves.axhline(
        certificate.bound, color="black", linestyle="--", linewidth=1, label="certified bound"
    )
    curves.set(
        xlabel="rounds of 20 L-BFGS iterations",
        title="larger error of the two answers",
        ylabel="distance",
    )
    curves.legend(frameon=False, fontsize=8)
    return figure


def _draw_cones(plane: Axes, toy: Toy, certificate: Certificate) -> None:
    reach = 4.0
    for which, colour in ((0, "C0"), (1, "C1")):
        pull = -toy.attend(toy.x_0[None], toy.sequence(which))[0].numpy()
        for preimage in toy.preimages(toy.y_0[which]):
            sides = np.stack([(preimage - toy.x_0).numpy(), pull])
            sides = 3 * reach * sides / np.linalg.norm(sides, axis=1, keepdims=True)
            plane.add_patch(Polygon([(0, 0), *sides], color=colour, alpha=0.25, linewidth=0))
        plane.plot(
            [],
            [],
            color=colour,
            linewidth=6,
            alpha=0.4,
            label=f"where p must lie for X_{which + 1}",
        )
    along = np.array([-certificate.normal[1], certificate.normal[0]]) * 3 * reach
    plane.plot(*np.stack([-along, along], axis=1), "k--", linewidth=1, label="certificate")
    plane.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", title="p = Attn(x_0, P)")


@dataclass(frozen=True)
class TheoremConfig:
    """Certify the toy of Theorem A.2, fit every arm, and draw both."""

    out: Path = Path("docs")
    """Where theorem_a2.png goes."""
    starts: int = 8
    """Random starts of each arm."""


def main(config: TheoremConfig) -> int:
    """Print the certificate and every arm's errors; draw them."""
    if config.starts < 1:
        raise InputError(f"--starts {config.starts}: expected at least 1")
    toy, certificate = TOY, certify(TOY)
    normal = ", ".join(f"{each:.4f}" for each in certificate.normal)
    print(f"certificate  w = ({normal}), margin {certificate.margin:.4f}")
    print(f"bound        no prompt for both sequences has an error below {certificate.bound:.4f}")
    errors, found = {}, {}
    for arm in ARMS:
        tried = [try_arm(toy, arm, seed) for seed in range(config.starts)]
        errors[arm] = [each for _, each in tried]
        last = [each[-1] for each in errors[arm]]
        found[arm] = tried[int(np.argmin(last))][0]
        zero = sum(each < 1e-8 for each in last)
        print(f"{arm:22} best of {config.starts} starts {min(last):.3g}; below 1e-8: {zero}")
    file = config.out / "theorem_a2.png"
    save_figure(draw(toy, certificate, errors, found), file)
    print(f"wrote        {file}")
    return 0


if __name__ == "__main__":
    cli.run(TheoremConfig, main, sys.argv[1:], prog="python -m lamp_fast.reproduce.theorem")
