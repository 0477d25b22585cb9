"""Small CLIPs that the tests share; Triton in its interpreter where there is no GPU."""

import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # As many workers as cores; read when torch is imported, and by what the tests start.
    os.environ["OMP_NUM_THREADS"] = "1"

import torch

if not torch.cuda.is_available():
    # Triton reads it when it is imported, which open_clip does.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import open_clip

from lamp_fast.clip.towers import FrozenClip
from lamp_fast.data.disk_cache import FOLDER_VARIABLE
from lamp_fast.data.transforms import Preprocessing
from lamp_fast.runs import machine

IMAGE_SIZE = 16


def build_small_clip(
    vision_layers: int = 4, text_layers: int = 4, *, seed: int = 0, quick_gelu: bool = True
) -> FrozenClip:
    """A random float64 CLIP with CLIP's own tokenizer, 16-pixel pictures and 5 vision tokens."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = open_clip.CLIP(
            embed_dim=12,
            vision_cfg={
                "image_size": IMAGE_SIZE,
                "patch_size": 8,
                "layers": vision_layers,
                "width": 32,
                "head_width": 16,
            },
            text_cfg={
                "context_length": 77,
                "vocab_size": 49408,
                "layers": text_layers,
                "width": 24,
                "heads": 3,
            },
            quick_gelu=quick_gelu,
        )
        # The text side's initial scale is tiny; rows as large as a trained CLIP's make a fair test.
        torch.nn.init.normal_(model.token_embedding.weight, std=0.5)
        torch.nn.init.normal_(model.positional_embedding, std=0.2)
    return FrozenClip(model.double(), Preprocessing(size=IMAGE_SIZE))


@pytest.fixture(autouse=True, scope="session")
def own_cache_folder(tmp_path_factory):
    """Tests leave nothing in the cache of whoever runs them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER_VARIABLE, str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def float32_unless_asked():
    """--precision auto is float32 on every CPU: oracles and bounds are of the precision that a test
    asks for, not of the machine that runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            machine, "auto_precision", lambda device: "bf16" if device.type == "cuda" else "fp32"
        )
        yield


@pytest.fixture
def small_clip():
    """The factory of :func:`build_small_clip`."""
    return build_small_clip
