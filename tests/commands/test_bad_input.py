"""Every command: bad input costs one line that names it, exit code 2, and nothing is written."""

import os
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from lamp_fast import train
from lamp_fast.runs.config import TrainConfig, apply_preset
from lamp_fast.runs.folder import LEARNED, RESULT

# (command, arguments, what the line must say). {run}, {place} are folders, see the fixtures.
BAD_INPUT = [
    ("train", "--k 21", "--k 21: expected at most the pool size --m 20"),
    ("train", "--k 0", "--k 0: expected at least 1"),
    ("train", "--phi-hidden 0", "--phi-hidden 0: expected at least 1"),
    ("train", "--phi linear --phi-hidden 64", "--phi-hidden 64: --phi linear has no hidden layer"),
    ("train", "--phi affine", "--phi"),
    ("train", "--similarity-gradient none", "--similarity-gradient"),
    ("train", "--layers 3..7", "--layers 3..7: expected layers within 1..6"),
    ("train", "--layers 7..3", "7..3: expected layers such as 3..12"),
    ("train", "--imb 0.5", "--imb 0.5: expected at least 1"),
    ("train", "--imb nan", "--imb nan"),
    ("train", "--shots 0", "--shots 0: expected at least 1"),
    ("train", "--preset best", "--preset best: expected one of table16-imb"),
    ("train", "--data nonsense", "nonsense"),
    ("train", "--method nonsense", "--method nonsense: expected one of lamp"),
    ("train", "--method coop --k 3", "--k: --method coop has no such flag"),
    ("train", "--method=tcp --k=3", "--k: --method tcp has no such flag"),
    ("train", "--n-ctx 2", "--n-ctx: --method lamp has no such flag"),
    ("train", "--no-last-row", "--no-last-row: --method lamp has no such flag"),
    ("train", "--seed 18446744073709551616", "--seed 18446744073709551616: expected at most"),
    ("train", "--lr 1e300", "--lr 1e+300: expected at most 1e+30"),
    ("train", "--m 1000000000", "--m 1000000000: expected at most"),
    ("train", "--d 1000000000", "--d 1000000000: expected at most"),
    ("train", "--s 1000000000", "--s 1000000000: expected at most"),
    ("train", "--layers 1..1000000000", "--layers 1..1000000000: expected layers of at most"),
    ("train", "--threads 1000000", "--threads 1000000: expected at most"),
    ("train", "--cache-size 1e300", "--cache-size 1e+300: expected at most"),
    ("train", "--gamma inf", "--gamma inf: expected at most"),
    ("train", "--beta nan", "--beta nan: expected at least 0"),
    ("train", "--method coop --preset tiny", "--preset tiny: is of --method lamp, not coop"),
    ("train", "--method coop --n-ctx 5", "--ctx-init 'a photo of a': 4 tokens, expected at least"),
    ("train", "--method mma --template a.{{}}", "--template 'a.{{}}': --method mma has a prompt"),
    ("train", "--method maple --depth 7", "--depth 7: expected at most 6"),
    ("train", "--method mma --adapter-layers 4..7", "--adapter-layers 4..7: expected layers"),
    ("train", "--method tcp --knowledge-layer 7", "--knowledge-layer 7: expected at most 6"),
    ("train", "--method candle --fusion-heads 7", "--fusion-heads 7: expected a divisor"),
    ("train", "--method candle --fusion-dropout 1", "--fusion-dropout 1.0: expected less than 1"),
    ("train", "--method candle --logit-adjustment", "--logit-adjustment: Candle's own loss"),
    ("train", "--method lfa --logit-adjustment", "--logit-adjustment: LFA's loss"),
    ("train", "--loss hinge", "--loss"),
    ("train", "--sampler random", "--sampler"),
    ("train", "--loss ldam --logit-adjustment", "--loss ldam --logit-adjustment: expected one of"),
    ("train", "--loss lade --accumulate 2", "--accumulate 2: --loss lade compares"),
    ("train", "--method candle --loss focal", "--loss focal: Candle's own loss"),
    ("train", "--method lfa --class-weights auto", "--class-weights: LFA's loss"),
    ("train", "--class-weights {place}/none.json", "--class-weights {place}/none.json: cannot be"),
    ("train", "--class-weights {place}/list.json", "{place}/list.json: expected an object such as"),
    ("train", "--class-weights {place}/yak.json", "{place}/yak.json: lacks class 'zero'"),
    ("train", "--as-published", "--as-published: expected another --method"),
    ("train", "--clip nonsense", "--clip nonsense"),
    ("train", "--clip RN50 --pretrained openai", "ResNet"),
    ("train", "--clip ViT-B-16 --pretrained {place}/none.pt", "{place}/none.pt"),
    ("train", "--lr fast", "--lr"),
    ("train", "--lr -1", "--lr -1.0: expected more than 0"),
    ("train", "--nonsense", "--nonsense"),
    ("train", "--epochs 1.5", "--epochs"),
    ("train", "--batch", "--batch"),
    ("train", "--data caltech101", "--root"),
    ("train", "--data caltech101 --root {place}/nowhere", "--root {place}/nowhere: does not exist"),
    ("train", "--data folder --root {place}/void", "--root {place}/void: is empty"),
    ("train", "--data folder --root {place}/single", "expected at least 2 classes"),
    ("train", "--clip tiny --data folder --root {place}/damaged", "damaged/dog/"),
    ("train", "--data table --table {place}/none.csv", "{place}/none.csv"),
    ("train", "--template picture", "--template 'picture': expected {{}} once"),
    ("train", "--device abacus", "--device abacus"),
    ("train", "--precision fp16 --device cpu", "--precision fp16"),
    ("train", "--no-mpp --no-msp", "--no-mpp --no-msp"),
    ("train", "--config {place}/none.json", "--config {place}/none.json"),
    ("train", "--config {place}/list.json", "{place}/list.json"),
    ("train", "--resume --overwrite", "--resume"),
    ("train", "--out {place}/void/x --resume", "--resume: {place}/void/x holds no run"),
    ("train", "--out {place}/note.txt", "--out {place}/note.txt: is a file"),
    ("train", "--out {run}", "--out {run}: not empty"),
    ("train", "--out {run} --resume --method coop", "--resume --method coop: the run in {run}"),
    ("train", "--out {run} --resume --block 7", "--resume --block 7: the run in {run} was begun"),
    ("train", "--out {run} --resume --k 3", "--resume --k 3: the run in {run} was begun with 2"),
    ("train", "--out {place} --overwrite", "--overwrite: {place} is not the folder of a run"),
    ("train", "--out /proc/nonexistent/run", "--out /proc/nonexistent/run: cannot be written"),
    ("evaluate", "", "run"),
    ("evaluate", "{place}/nowhere", "{place}/nowhere/config.json"),
    ("evaluate", "{place}/unfinished", "{place}/unfinished: training has not finished"),
    ("evaluate", "{place}/cut", "{place}/cut/learned.safetensors: damaged"),
    ("evaluate", "{run} --fast", "--fast"),
    ("evaluate", "{run} --prior test.json", "--prior test.json: cannot be read"),
    ("evaluate", "{run} --prior train", "prior train: 'five' was not trained"),
    ("evaluate", "{run} --prior {place}/yak.json", "prior: lacks class 'zero'"),
    ("evaluate", "{run} --data digits --prior train", "prior train: 'five' was not trained"),
    ("evaluate", "{run} --data digits --out {place}", "--out {place}: holds something else than"),
    ("evaluate", "{run} --data digits --out {place}/note.txt", "note.txt: is a file, expected"),
    ("pretrain", "--steps 0 --out {place}/new", "--steps 0: expected"),
    ("pretrain", "--letters 99 --out {place}/new", "--letters 99: expected at most 25"),
    ("pretrain", "--warmup 9 --steps 9 --out {place}/new", "--warmup 9: expected 0..8"),
    ("pretrain", "--lr nan --out {place}/new", "--lr nan"),
    ("pretrain", "--seed -1 --out {place}/new", "--seed -1"),
    ("pretrain", "--out {run}", "--out {run}: expected a new or empty folder"),
    ("features", "{place}/nothing.png --out {place}/embeddings", "does not exist"),
    ("features", "{place}/cat.png --out {place}", "--out {place}: is there already"),
    ("predict", "", "run"),
    ("predict", "{run}", "expected at least one picture"),
    ("predict", "{run} {place}/none.png", "{place}/none.png: does not exist"),
    ("predict", "{run} {place}/void", "{place}/void: holds no pictures"),
    ("predict", "{place}/nowhere {place}/cat.png", "{place}/nowhere/config.json"),
    ("predict", "{run} {place}/cat.png --top 0", "top 0: expected at least 1"),
    (
        "predict",
        "{run} {place}/cat.png --batch 10000000000000000000",
        "batch 10000000000000000000: expected at most",
    ),
    ("predict", "{run} {place}/cat.png --classes cat,,dog", "--classes 'cat,,dog'"),
    ("predict", "{run} {place}/cat.png --classes one,one", "'one' is named 2 times"),
    ("predict", "{run} {place}/cat.png --prior {place}/list.json", "list.json: expected an object"),
    ("predict", "{run} {place}/cat.png --add yak --prior train", "prior train: 'yak' was not"),
    ("predict", "{run} {place}/cat.png --csv {place}/no/x.csv", "--csv {place}/no/x.csv"),
    ("predict", "{run} {place}/cat.png --csv /proc/self/x.csv", "/proc/self/x.csv: cannot be"),
    ("predict", "{run} {place}/list.csv --path-column file", "--path-column file"),
    ("export", "{run}", "OUT"),
    ("export", "{run} {place}/new --format jpeg", "--format"),
    ("export", "{run} {place}/damaged --format torch", "OUT {place}/damaged: expected a new or"),
    (
        "export",
        "{run} {place}/new --format torch --classes one",
        "--classes one: expected at least",
    ),
    ("export", "{place}/nowhere {place}/new --format torch", "{place}/nowhere/config.json"),
    ("compare", "--data folder --root {place}/nowhere", "--root {place}/nowhere: does not exist"),
    ("compare", "--budget soon", "--budget"),
    ("serve", "{place}/nowhere", "{place}/nowhere/config.json"),
    ("serve", "{run} --port 70000", "--port 70000"),
    ("report", "", "run"),
    ("report", "{place}/nowhere", "{place}/nowhere"),
    ("report", "{place}/unscored", "{place}/unscored: training has not finished"),
    ("report", "{run} --out {place}/void", "--out {place}/void: is a folder"),
    ("data", "{place}/nowhere", "--root {place}/nowhere: does not exist"),
    ("data", "{place}/void", "--root {place}/void: is empty"),
    ("data", "{place}/damaged --out {place}/chart.txt", "--out {place}/chart.txt"),
    ("data", "{place}/damaged --imb 0", "--imb 0.0: expected at least 1"),
    ("data", "{place}/damaged --seed -1", "--seed -1: expected at least 0"),
    ("data", "--table {place}/list.csv --label-column kind", "kind"),
    ("reproduce", "table8", "table8"),
    ("reproduce", "table1 --methods nonsense", "nonsense"),
    ("reproduce", "table1 --root {place}/nowhere", "{place}/nowhere"),
    ("info", "--device", "--device"),
    ("info", "--method nonsense", "--method nonsense: expected one of lamp"),
    ("info", "--method coop --clip nonsense", "--clip nonsense: not tiny nor"),
    ("cache", "--yes", "--yes: expected --clear"),
    ("cache", "--clear all", "all"),
    ("cache", "--keep", "--keep"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of one epoch on one picture a class."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = apply_preset(TrainConfig(out=folder), "tiny")
    config = replace(
        config,
        data=replace(config.data, shots=1),
        optim=replace(config.optim, epochs=1),
        own=replace(config.own, adapt_passes=1),
    )
    assert train.main(config) == 0
    return folder


@pytest.fixture(scope="module")
def place(run, tmp_path_factory):
    """A folder of things that somebody may name by mistake."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "void").mkdir()
    (folder / "note.txt").write_text("precious")
    (folder / "list.json").write_text("[]")
    (folder / "yak.json").write_text('{"yak": 1}')
    (folder / "list.csv").write_text("path,label\ncat.png,cat\n")
    Image.new("RGB", (8, 8)).save(folder / "cat.png")
    for name, classes in (("single", ["cat"]), ("damaged", ["cat", "dog"])):
        for each in classes:
            (folder / name / each).mkdir(parents=True)
            for number in range(10):
                Image.new("RGB", (8, 8), (number, 0, 0)).save(
                    folder / name / each / f"{number}.png"
                )
    whole = (folder / "damaged" / "dog" / "1.png").read_bytes()
    for number in range(1, 10):
        (folder / "damaged" / "dog" / f"{number}.png").write_bytes(whole[:40])
    shutil.copytree(run, folder / "unfinished")
    (folder / "unfinished" / LEARNED).unlink()
    shutil.copytree(run, folder / "unscored")
    (folder / "unscored" / RESULT).unlink()
    shutil.copytree(run, folder / "cut")
    os.truncate(folder / "cut" / LEARNED, 1000)
    return folder


def contents(*folders: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder with its size and time of change."""
    paths = [path for folder in folders for path in folder.rglob("*")]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}


# The module was imported before it is run as a command: here, that is meant.
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize(("command", "arguments", "message"), BAD_INPUT, ids=lambda each: each[:48])
def test_bad_input_costs_one_line_and_nothing_is_written(
    command, arguments, message, run, place, tmp_path, monkeypatch, capsys
):
    """Through the command's own entry, without the seconds that a fresh process costs."""
    arguments = arguments.format(run=run, place=place).split()
    monkeypatch.setattr(sys, "argv", [command, *arguments])
    monkeypatch.chdir(tmp_path)
    before = contents(run, place)
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(f"lamp_fast.{command}", run_name="__main__", alter_sys=False)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2, lines
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert message.format(run=run, place=place) in lines[0]
    assert contents(run, place) == before
    assert not os.listdir(tmp_path)


def test_the_table_has_every_command():
    package = Path(train.__file__).parent
    commands = {
        path.stem for path in package.glob("*.py") if '__name__ == "__main__"' in path.read_text()
    } | {path.parent.name for path in package.glob("*/__main__.py")}
    assert {command for command, _, _ in BAD_INPUT} == commands
