"""Files of weights: read without unpickling code, held to a model, refused with the reason."""

import hashlib
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from open_clip.model import convert_to_custom_text_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from lamp_fast.errors import InputError

# OpenAI's archives keep these beside the weights.
_NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size")


def fingerprint(model: nn.Module) -> str:
    """sha256 over the sorted names, shapes and float32 bytes of a model's parameters."""
    digest = hashlib.sha256()
    for name, value in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(value.detach().float().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def load_weights(model: nn.Module, file: Path, argument: str) -> None:
    """Fill a model from a state dict.

    Args:
        model: whose every parameter the file must hold, and nothing else.
        file: ``.safetensors``, or what torch loads as weights alone.
        argument: the flag and value that an error names.

    Raises:
        InputError: weights of another model or size, or ones that are not finite.
    """
    try:
        state = _read_state(file)
        if not hasattr(model, "positional_embedding"):
            state = convert_to_custom_text_state_dict(state)
        if "logit_scale" in state:  # [] or [1]
            state["logit_scale"] = state["logit_scale"].reshape(model.logit_scale.shape)
        _refuse_other_sizes(model, state, argument)
        model.load_state_dict(state, strict=True)
    except InputError:
        raise
    except Exception as error:  # whatever the loader met, the file is not what was asked for
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{argument}: not weights of this model ({reason})") from None
    for key, value in model.named_parameters():
        if not torch.isfinite(value).all():
            raise InputError(f"{argument}: {key} holds NaN or infinity, expected finite weights")


def _read_state(file: Path) -> dict[str, Tensor]:
    """The state dict of a file, never unpickling code; not all of OpenAI's entries are weights."""
    if file.suffix == ".safetensors":
        state = load_file(file)
    else:
        state = torch.load(file, map_location="cpu", weights_only=True)
    state = state.get("state_dict", state)
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    state = {key: value for key, value in state.items() if key not in _NO_WEIGHTS}
    for key, value in state.items():
        if not value.is_floating_point():
            raise ValueError(f"{key} is {value.dtype}")
    return state


def _refuse_other_sizes(model: nn.Module, state: Mapping[str, Tensor], argument: str) -> None:
    """open_clip would interpolate position embeddings: another CLIP than anybody trained."""
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    for key, what in (
        ("visual.positional_embedding", "another picture size"),
        ("positional_embedding", "another context length"),
        ("text.positional_embedding", "another context length"),
    ):
        if key in shapes and key in state and len(state[key]) != shapes[key][0]:
            raise InputError(
                f"{argument}: weights of {what} ({len(state[key])} positions), expected those of"
                f" this model ({shapes[key][0]})"
            )


def is_torchscript(file: Path) -> bool:
    """Whether a file is a program of TorchScript, as OpenAI ships its weights."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith("constants.pkl") for name in archive.namelist())
