"""``python -m lamp_fast.data DIR``: describe what training would see of a folder of pictures.

Or of a table (--table FILE), of lists (--train FILE --test FILE), or of any data set that training
takes (--data NAME --root DIR).
--audit --out REPORT looks at the pictures themselves: suspected labels, copies in training and
test, copies with different labels, outliers. REPORT then holds audit.html, to look at, and
audit.csv, to act on: what is left in it goes to --exclude in training.
--check ROOT says which of the field's data sets lie ready below ROOT; --download NAME... --root DIR
fetches those that torchvision can.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from lamp_fast import cli
from lamp_fast.audit.settings import AuditConfig
from lamp_fast.clip.settings import ClipConfig
from lamp_fast.data.settings import PLACES, DataConfig
from lamp_fast.errors import InputError
from lamp_fast.fields import Seed, flag_of, validate
from lamp_fast.files import refuse_output
from lamp_fast.runs.settings import MachineConfig

if TYPE_CHECKING:
    from lamp_fast.data.sources import DataSource
    from lamp_fast.data.sources.readiness import Readiness

PLAIN_BARS = str.maketrans(dict.fromkeys("█▉▊▋▌▍▎▏", "#"))


@dataclass(frozen=True)
class DescribeConfig:
    """Describe what training would see of a data set."""

    folder: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[DIR]")] = None
    """Class folders of pictures; with --data, --table or --train, the same as --root."""
    out: Path | None = None
    """Also draw the bar chart into this .png; with --audit, a new folder for what it finds."""
    audit: bool = False
    """Find pictures that look wrong, by features of --clip, in all parts, before any protocol."""
    json: bool = False
    """Print everything as JSON."""
    check: Annotated[Path | None, tyro.conf.arg(metavar="ROOT")] = None
    """Say which data sets below ROOT are ready and what the others lack (docs/data.md)."""
    download: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME ...]")] = ()
    """Fetch these data sets into --root through torchvision."""
    seed: Seed = 1
    """Of the protocol's draws, as in training; with --audit, of the probe's folds."""
    data: DataConfig = field(default_factory=DataConfig)
    looks: AuditConfig = field(default_factory=AuditConfig)
    clip: ClipConfig = field(default_factory=ClipConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)


def data_of(settings: DescribeConfig) -> DataConfig:
    """The data that the command line means.

    Raises:
        InputError: a folder given twice.
    """
    data, folder = settings.data, settings.folder
    if folder is not None:
        if data.root is not None:
            raise InputError(f"--root {data.root}: expected one root, {folder} is given too")
        data = replace(data, root=folder)
    if data.data == DataConfig.data and data.table is not None:
        return replace(data, data="table")
    if data.data == DataConfig.data and (data.train is not None or data.test is not None):
        return replace(data, data="list")
    return replace(data, data="folder") if data.data == DataConfig.data and folder else data


def _refuse_without_audit(settings: DescribeConfig) -> None:
    for group in ("looks", "clip", "machine"):
        given, plain = vars(getattr(settings, group)), vars(getattr(DescribeConfig(), group))
        for name, value in given.items():
            if value != plain[name]:
                raise InputError(f"{flag_of(name)} {value}: expected --audit with it")


def check_audit(settings: DescribeConfig, data: DataConfig) -> Path:
    """The folder of an audit.

    Raises:
        InputError: none, or flags that mean nothing for an audit.
    """
    if settings.out is None:
        raise InputError("--out: missing; --audit needs a new folder for what it finds")
    if settings.json:
        raise InputError("--json: expected nothing of it with --audit, which writes a .csv")
    for name in ("split", "cap", "shots"):
        value = getattr(data, name)
        if value != getattr(DataConfig, name):
            raise InputError(
                f"{flag_of(name)} {value}: expected none with --audit, which looks at all pictures"
            )
    return settings.out


def _check_out(out: Path, data: DataConfig) -> None:
    if out.suffix.lower() != ".png" or out.is_dir():
        raise InputError(f"--out {out}: expected the name of a .png file")
    if not out.absolute().parent.is_dir():
        raise InputError(f"--out {out}: expected a file in a folder that exists")
    refuse_output("--out", out, filter(None, (getattr(data, name) for name in PLACES)))


def _refuse_picture(out: Path, source: "DataSource") -> None:
    """Before the chart takes the place of a picture that is described in it."""
    parts = (source.train, source.val, source.test)
    files = (part.root / name for part in parts if part.root is not None for name in part.names)
    refuse_output("--out", out, files)


def fetch(names: Sequence[str], root: Path | None) -> "list[Readiness]":
    """Fetch data sets, and say what each lacks then.

    Raises:
        InputError: before anything is fetched, a name that cannot be; then the first that fails.
    """
    if root is None:
        raise InputError("--root: missing; --download needs the folder to fetch into")
    from lamp_fast.data.sources.download import check_downloads, download
    from lamp_fast.data.sources.readiness import check_root

    root = cli.expand_path(root)
    names = check_downloads(names, root)
    for name in names:
        for line in download(name, root):
            cli.say(f"{name}: {line}", stream=sys.stderr)
    return check_root(root, names)


def prepare(settings: DescribeConfig) -> "list[Readiness]":
    """What ``--check`` or ``--download`` asks for.

    Raises:
        InputError: flags that mean nothing here, or as :func:`fetch` and :func:`check_root`.
    """
    asked = DescribeConfig(json=settings.json, check=settings.check)
    flag, takes = "--check", "--json"
    if settings.download:
        into = DataConfig(root=settings.data.root)
        asked = DescribeConfig(json=settings.json, download=settings.download, data=into)
        flag, takes = "--download", "--root and --json"
    if settings != asked:
        raise InputError(f"{flag}: expected nothing with it but {takes}")
    if settings.download:
        return fetch(settings.download, settings.data.root)
    from lamp_fast.data.sources.readiness import check_root

    return check_root(cli.expand_path(settings.check))


def main(settings: DescribeConfig) -> int:
    """Print what was asked for; only ``--out`` and ``--download`` write anything."""
    if settings.check is not None or settings.download:
        states = prepare(settings)
        if settings.json:
            print(json.dumps([asdict(each) for each in states], indent=2))
        else:
            from lamp_fast.data.sources import readiness

            cli.say(*readiness.to_text(states).split("\n"))
        return 0
    data = data_of(settings)
    validate(replace(settings, data=data))
    if settings.audit:
        out = check_audit(settings, data)
        from lamp_fast.audit.auditing import audit

        audit(out, data, settings.looks, settings.clip, settings.machine, settings.seed)
        return 0
    _refuse_without_audit(settings)
    if settings.out is not None:
        _check_out(settings.out, data)
    from lamp_fast.data.chart import plot
    from lamp_fast.data.describe import describe, to_text
    from lamp_fast.runs.experiment import load_data

    source, benchmark = load_data(data, settings.seed)
    if settings.out is not None:
        _refuse_picture(settings.out, source)
    description = describe(source, benchmark)
    if settings.out is not None:
        plot(settings.out, description)
    if settings.json:
        print(json.dumps(description.to_json(), indent=2))
        return 0
    text = to_text(description)
    if settings.out is not None:
        text += f"\n\nchart      {settings.out}"
    encoding = sys.stdout.encoding or "ascii"
    if "█".encode(encoding, "replace") == b"?":
        text = text.translate(PLAIN_BARS)
    cli.say(*text.split("\n"))
    return 0


if __name__ == "__main__":
    cli.run(DescribeConfig, main, prog="python -m lamp_fast.data", description=__doc__)
