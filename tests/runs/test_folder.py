"""Who may write into a folder: nothing that a run did not write is ever lost, nothing half-made."""

import contextlib
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from lamp_fast import cli, evaluate, train
from lamp_fast.data.settings import DataConfig
from lamp_fast.errors import InputError
from lamp_fast.report.__main__ import ReportConfig
from lamp_fast.report.__main__ import main as report
from lamp_fast.runs import training
from lamp_fast.runs.config import TrainConfig, apply_preset
from lamp_fast.runs.folder import (
    ANSWERS,
    CHECKPOINT,
    CONFIG,
    FILES,
    HOLDOUT,
    LEARNED,
    METRICS,
    RELIABILITY,
    RESULT,
    VALIDATION,
    choose_folder,
    clear_folder,
    finished_file,
    hold_folder,
    is_run,
    make_folder,
)
from lamp_fast.runs.selection import SelectionConfig

# What only a run that holds validation pictures, and compares epochs on them, writes.
CHOOSING = {VALIDATION, "validation.png", ANSWERS, RELIABILITY}
BEFORE = Path(__file__).parents[1] / "before"


def settings(out, **changes) -> TrainConfig:
    """Two epochs on one picture a class."""
    config = apply_preset(TrainConfig(out=out), "tiny")
    return replace(
        config,
        data=replace(config.data, shots=1),
        optim=replace(config.optim, epochs=2),
        own=replace(config.own, adapt_passes=1),
        **changes,
    )


def choose(config: TrainConfig) -> Path:
    """Choose its folder, and leave that as a run that wrote nothing would."""
    with contextlib.ExitStack() as made:
        return choose_folder(config, made)


def tree(folder: Path) -> dict[str, bytes | None]:
    return {
        str(each.relative_to(folder)): each.read_bytes() if each.is_file() else None
        for each in sorted(folder.rglob("*"))
    }


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    for number in range(8):
        place = folder / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (30 * number, 0, 0)).save(place / f"{number}.png")
    return folder


@pytest.mark.parametrize(
    "content",
    [
        '{"model_type": "clip"}',
        '{"name": "web", "version": "1.0", "settings": {}, "data": {}, "clip": {}}',
        "[]",
        "",
        "[" * 100_000,
    ],
)
def test_another_programs_config_is_no_run(tmp_path, content):
    (tmp_path / CONFIG).write_text(content)
    (tmp_path / "model.bin").write_text("weights")
    before = tree(tmp_path)
    with pytest.raises(InputError, match=f"--overwrite: {tmp_path} is not the folder of a run"):
        train.main(settings(tmp_path, overwrite=True))
    with pytest.raises(InputError, match=r"holds no run \(config.json is not a run's\)"):
        train.main(settings(tmp_path, resume=True))
    assert tree(tmp_path) == before


def test_a_saved_classifier_is_not_overwritten(tmp_path):
    shutil.copyfile(BEFORE / "lamp" / CONFIG, tmp_path / CONFIG)
    shutil.copyfile(BEFORE / "lamp" / LEARNED, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="is not the folder of a run"):
        choose(TrainConfig(out=tmp_path, overwrite=True))


def test_overwriting_removes_what_a_run_writes_and_names_the_rest(tmp_path, capsys):
    """Of an earlier version's run, with scores elsewhere, events, a report; and things of a user,
    also under names and behind links that only look like a run's."""
    out, outside = tmp_path / "run", tmp_path / "outside"
    shutil.copytree(BEFORE / "zeroshot", out)
    outside.mkdir()
    (outside / "precious").write_text("p")
    for name in ("report.html", "table.md", "curves.png", "on_caltech101/target.json"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("stale")
    (out / "on_caltech101" / "table.md").write_text("stale")
    (out / "tensorboard").mkdir()
    (out / "tensorboard" / "events.out.tfevents.1.host").write_text("stale")
    mine = {".git/HEAD": "ref", "notes/thesis.txt": "mine", "on_holiday/me.jpg": "sun"}
    mine |= {"pictures/cat/0.png": "cat", "tensorboard_notes": "mine", "a\nb": "odd"}
    for name, content in mine.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(content)
    (out / "on_link").symlink_to(outside)
    (out / "per_class.csv").symlink_to(outside / "precious")
    (outside / "target.json").write_text("t")
    assert train.main(settings(out, overwrite=True)) == 0
    for name, content in mine.items():
        assert (out / name).read_text() == content
    assert sorted(each.name for each in outside.iterdir()) == ["precious", "target.json"]
    assert (outside / "precious").read_text() == "p"
    kept = {name.split("/")[0] for name in mine} | {"on_link"}
    told = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("kept"))
    assert all(repr(name) in told for name in kept)
    names = {each.name for each in out.iterdir()}
    assert names == kept | {CONFIG} | set(FILES) - {"report.html", *CHOOSING}


def test_every_file_of_a_run_is_known(tmp_path):
    """What train, evaluate and report write into a run folder is all that clearing removes, with
    the run in it that has chosen the epoch."""
    out = tmp_path / "run"
    selection = SelectionConfig(select="best", holdout_classes=0.4, retrain=True)
    assert train.main(settings(out, selection=selection)) == 0
    assert report(ReportConfig(out)) == 0
    config = evaluate.EvaluateConfig(out, data="digits")
    assert evaluate.main(config) == 0
    assert {each.name for each in out.iterdir()} == {CONFIG, "on_digits", HOLDOUT, *FILES}
    with hold_folder(out):
        assert clear_folder(out) == ()
    assert [each.name for each in out.iterdir()] == [CONFIG]
    assert is_run(out)


@pytest.mark.parametrize("link", [False, True])
def test_a_run_and_its_pictures_do_not_lie_in_each_other(tmp_path, pictures, link, monkeypatch):
    root = pictures
    if link:
        root = tmp_path / "link"
        root.symlink_to(pictures)
    data = DataConfig(data="folder", root=root)
    before = tree(tmp_path)
    for out in (pictures / "run", pictures, pictures / "a" / "run"):
        with pytest.raises(InputError, match=r"--out .*: lies in --root .*, expected another"):
            train.main(TrainConfig(out=out, data=data))
    monkeypatch.chdir(pictures)
    with pytest.raises(InputError, match=r"--out runs/folder-lamp-seed1: lies in --root \."):
        train.main(TrainConfig(data=replace(data, root=Path("."))))
    with pytest.raises(InputError, match=r"--out .*: holds --root .*, expected another"):
        train.main(TrainConfig(out=tmp_path, data=data, overwrite=True))
    table = DataConfig(data="table", table=pictures / "list.csv")
    with pytest.raises(InputError, match=r"--out .*: holds --table .*, expected another"):
        train.main(TrainConfig(out=tmp_path, data=table))
    caltech = DataConfig(data="caltech101", root=tmp_path)
    with pytest.raises(InputError, match=r"--out .*: lies in --root"):
        train.main(TrainConfig(out=tmp_path / "caltech-101" / "run", data=caltech))
    assert tree(tmp_path) == before
    assert choose(TrainConfig(out=tmp_path / "runs" / "caltech", data=caltech))


def test_scores_do_not_lie_among_the_pictures_either(pictures, tmp_path):
    run = Path(shutil.copytree(BEFORE / "zeroshot", tmp_path / "run"))
    config = evaluate.EvaluateConfig(run, data="folder", root=pictures, out=pictures / "scores")
    with pytest.raises(InputError, match="lies in --root"):
        evaluate.main(config)


def test_what_cannot_be_written_is_refused_before_any_data_is_read(tmp_path, monkeypatch):
    def read(*_):
        raise AssertionError("data were read")

    monkeypatch.setattr(training, "assemble", read)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "x")
    (tmp_path / "circle").symlink_to("circle")
    for name in ("file", "file/run", "x" * 300, "a\0b", "dangling", "circle", "/proc/none/run"):
        with pytest.raises(InputError, match=r"^--out "):
            train.main(settings(tmp_path / name))
    assert len(list(tmp_path.iterdir())) == 3


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(InputError, match=r"--out .*: cannot be written \(Permission denied\)"):
        choose(settings(tmp_path / "new" / "run"))
    assert not list(tmp_path.iterdir())


def test_two_starts_without_a_name_both_get_a_folder(tmp_path, monkeypatch):
    """Whoever makes it has it; what a refused start made goes again."""
    monkeypatch.chdir(tmp_path)
    with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
        config = TrainConfig()
        assert choose_folder(config, first) == Path("runs/digits-lamp-seed1")
        assert choose_folder(config, second) == Path("runs/digits-lamp-seed1-2")
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="--data nonsense"):
        train.main(TrainConfig(data=DataConfig(data="nonsense")))
    assert not list(tmp_path.iterdir())


def test_a_folder_made_by_another_at_the_same_moment(tmp_path, monkeypatch):
    """Between looking and making: the next name is taken, and nothing of the other's goes."""
    mkdir = Path.mkdir

    def late(path, *arguments, **options):
        if path.name == "new" and not path.exists():
            os.mkdir(path)
            (path / "other").write_text("theirs")
        mkdir(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", late)
    with pytest.raises(FileExistsError), make_folder(tmp_path / "new", new=True):
        pass
    assert (tmp_path / "new" / "other").read_text() == "theirs"


def test_killed_while_the_record_is_first_written(tmp_path):
    """What it left half-written fills no folder; what looks like it but is a user's does."""
    out = tmp_path / "run"
    out.mkdir()
    (out / f".{CONFIG}.4711.partial").write_text('{"settings"')
    (out / ".lock").touch()
    assert train.main(settings(out)) == 0
    assert not list(out.glob(".*"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.partial").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        choose(settings(tmp_path / "other"))


@pytest.mark.parametrize("finished", [pytest.param(False, marks=pytest.mark.slow), True])
def test_killed_between_the_last_checkpoint_and_its_log(tmp_path, finished):
    """The log is the checkpoint's, however little is left to do."""
    out = tmp_path / "run"
    assert train.main(settings(out)) == 0
    lines = (out / METRICS).read_text()
    (out / METRICS).write_text(lines.splitlines(keepends=True)[0])
    if not finished:
        (out / LEARNED).unlink()
        (out / RESULT).unlink()
    assert train.main(settings(out, resume=True)) == 0
    assert (out / METRICS).read_text() == lines


@pytest.mark.parametrize("moment", ["epoch", "scoring"])
@pytest.mark.parametrize("again", [False, True])
def test_a_folder_that_is_removed_during_the_run(tmp_path, capsys, monkeypatch, moment, again):
    """One line and exit code 1, also where another folder has taken its place."""
    out = tmp_path / "run"
    name = {"epoch": "adapt_to_new_classes", "scoring": "evaluate_rows"}[moment]
    function = getattr(training, name)

    def remove(*arguments):
        shutil.rmtree(out)
        if again:
            out.mkdir()
        return function(*arguments)

    monkeypatch.setattr(training, name, remove)
    with pytest.raises(SystemExit) as stop:
        cli.run_read(lambda _: settings(out), train.main, [])
    assert stop.value.code == 1
    assert capsys.readouterr().err == f"error: {out}: was removed while the run was writing\n"


def test_hints_are_commands_that_a_shell_takes(tmp_path):
    folder = tmp_path / "my runs; $(x)"
    folder.mkdir()
    (folder / CHECKPOINT).touch()
    with pytest.raises(InputError) as caught:
        finished_file(folder, LEARNED)
    assert f"--out '{folder}' --resume goes on" in str(caught.value)


@pytest.mark.parametrize("flag", ["--csv", "--json"])
def test_predict_does_not_write_over_what_it_reads(tmp_path, pictures, flag, capsys, monkeypatch):
    """Neither its list nor a picture nor the run, by whatever name."""
    import runpy

    run = Path(shutil.copytree(BEFORE / "zeroshot", tmp_path / "run"))
    table = tmp_path / "list.csv"
    table.write_text("path\npictures/a/0.png\n")
    (tmp_path / "link").symlink_to(table)
    before = tree(tmp_path)
    outputs = (table, tmp_path / "link", pictures / "a" / "0.png", run / LEARNED, run / CONFIG)
    for output in outputs:
        arguments = ["predict", str(run), str(table), flag, str(output)]
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as stop:
            runpy.run_module("lamp_fast.predict", run_name="__main__")
        assert stop.value.code == 2
        assert f"error: {flag} {output}: is read as" in capsys.readouterr().err
    assert tree(tmp_path) == before


def test_a_report_does_not_write_over_its_run(tmp_path):
    run = Path(shutil.copytree(BEFORE / "zeroshot", tmp_path / "run"))
    before = json.loads((run / CONFIG).read_text())
    with pytest.raises(InputError, match=r"--out .*: is read as"):
        report(ReportConfig(run, run / CONFIG))
    assert json.loads((run / CONFIG).read_text()) == before
