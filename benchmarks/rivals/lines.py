"""Whose step stands beside whose, and at which sizes."""

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.measuring.names import TEMPLATE, base_and_new
from benchmarks.measuring.steps import Cell
from benchmarks.rivals.contest import RIVALS, Contest
from lamp_fast.clip.towers import FrozenClip
from lamp_fast.methods import METHODS

GRID = tuple((batch, classes) for batch in (4, 32) for classes in (10, 50, 200, 1000))
"""B and C."""
OURS = ("maple", "lift")
"""Our own methods of the same equations as a rival's."""


@dataclass(frozen=True)
class Line:
    """One whose step is measured.

    Attributes:
        id: in the names of benchmarks.
        title: in tables and plots.
        method: of :data:`lamp_fast.methods.METHODS` or of the rivals.
        rival: whether it is one.
        text_query: LAMP's.
    """

    id: str
    title: str
    method: str
    rival: bool = False
    text_query: str | None = None

    def pieces(
        self, clip: FrozenClip, batch: int, classes: int, *, compiled: bool = False
    ) -> tuple[dict[str, Callable[[], object]], Callable[[], object]]:
        """Its training step and its evaluation at a size, and the unit to measure them in.

        Args:
            clip: the frozen CLIP.
            batch, classes: B and C.
            compiled: a rival goes through torch.compile.
        """
        if self.rival:
            trained = evaluated = Contest(clip, batch, classes, self.method, compiled=compiled)
        else:
            options = {} if self.text_query is None else {"text_query": self.text_query}
            # Two of them: a step would make the evaluation compute again what it keeps of the text.
            trained, evaluated = (
                Cell(clip, batch, classes, self.method, **options) for _ in range(2)
            )
            for each in (trained, evaluated):  # as a run does: memory may not hold all pairs
                names = base_and_new(classes)[0]
                each.method.block = each.method.choose_block(names, TEMPLATE)
        return {"train": trained.train, "evaluate": evaluated.evaluate}, trained.image_forward


LINES = [
    Line("lamp", "LAMP, text per (image, class)", "lamp"),
    Line("lamp-class", "LAMP, text per class", "lamp", text_query="class"),
    *(Line(name, f"our {METHODS[name].title}", name) for name in OURS),
    *(
        Line(f"rival-{name}", f"{kind.title}, plain torch", name, rival=True)
        for name, kind in RIVALS.items()
    ),
]
