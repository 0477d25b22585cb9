"""Figures as they stand on our HTML pages: inline SVG in the page's own colours and fonts."""

import io

import matplotlib
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# Stands for the page's own text colour, which differs between light and dark.
INK = "#010203"
STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    **dict.fromkeys(
        (
            "text.color",
            "axes.edgecolor",
            "axes.labelcolor",
            "axes.titlecolor",
            "xtick.color",
            "ytick.color",
        ),
        INK,
    ),
}


def to_svg(figure: Figure, name: str) -> Markup:
    """A figure, drawn within :data:`STYLE`, as an inline SVG without a background.

    Args:
        figure: to draw.
        name: of it, another one for each figure of a page.
    """
    FigureCanvasSVG(figure)
    figure.patch.set_alpha(0)
    for axes in figure.axes:
        axes.patch.set_alpha(0)
    content = io.StringIO()
    # Distinct ids: several drawings share one page.
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
    drawing = content.getvalue()
    drawing = drawing[drawing.index("<svg") :].replace(INK, "currentColor")
    return Markup(drawing)  # matplotlib escapes the text that it draws
