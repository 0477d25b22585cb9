"""What features are asked for."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from lamp_fast.clip.settings import ClipConfig
from lamp_fast.data.settings import DataConfig, ViewConfig
from lamp_fast.fields import Bounds, Seed
from lamp_fast.runs.settings import MachineConfig


@dataclass(frozen=True)
class FeaturesConfig:
    """CLIP's features of pictures, as safetensors and CSV."""

    out: Path
    """A new folder."""
    sources: Annotated[
        tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[FILE|FOLDER|CSV ...]")
    ] = ()
    """Pictures, folders of pictures (at any depth), or .csv files with a column of paths (see
    --path-column), which start from the file's own folder."""
    crops: Annotated[int, Bounds(0, 100_000)] = 0
    """Random crops of each picture, as in training; 0 takes the one of testing."""
    seed: Seed = 1
    """Of the random crops."""
    clip: ClipConfig = field(default_factory=ClipConfig)
    data: DataConfig = field(default_factory=DataConfig)
    views: ViewConfig = field(default_factory=ViewConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)
