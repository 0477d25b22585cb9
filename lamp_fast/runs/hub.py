"""A trained classifier in the Hugging Face layout: safetensors, config.json and a model card.

The layout holds the learned tensors alone, never CLIP's weights, and no path of the machine that
trained it.
"""

import copy
import html
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCardData, snapshot_download
from huggingface_hub.utils import validate_repo_id
from torch import Tensor

import lamp_fast
from lamp_fast.cli import expand_path
from lamp_fast.clip.settings import LOCAL, caution
from lamp_fast.data.settings import DESCRIBING, PLACES
from lamp_fast.data.words import saved_words
from lamp_fast.errors import InputError
from lamp_fast.files import write_bytes, write_json
from lamp_fast.runs.fitted import Fitted, write_fitted
from lamp_fast.runs.folder import ANSWERS, CONFIG, RESULT, WEIGHTS
from lamp_fast.runs.record import holds_record
from lamp_fast.runs.scoring import results_table
from lamp_fast.tensors import save_tensors

CARD = "README.md"

# Longer tables of classes tell a reader nothing; config.json holds them all.
MAX_CLASSES_SHOWN = 200


def save(
    folder: Path,
    record: Mapping[str, Any],
    state: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    results: list[Mapping[str, Any]] | None,
    fitted: Fitted | None = None,
    *,
    license: str | None = None,
) -> None:
    """Write ``model.safetensors``, ``config.json``, ``result.json``, ``answers.json`` and the card.

    Args:
        folder: a new or empty folder, or one that was saved to before.
        record, facts: of the run.
        state: what was learned, by name.
        results: rows of its closing table, if there are any.
        fitted: what it has fitted on validation pictures, if it had any.
        license: the hub's identifier of the licence of the learned tensors, such as "mit"; without
            it the card says that none is stated.

    Raises:
        InputError: a folder with something else in it, which is left alone.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"folder {folder}: is a file, expected a folder")
    saved = (folder / WEIGHTS).is_file() and holds_record(folder / CONFIG)
    if folder.is_dir() and any(folder.iterdir()) and not saved:
        raise InputError(
            f"folder {folder}: holds other files, expected a new folder or an earlier save"
        )
    record = portable(record)
    save_tensors(folder / WEIGHTS, state, facts)
    write_json(folder / CONFIG, record)
    # What an earlier save left would pass for this one's.
    if results is not None:
        write_json(folder / RESULT, results)
    else:
        (folder / RESULT).unlink(missing_ok=True)
    if fitted is not None:
        write_fitted(folder / ANSWERS, fitted, state)
    else:
        (folder / ANSWERS).unlink(missing_ok=True)
    card = model_card(record, results, license=license)
    write_bytes(folder / CARD, card.encode())


def fetch(
    folder_or_hub_id: str | os.PathLike, *, revision: str | None = None, token: str | None = None
) -> Path:
    """The local folder of a saved classifier, brought from the hub where it is none.

    Raises:
        InputError: neither a folder nor a repository that can be had now.
    """
    folder = expand_path(folder_or_hub_id)
    if folder.is_dir():
        return folder
    repo_id = os.fspath(folder_or_hub_id)
    _check_repo_id(repo_id, "a folder that exists, or ")
    try:
        return Path(
            snapshot_download(
                repo_id,
                revision=revision,
                token=token,
                allow_patterns=[WEIGHTS, CONFIG, RESULT, ANSWERS],
                library_name="lamp_fast",
                library_version=lamp_fast.__version__,
            )
        )
    except Exception as error:  # each version of the client lets another HTTP library's through
        raise _unreachable(f"{repo_id}: no such folder, and", error) from None


def push(
    save_into: Callable[..., None],
    repo_id: str,
    *,
    private: bool | None = None,
    license: str | None = None,
    commit_message: str = "Upload classifier",
    token: str | None = None,
    api: HfApi | None = None,
) -> str:
    """Save into a repository of the hub, which is made where there is none.

    Args:
        save_into: writes what is uploaded into a folder, as ``Classifier.save_pretrained`` does.
        repo_id: ``owner/name``.
        private: of a new repository; by default the owner's setting.
        license: as in :func:`save`.
        commit_message: of the one commit that this makes.
        token: by default the one that the hub's login keeps.
        api: the hub's client, in place of a new one.

    Returns:
        The repository's address.

    Raises:
        InputError: a malformed id, or a hub that cannot be reached or refuses.
    """
    _check_repo_id(repo_id, "")
    api = HfApi(token=token) if api is None else api
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "classifier"
        save_into(folder, license=license)
        try:
            address = api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message)
        except Exception as error:  # as in fetch
            raise _unreachable(f"{repo_id}:", error) from None
    return str(address)


def portable(record: Mapping[str, Any]) -> dict[str, Any]:
    """A run's record without the paths of the machine that it was trained on."""
    record = copy.deepcopy(dict(record))
    record.pop("launch", None)
    settings, clip = record["settings"], record["clip"]
    settings["out"] = settings["config"] = None
    for name in (*PLACES, *DESCRIBING):
        if name in settings["data"]:
            settings["data"][name] = None
    settings["data"]["levels"] = []  # columns of a file that is named no more
    given = settings["data"]["template"]
    settings["data"]["template"] = [
        Path(word).name if word.endswith(".txt") else word for word in given
    ]
    if clip["weights"] == settings["clip"]["pretrained"]:  # a file, not a tag
        clip["weights"] = settings["clip"]["pretrained"] = Path(clip["weights"]).name
    if clip["name"].startswith(LOCAL):
        folder = Path(clip["name"].removeprefix(LOCAL))
        clip["name"] = settings["clip"]["clip"] = f"{LOCAL}{folder.name}"
        clip["weights"], settings["clip"]["pretrained"] = Path(clip["weights"]).name, None
    record["data"]["unreadable"] = []
    record["data"].pop("excluded", None)
    return record


def model_card(
    record: Mapping[str, Any],
    results: list[Mapping[str, Any]] | None,
    *,
    license: str | None = None,
) -> str:
    """The README.md of a saved classifier: metadata in YAML, then what it is, in Markdown.

    Args:
        record: a run's ``config.json``.
        results: rows of its ``result.json``, where there are any.
        license: see :func:`save`.
    """
    settings, data, clip = record["settings"], record["data"], record["clip"]
    title = f"{settings['method']} on {settings['data']['data']}"
    metadata = ModelCardData(
        license=license,
        library_name="lamp_fast",
        pipeline_tag="image-classification",
        tags=["lamp_fast", "clip", "prompt-tuning", "long-tailed"],
        model_name=title if results else None,
        eval_results=_evaluations(settings["data"]["data"], results) if results else None,
    )
    parts = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {_plain(title)}",
        "An image classifier: a frozen CLIP with prompts learned by"
        f" `lamp_fast` {_plain(record['version'])}. This repository holds the learned tensors"
        " alone.",
        "```python\nfrom lamp_fast import Classifier\n\n"
        'classifier = Classifier.from_pretrained("THIS_REPOSITORY")\n'
        'print(classifier.classify(["picture.jpg"], top=3))\n```',
        "## Results",
        _results(results, caution(clip["name"], clip["random"], settings["data"]["data"])),
        "## Data and protocol",
        _protocol(settings, data),
        _classes(data),
        "## CLIP",
        f"{_plain(clip['name'])}, weights {_plain(clip['weights'])}, {_plain(clip['activation'])},"
        f" sha256 `{_plain(clip['fingerprint'])}`. Loading refuses any other weights.",
        "## Licence",
        f"The learned tensors: {_plain(license or 'not stated by their author')}."
        " CLIP's weights are not part of this repository and keep their own licence, and so do the"
        " training pictures. `lamp_fast` itself is Apache-2.0.",
    ]
    return "\n\n".join(parts) + "\n"


def _evaluations(data: str, rows: list[Mapping[str, Any]]) -> list[EvalResult]:
    # Zero-shot CLIP comes first in the table, the trained method second.
    row = rows[min(1, len(rows) - 1)]
    scores = (
        ("accuracy", "acc_base", "trained classes"),
        ("f1", "f1_base", "trained classes"),
        ("accuracy", "acc_new", "new classes"),
        ("f1", "f1_new", "new classes"),
    )
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=data,
            dataset_name=f"{data}, {half}",
            dataset_split="test",
            metric_type=metric,
            metric_name="accuracy" if metric == "accuracy" else "macro-F1",
            metric_value=row[key],
        )
        for metric, key, half in scores
        if row.get(key) is not None
    ]


def _results(rows: list[Mapping[str, Any]] | None, about: str | None) -> str:
    if rows is None:
        return "None were saved."
    escaped = [{**row, "name": _plain(row["name"])} for row in rows]
    lines = [results_table(escaped), "Percentages on the test pictures."]
    if about is not None:
        lines.append(f"**{about}**")
    return "\n\n".join(lines)


def _protocol(settings: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    drawn, counts = settings["data"], data["counts"]
    amount = f"{drawn['shots']} shots" if drawn["shots"] else f"cap {drawn['cap'] or 'none'}"
    words = saved_words(data.get("words"), "words")
    lines = [
        f"- data: {_plain(drawn['data'])}, sha256 `{_plain(data['sha256'])}`",
        f"- class prompt: {_plain(data['template'] if words is None else str(words))}",
        f"- training pictures: {sum(counts):,} of {len(counts)} classes, {max(counts)} to"
        f" {min(counts)} a class ({amount}, imbalance ratio asked for {drawn['imb']:g})",
        f"- new classes, tested without training: {len(data['new_names'])}",
        f"- preset {_plain(settings['preset'])}, seed {settings['seed']},"
        f" {settings['optim']['epochs']} epochs; every setting is in `config.json`",
    ]
    return "\n".join(lines)


def _classes(data: Mapping[str, Any]) -> str:
    names = list(zip(data["base_names"], data["counts"], strict=True))
    lines = ["| trained class | training pictures |", "|---|---:|"]
    lines += [f"| {_plain(name)} | {count:,} |" for name, count in names[:MAX_CLASSES_SHOWN]]
    if len(names) > MAX_CLASSES_SHOWN:
        lines.append(f"| and {len(names) - MAX_CLASSES_SHOWN:,} more | |")
    return "\n".join(lines)


def _plain(text: str) -> str:
    """Text of a user as Markdown shows it literally, on one line, without control characters."""
    line = " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", str(text)).split())
    return re.sub(r"[\\`*_{}\[\]()#+!|~$:@]", r"\\\g<0>", html.escape(line, quote=False))


def _check_repo_id(name: str, expected: str) -> None:
    try:
        validate_repo_id(name)
        name_fits = "/" in name
    except ValueError:
        name_fits = False
    if not name_fits:
        raise InputError(f"{name}: expected {expected}owner/name on the Hugging Face hub")


def _unreachable(what: str, error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return InputError(f"{what} the Hugging Face hub cannot serve it ({reason})")
