"""The page about an audit: thumbnails of what looks wrong, and why."""

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass

from PIL import Image, ImageOps
from torchvision.transforms.v2.functional import to_pil_image
from tqdm import tqdm

from lamp_fast.audit.judging import Finding, Judged, Place
from lamp_fast.audit.settings import AuditConfig
from lamp_fast.clip.settings import caution
from lamp_fast.clip.towers import ClipIdentity
from lamp_fast.data.entries import SPLIT_PARTS
from lamp_fast.data.sources import DataSource
from lamp_fast.errors import printable
from lamp_fast.files import path_text
from lamp_fast.pages import page_environment

TEMPLATE = "page.html.jinja"
THUMBNAIL, QUALITY = 112, 80


@dataclass(frozen=True)
class Shown:
    """A picture on the page: a data URI, its class, its part and its name."""

    picture: str
    label: str
    part: str
    name: str


@dataclass(frozen=True)
class Entry:
    """A finding on the page; what is not of its kind is None."""

    picture: Shown
    score: str
    suggested: str | None
    twin: Shown | None


@dataclass(frozen=True)
class Section:
    """The findings of a kind: the first ones, and how many there are."""

    kind: str
    title: str
    count: int
    entries: list[Entry]


def build_page(
    source: DataSource,
    judged: Judged,
    settings: AuditConfig,
    identity: ClipIdentity,
    titles: Mapping[str, str],
) -> str:
    """One HTML page; it loads nothing and runs no script.

    Args:
        source: the data set, whose pictures are there to be shown.
        judged: what was found.
        settings: what was looked for.
        identity: of the CLIP.
        titles: of each kind, in the order of the page.

    Raises:
        InputError: a picture that can no longer be read.
    """
    sections = []
    for kind, title in titles.items():
        found = [each for each in judged.findings if each.kind == kind]
        first = tqdm(found[: settings.shown], desc=f"drawing {kind}", leave=False, disable=None)
        entries = [_entry(source, each) for each in first]
        sections.append(Section(kind, title, len(found), entries))
    return (
        page_environment(__file__)
        .get_template(TEMPLATE)
        .render(
            data=source.name,
            clip=identity,
            caution=caution(identity.name, identity.random, source.name),
            counts={part: len(getattr(source, part)) for part in SPLIT_PARTS},
            classes=len(source.classnames),
            unjudged=[printable(source.classnames[label]) for label in judged.unjudged],
            notes=[printable(each) for each in source.notes],
            sections=sections,
            settings=settings,
        )
    )


def _entry(source: DataSource, finding: Finding) -> Entry:
    return Entry(
        picture=_shown(source, finding.place),
        score=f"{finding.score:.4g}",
        suggested=None
        if finding.suggested is None
        else printable(source.classnames[finding.suggested]),
        twin=None if finding.twin is None else _shown(source, finding.twin),
    )


def _shown(source: DataSource, place: Place) -> Shown:
    pictures = getattr(source, place.part)
    return Shown(
        picture=_data_uri(to_pil_image(pictures.load(place.row))),
        label=printable(source.classnames[pictures.labels[place.row]]),
        part=place.part,
        name=printable(path_text(pictures.names[place.row])),
    )


def _data_uri(picture: Image.Image) -> str:
    content = io.BytesIO()
    ImageOps.contain(picture, (THUMBNAIL, THUMBNAIL)).save(content, "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
