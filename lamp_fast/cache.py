"""``python -m lamp_fast.cache``: show, and remove, what lies outside run folders on our account.

The package itself keeps decoded pictures (:mod:`lamp_fast.data.decoded`), features of them
(:mod:`lamp_fast.data.feature_cache`) and where pictures lie in shards
(:mod:`lamp_fast.data.sources.shard_index`). What it makes others keep are downloads:
open_clip fetches CLIP weights for it, into the Hugging Face cache or into open_clip's own folder,
and the hub's classifiers come the same way. Other programs may use those too, so nothing is removed
unasked.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import CachedRevisionInfo, CacheNotFound, constants, scan_cache_dir

from lamp_fast import cli
from lamp_fast.data import disk_cache
from lamp_fast.errors import InputError
from lamp_fast.runs.folder import CONFIG
from lamp_fast.runs.record import holds_record

# Where open_clip puts what it does not take from the hub; it has no setting for it.
OPEN_CLIP_FOLDER = Path("~/.cache/clip")


@dataclass(frozen=True)
class StoredItem:
    """One download, or all of what the package itself keeps of one kind.

    Attributes:
        what: "CLIP weights", "classifier", or what the package itself keeps.
        name: the hub's repository, or a file's name.
        path: its folder or file.
        size: bytes on disk.
        remove: whoever needs it again fetches or decodes it again.
    """

    what: str
    name: str
    path: Path
    size: int
    remove: Callable[[], None]


def find_stored() -> list[StoredItem]:
    """Decoded pictures, features, and downloads that this package can have caused, by name."""
    kept = []
    try:
        cache = scan_cache_dir()
    except CacheNotFound:
        cache = None
    folder = cli.expand_path(OPEN_CLIP_FOLDER)
    downloads = list(folder.iterdir()) if folder.is_dir() else []
    repositories, files = frozenset(), frozenset()
    if downloads or (cache and cache.repos):
        repositories, files = _weights_of_open_clip()
    for each in cache.repos if cache else ():
        if each.repo_id in repositories:
            what = "CLIP weights"
        elif any(map(_is_classifier, each.revisions)):
            what = "classifier"
        else:
            continue
        # The hub's own way, which knows of files that repositories share, for this one alone: a
        # copy of a repository has the same revisions.
        hashes = [revision.commit_hash for revision in each.revisions]
        strategy = replace(cache, repos=frozenset({each})).delete_revisions(*hashes)
        kept.append(
            StoredItem(what, each.repo_id, each.repo_path, each.size_on_disk, strategy.execute)
        )
    for file in downloads:
        if file.name in files:
            kept.append(
                StoredItem("CLIP weights", file.name, file, file.stat().st_size, file.unlink)
            )
    for subfolder, what in disk_cache.CONTENTS.items():
        folder = disk_cache.default_folder() / subfolder
        sizes = [each.stat().st_size for each in disk_cache.written_files(folder)]
        if sizes:
            remove = partial(disk_cache.clear, folder)
            kept.append(StoredItem(what, f"{len(sizes):,} files", folder, sum(sizes), remove))
    return sorted(kept, key=lambda each: (each.what, each.name))


@dataclass(frozen=True)
class CacheConfig:
    """Show what lies outside run folders on our account; with --clear, remove it."""

    clear: bool = False
    """Remove what is listed, after a question."""
    yes: bool = False
    """Answer the question of --clear with yes."""


def main(config: CacheConfig) -> int:
    """List, ask, remove."""
    if config.yes and not config.clear:
        raise InputError("--yes: expected --clear beside it")
    own = disk_cache.default_folder()
    places = f"{own}, {constants.HF_HUB_CACHE} and {cli.expand_path(OPEN_CLIP_FOLDER)}"
    kept = find_stored()
    if not kept:
        print("Outside run folders this package keeps nothing, and nothing that it could have had")
        print(f"downloaded: looked in {places}.")
        return 0
    rows = [[each.what, each.name, _megabytes(each.size), each.path] for each in kept]
    rows.append(["", "together", _megabytes(sum(each.size for each in kept)), ""])
    from tabulate import tabulate

    alignment = ("left", "left", "right", "left")
    header = ("", "name", "MB", "where")
    print(tabulate(rows, header, tablefmt="github", colalign=alignment, disable_numparse=True))
    print(f"\nLooked in {places}. Other programs may use downloads too.")
    if config.clear and (config.yes or _agreed(len(kept))):
        for each in kept:
            each.remove()
        print(f"Removed {len(kept)}.")
    return 0


def _agreed(count: int) -> bool:
    if not sys.stdin.isatty():
        raise InputError("--clear: expected --yes where nobody can be asked")
    return input(f"Remove {count}? [y/N] ").strip().lower() in ("y", "yes")


def _weights_of_open_clip() -> tuple[set[str], set[str]]:
    """Hub repositories and file names of every pretrained tag that open_clip knows."""
    import open_clip

    repositories, files = set(), set()
    for model, tag in open_clip.list_pretrained():
        source = open_clip.get_pretrained_cfg(model, tag)
        if source.get("hf_hub"):
            # "organisation/name/" or "organisation/name/file"
            repositories.add("/".join(source["hf_hub"].split("/")[:2]))
        if source.get("url"):
            files.add(Path(urlsplit(source["url"]).path).name)
    return repositories, files


def _is_classifier(revision: CachedRevisionInfo) -> bool:
    """Whether a repository of the hub holds what this package saves there."""
    return any(file.file_name == CONFIG and holds_record(file.file_path) for file in revision.files)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f}"


if __name__ == "__main__":
    cli.run(CacheConfig, main, sys.argv[1:], prog="python -m lamp_fast.cache", description=__doc__)
