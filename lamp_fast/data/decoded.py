"""Decoded pictures on disk, so that a file is decoded once and not once an epoch.

A picture lies in a safetensors file of its own, uint8 [H, W, 3] at its original size, and is mapped
into memory when read. The name is a hash over the source file's content and over what decodes it,
so a changed picture or another PIL never meets an old entry. A checksum over name and pixels finds
what the disk damaged or another entry replaced, and such an entry is made again.
"""

import contextlib
import hashlib
import zlib
from pathlib import Path

import PIL
import torch
from PIL import features
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from lamp_fast.data.disk_cache import DiskCache

# Raised whenever ``lamp_fast.data.pictures.decode`` makes other pixels of the same bytes.
_REVISION = 1
_LIBRARIES = ("jpg", "libjpeg_turbo", "zlib", "webp", "libtiff")
DECODER = " ".join(
    [f"{_REVISION} pillow {PIL.__version__}", *(str(features.version(each)) for each in _LIBRARIES)]
).encode()

_PICTURE, _CHECKSUM = "picture", "crc32"


class DecodedCache(DiskCache):
    """The decoded pictures of one machine; see :class:`DiskCache`."""

    subfolder = "decoded"

    def read(self, digest: bytes, downscale: int | None = None) -> Tensor | None:
        """A kept picture, uint8 [H, W, 3], mapped and writable without changing the file.

        Args:
            digest: sha256 of the source file.
            downscale: as in :meth:`write`.

        Returns:
            None where it is not kept, or damaged; a damaged entry is removed.
        """
        file = self._file(digest, downscale)
        try:
            with safe_open(file, "pt") as archive:
                picture = archive.get_tensor(_PICTURE)
                expected = archive.metadata()[_CHECKSUM]
            if picture.dtype == torch.uint8 and _checksum(file, picture) == expected:
                self._used(file)
                return picture
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, KeyError, TypeError):
            pass
        with contextlib.suppress(OSError):
            file.unlink()
        return None

    def write(self, digest: bytes, picture: Tensor, downscale: int | None = None) -> None:
        """Keep a picture where there is room.

        Args:
            digest: sha256 of the source file.
            picture: uint8 [H, W, 3].
            downscale: the shorter side that it was scaled down to, None at its original size.
        """
        if not self._writes:
            return
        picture, file = picture.contiguous(), self._file(digest, downscale)
        metadata = {_CHECKSUM: _checksum(file, picture)}
        self._write(file, to_safetensors({_PICTURE: picture}, metadata=metadata))

    def _file(self, digest: bytes, downscale: int | None) -> Path:
        name = hashlib.sha256(b"%s %s %s" % (digest, DECODER, str(downscale).encode())).hexdigest()
        return self.folder / name[:2] / name


def _checksum(file: Path, picture: Tensor) -> str:
    """Over pixels, their shape and the name, which stands for what they were decoded from."""
    described = zlib.crc32(f"{file.name} {list(picture.shape)}".encode())
    return f"{zlib.crc32(picture.numpy(), described):08x}"
