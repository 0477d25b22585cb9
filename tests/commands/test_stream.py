"""Prediction that streams: stopped and continued calls, many pictures, every kind of input."""

import csv
import json
import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from PIL import Image

from lamp_fast import predict
from lamp_fast.classifier import Classifier
from lamp_fast.data.sources import load_source
from lamp_fast.data.sources.files import LeftOut
from lamp_fast.data.sources.given import Inputs
from lamp_fast.errors import InputError
from lamp_fast.runs import growing
from lamp_fast.runs.launch import Part

BATCH = 4


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream") / "run"
    Classifier.train(epochs=1, warmup_epochs=0, shots=4, out=folder)
    return folder


@pytest.fixture
def listed(tmp_path):
    """A list of 11 pictures: nine scans, one that is missing and one that is none."""
    place = tmp_path / "pictures"
    place.mkdir()
    scans = load_source("digits", None).test
    names = [f"{number:02}.png" for number in range(11)]
    for number, name in enumerate(names):
        Image.fromarray(scans.arrays[number]).save(place / name)
    (place / names[2]).unlink()
    (place / names[6]).write_bytes(b"no picture")
    file = place / "list.csv"
    file.write_text("path\n" + "\n".join(names) + "\n")
    return file


def settings(run, *sources, **words):
    return predict.PredictConfig(run, sources, batch=BATCH, top=2, **words)


def outputs(folder):
    folder.mkdir(exist_ok=True)
    return {kind: folder / f"answers.{kind}" for kind in ("csv", "jsonl", "json")}


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


class Stopped(Exception):
    """What ends a call here."""


def stop_at(patch, count, reason=Stopped):
    """Stop before the row of picture ``count``, from 1; nothing is written down but at the end."""
    write, left = growing.GrowingFiles.write, [count]

    def counting(files, texts):
        left[0] -= texts != [output.header for output in files._outputs]
        if not left[0]:
            raise reason
        write(files, texts)

    patch.setattr(growing.GrowingFiles, "write", counting)


@pytest.mark.parametrize("count", [1, 4, 5, 8, 11])
def test_a_stopped_call_goes_on_to_the_same_bytes(
    count, run, listed, tmp_path, monkeypatch, capsys
):
    there, here = tmp_path / "there", tmp_path / "here"
    assert predict.main(settings(run, listed, **outputs(there))) == 1
    call = settings(run, listed, **outputs(here))
    with monkeypatch.context() as patch:
        stop_at(patch, count)
        with pytest.raises(Stopped):
            predict.main(call)
    whole = (count - 1) // BATCH * BATCH
    assert bool(contents(here)) == bool(whole)
    assert not any(name in contents(here) for name in contents(there))
    capsys.readouterr()
    assert predict.main(call) == 1
    told = capsys.readouterr().err
    assert (f"goes on after {whole} pictures" in told) == bool(whole)
    assert "skipped 2 of 11 pictures" in told
    first, second = contents(there), contents(here)
    assert first.keys() == second.keys() == {"answers.csv", "answers.jsonl", "answers.json"}
    assert first == second


def test_three_forms_say_the_same(run, listed, tmp_path):
    files = outputs(tmp_path)
    predict.main(settings(run, listed, **files))
    document = json.loads(files["json"].read_text())
    lines = [json.loads(line) for line in files["jsonl"].read_text().splitlines()]
    assert [line["file"] for line in lines] == [
        str(listed.parent / f"{number:02}.png") for number in range(11)
    ]
    assert [line for line in lines if "reason" not in line] == document["pictures"]
    assert [line for line in lines if "reason" in line] == document["unreadable"]
    assert len(document["unreadable"]) == 2
    with open(files["csv"], newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["file"], row["class"]) for row in rows] == [
        (picture["file"], answer["class"])
        for picture in document["pictures"]
        for answer in picture["predictions"]
    ]
    # One indented object, as the json module writes it.
    assert files["json"].read_text() == json.dumps(document, indent=2) + "\n"


KILLED = """
import os, signal, sys
sys.path.insert(0, {here!r})
from pathlib import Path
from lamp_fast import predict
from lamp_fast.runs import growing
from lamp_fast.runs.launch import Part
import test_stream as here

growing._BETWEEN = 0
class Patch:
    setattr = staticmethod(setattr)
class Dead(Exception):
    def __init__(self):
        os.kill(os.getpid(), signal.SIGKILL)
here.stop_at(Patch, 7, Dead)
run, listed, table, lines = map(Path, sys.argv[1:])
predict.main(here.settings(run, listed, csv=table, jsonl=lines))
"""


def test_a_killed_process_loses_a_batch(run, listed, tmp_path):
    there, here = outputs(tmp_path / "there"), outputs(tmp_path / "here")
    predict.main(settings(run, listed, csv=there["csv"], jsonl=there["jsonl"]))
    script = KILLED.format(here=os.path.dirname(__file__))
    arguments = [run, listed, here["csv"], here["jsonl"]]
    result = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True
    )
    assert result.returncode == -signal.SIGKILL, result.stderr
    state = json.loads((tmp_path / "here" / "answers.csv.partial.json").read_text())
    assert (state["pictures"], state["unreadable"]) == (4, 1)
    # A line that was torn in the middle is of no batch.
    with open(tmp_path / "here" / "answers.jsonl.partial", "ab") as stream:
        stream.write(b'{"file": "half of a na')
    predict.main(settings(run, listed, csv=here["csv"], jsonl=here["jsonl"]))
    assert contents(tmp_path / "here") == contents(tmp_path / "there")


def stopped(run, listed, monkeypatch, **words):
    """Leave a partial file of one batch."""
    with monkeypatch.context() as patch:
        stop_at(patch, 6)
        with pytest.raises(Stopped):
            predict.main(settings(run, listed, **words))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"top": 3}, "--top 2, not 3"),
        ({"batch": 3}, "--batch 4, not 3"),
        ({"tte": "on"}, "--tte False, not True"),
        ({"add": "zebra"}, "other classes"),
        ({"classes": "one,two"}, "other classes"),
        ({"prior": "uniform"}, "prior None, not uniform"),
        ({"csv": "answers.csv"}, "other --csv"),
        ({"list": "01.png\n00.png\n"}, "other inputs"),
        ({"run": 1}, "other run"),
    ],
    ids=str,
)
def test_another_call_is_refused_and_can_start_anew(
    change, told, run, listed, tmp_path, monkeypatch
):
    file = tmp_path / "answers.jsonl"
    stopped(run, listed, monkeypatch, jsonl=file)
    before = contents(tmp_path / "pictures"), file.with_name("answers.jsonl.partial").read_bytes()
    words = dict(change)
    if "list" in words:
        listed.write_text("path\n" + words.pop("list"))
    if words.pop("run", None):
        other = tmp_path / "other"
        Classifier.train(epochs=1, warmup_epochs=0, shots=4, seed=2, out=other)
        run = other
    if "csv" in words:
        # The first output decides where the state lies, so this one is another file's.
        words = {"csv": file, "jsonl": None}
    call = predict.PredictConfig(
        run, (listed,), **{"batch": BATCH, "top": 2, "jsonl": file, **words}
    )
    with pytest.raises(InputError) as refused:
        predict.main(call)
    assert "answers.jsonl.partial: was begun with" in str(refused.value)
    assert told in str(refused.value)
    assert file.with_name("answers.jsonl.partial").read_bytes() == before[1]
    file.with_name("answers.jsonl.partial").unlink()
    predict.main(call)
    assert file.exists()
    assert not list(tmp_path.glob("*.partial*"))


@pytest.mark.parametrize(
    "damage", ['{"call"', "[]", '{"call": {}, "bytes": "x", "pictures": 1, "unreadable": 0}']
)
def test_a_damaged_state_is_refused(damage, run, listed, tmp_path, monkeypatch):
    file = tmp_path / "answers.jsonl"
    stopped(run, listed, monkeypatch, jsonl=file)
    file.with_name("answers.jsonl.partial.json").write_text(damage)
    with pytest.raises(InputError, match=r"answers\.jsonl\.partial\.json: damaged"):
        predict.main(settings(run, listed, jsonl=file))


def test_a_shortened_partial_file_is_refused(run, listed, tmp_path, monkeypatch):
    file = tmp_path / "answers.jsonl"
    stopped(run, listed, monkeypatch, jsonl=file)
    partial = file.with_name("answers.jsonl.partial")
    partial.write_bytes(partial.read_bytes()[:10])
    with pytest.raises(InputError, match=r"is not what .* tells of it"):
        predict.main(settings(run, listed, jsonl=file))


def test_two_processes_do_not_write_one_file(run, listed, tmp_path):
    output = [growing.Output("--csv", tmp_path / "answers.csv", "a,b\n")]
    with growing.GrowingFiles(output, {}) as files:
        with (
            pytest.raises(InputError, match=r"--csv .*another process writes it"),
            growing.GrowingFiles(output, {}),
        ):
            raise AssertionError
        files.write(["1,2\n"])
        files.mark(1, 0)
        files.finish()
    assert (tmp_path / "answers.csv").read_text() == "a,b\n1,2\n"


def test_an_older_file_stays_until_the_new_one_is_whole(run, listed, tmp_path, monkeypatch):
    file = tmp_path / "answers.csv"
    file.write_text("older")
    (tmp_path / "link.csv").symlink_to(file)
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(Stopped):
            predict.main(settings(run, listed, csv=tmp_path / "link.csv"))
    assert file.read_text() == "older"
    predict.main(settings(run, listed, csv=tmp_path / "link.csv"))
    assert (tmp_path / "link.csv").is_symlink()
    assert file.read_text().startswith("file,rank,")


def test_nothing_is_continued_with_standard_output(run, listed, tmp_path, monkeypatch, capsys):
    file = tmp_path / "answers.csv"
    words = {"csv": file, "jsonl": growing.STDOUT}
    stopped(run, listed, monkeypatch, **words)
    assert not list(tmp_path.glob("answers*"))
    capsys.readouterr()
    predict.main(settings(run, listed, **words))
    assert len(capsys.readouterr().out.splitlines()) == 11


def test_an_interrupt_says_how_to_go_on(run, listed, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 6, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt, match="after 4 pictures; the same call goes on"):
            predict.main(settings(run, listed, csv=tmp_path / "answers.csv"))


def listing(file, count):
    with open(file, "w") as stream:
        if file.suffix == ".csv":
            stream.write("path\n")
        for number in range(count):
            stream.write(f"some/longer/folder/name/{number:09}.jpg\n")


@pytest.mark.parametrize("kind", [".csv", ".txt"])
def test_lists_are_not_held(kind, tmp_path):
    """10,000 paths take 1.5 MB as bare bytes objects; what is read at once is a buffer of 8 KB."""
    file = tmp_path / f"list{kind}"
    listing(file, 10_000)
    inputs, peaks = Inputs([file], "path", LeftOut()), []
    tracemalloc.start()
    try:
        for _ in range(2):
            tracemalloc.reset_peak()
            held = tracemalloc.get_traced_memory()[0]
            assert inputs.check()[0] == 10_000
            assert sum(1 for _ in inputs) == 10_000
            assert sum(1 for _ in inputs.files()) == 10_001
            peaks.append(tracemalloc.get_traced_memory()[1] - held)
    finally:
        tracemalloc.stop()
    # The lesser of two: what else happens in this process, an import say, happens once.
    assert min(peaks) < 500_000


MEASURED = """
import re, sys
from pathlib import Path
from lamp_fast import predict
run, listed, out = map(Path, sys.argv[1:])
predict.main(predict.PredictConfig(run, (listed,), jsonl=out, top=1))
# Of this program alone: the peak that getrusage tells begins with that of whoever started it.
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory as Linux tells it")
def test_memory_does_not_grow_with_a_million_pictures(run, tmp_path):
    """None of them is there, so each goes all the way but through the CLIP.

    A million paths alone would take more than 100 MB.
    """
    peaks = []
    for count in (1_000, 1_000_000):
        file, out = tmp_path / f"{count}.csv", tmp_path / f"{count}.jsonl"
        listing(file, count)
        answer = subprocess.run(
            [sys.executable, "-c", MEASURED, str(run), str(file), str(out)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            check=True,
        )
        with open(out) as stream:
            assert sum(1 for _ in stream) == count
        peaks.append(int(answer.stdout))
    assert peaks[1] - peaks[0] < 50_000  # KB


def torchrun(*arguments, ranks=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={ranks}", "-m", "lamp_fast.predict", *map(str, arguments)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=240,
    )


@pytest.mark.slow
def test_torchrun_shares_the_pictures_out(run, listed, tmp_path):
    """Batches of 4, 4 and 3: the first process takes the first and the last."""
    alone = outputs(tmp_path / "alone")["jsonl"]
    predict.main(settings(run, listed, jsonl=alone))
    lines = alone.read_text().splitlines()
    out = tmp_path / "out"
    flags = ("--batch", BATCH, "--top", 2, "--device", "cpu", "--out", out)
    result = torchrun(run, listed, *flags, "--out-format", "jsonl")
    assert result.returncode == 0, result.stderr
    parts = [(out / f"part-{n}-of-2.jsonl").read_text().splitlines() for n in (1, 2)]
    assert parts == [[*lines[:4], *lines[8:]], lines[4:8]]
    assert result.stderr.count("classes 5 trained") == 1
    assert result.stderr.count("skipped '") == 2
    # The same call has nothing to do; another one does not mix its answers with these.
    before = contents(out)
    assert torchrun(run, listed, *flags, "--out-format", "jsonl").returncode == 0
    assert contents(out) == before
    call = settings(run, listed, out=out, out_format="jsonl")
    with pytest.raises(InputError, match="expected parts of 1"):
        predict.main(call)
    with pytest.raises(InputError, match=r"part-1-of-2\.jsonl: was begun with --top 2, not 3"):
        predict.main(
            predict.PredictConfig(
                run, (listed,), batch=BATCH, top=3, out=out, out_format="jsonl", part="1/2"
            )
        )


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_parts_are_all_the_pictures(count, run, listed, tmp_path):
    alone = outputs(tmp_path / "alone")["csv"]
    predict.main(settings(run, listed, csv=alone))
    expected = alone.read_text().splitlines()
    found = []
    for index in range(count):
        part = f"{index + 1}/{count}"
        assert predict.main(settings(run, listed, out=tmp_path / "out", part=part)) in (0, 1)
        text = (tmp_path / "out" / f"part-{index + 1}-of-{count}.csv").read_text()
        header, *rows = text.splitlines()
        assert header == expected[0]
        found += rows
    assert sorted(found) == sorted(expected[1:])


def test_the_size_of_a_part():
    for total, batch, count in [(0, 4, 2), (11, 4, 2), (11, 4, 5), (8, 4, 2), (9, 1, 4)]:
        for index in range(count):
            part = Part(index, count)
            assert part.size(total, batch) == len(list(part.of(range(total), batch)))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"part": "0/2"}, "--part 0/2: expected I/N"),
        ({"part": "3/2"}, "--part 3/2: expected I/N"),
        ({"part": "half"}, "--part half: expected I/N"),
        ({"out": "out", "csv": "a.csv"}, "--csv: expected it or --out"),
        ({"out": "list.csv"}, "list.csv: is a file, expected a folder"),
        ({"out": "nowhere/out"}, "expected a file in a folder that exists"),
    ],
    ids=str,
)
def test_parts_that_are_none(words, told, run, listed, monkeypatch):
    monkeypatch.chdir(listed.parent)
    before = contents(listed.parent)
    paths = {key: Path(value) if key != "part" else value for key, value in words.items()}
    with pytest.raises(InputError) as refused:
        predict.main(settings(run, listed, **paths))
    assert told in str(refused.value)
    assert contents(listed.parent) == before


def test_torchrun_needs_a_folder(run, listed, tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "launched", lambda: True)
    with pytest.raises(InputError, match="--out: missing, expected a folder"):
        predict.main(settings(run, listed, csv=tmp_path / "a.csv"))
