"""What every command shares: home folders in paths, Ctrl-C, outputs that are ASCII alone."""

import os
import pwd
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from lamp_fast import cli
from lamp_fast.classifier import Classifier
from lamp_fast.clip.load import load_clip
from lamp_fast.data.disk_cache import FOLDER_VARIABLE, default_folder
from lamp_fast.data.settings import DataConfig
from lamp_fast.errors import InputError
from lamp_fast.runs.config import choosing_flags, default_config
from lamp_fast.runs.folder import resumed_defaults
from lamp_fast.runs.training import training_settings


@dataclass(frozen=True)
class Paths:
    """Flags of every shape that paths have."""

    out: Path = Path("here")
    table: Path | None = None
    sources: tuple[Path, ...] = ()


@pytest.fixture
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def no_home(monkeypatch):
    """As in a container whose user has no entry."""

    def unknown(*_):
        raise KeyError

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def test_every_path_flag_knows_the_home_folder(home):
    given = cli.parse(Paths, ["--out=~/x", "--table", "~/t.csv", "--sources", "a", "~"])
    assert given == Paths(home / "x", home / "t.csv", (Path("a"), home))
    assert cli.parse(Paths, []) == Paths()
    assert cli.parse(Paths, ["--out", "a~b/~c"]).out == Path("a~b/~c")


def test_keywords_and_what_is_looked_at_first(home):
    settings = training_settings({"data": "folder", "root": "~/pictures", "out": "~/run"})
    assert (settings.data.root, settings.out) == (home / "pictures", home / "run")
    (home / "run").mkdir()
    (home / "run" / "config.json").write_text("{}")
    for look in (
        lambda: default_config(choosing_flags(["--config=~/none.json"])),
        lambda: resumed_defaults(choosing_flags(["--out=~/run", "--resume"])),
        lambda: Classifier.load("~/run"),
        lambda: Classifier.from_pretrained("~/run"),
    ):
        with pytest.raises(InputError, match=str(home)):
            look()
    with pytest.raises(InputError, match="~nosuchuser/x: there is no such home folder"):
        DataConfig(data="folder", root=Path("~nosuchuser/x")).resolved()
    (home / "w.pt").write_bytes(b"no weights")
    with pytest.raises(InputError, match=r"--pretrained ~/w\.pt: not weights of this model"):
        load_clip("ViT-B-32", "~/w.pt", weights_of="openai")


@pytest.mark.parametrize("argument", ["--out=~nosuchuser/x", "--table=~nosuchuser"])
def test_nobodys_home(argument):
    with pytest.raises(InputError, match="no such home folder") as error:
        cli.parse(Paths, [argument])
    assert "\n" not in str(error.value)


def test_without_a_home_folder(no_home, monkeypatch):
    with pytest.raises(InputError, match="~/x: there is no such home folder"):
        cli.expand_path("~/x")
    monkeypatch.delenv(FOLDER_VARIABLE)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with pytest.raises(InputError, match=r"~/\.cache: there is no such home folder"):
        default_folder()
    assert cli.expand_path("/x") == Path("/x")


def start(program, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


INTERRUPTED = """
import sys, time
from dataclasses import dataclass
from lamp_fast import cli

@dataclass(frozen=True)
class Nothing:
    pass

def main(config):
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        time.sleep(0.3)
        print("tidied", flush=True)

cli.run(Nothing, main, [])
"""


def test_two_interrupts_at_once_are_one():
    process = start(INTERRUPTED)
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGINT)
    time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (cli.INTERRUPTED, b"tidied\n", b"\ninterrupted\n")


PRINTING = """
import os, sys
from dataclasses import dataclass
from lamp_fast import cli
from lamp_fast.errors import InputError

@dataclass(frozen=True)
class Nothing:
    pass

def main(config):
    print("81.7 \\u00b1 0.3", "caf\\u00e9", os.fsdecode(b"\\xff"))
    raise InputError("caf\\u00e9")

cli.run(Nothing, main, [])
"""
ASCII = [
    {"PYTHONIOENCODING": "ascii"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
]


@pytest.mark.parametrize("environment", ASCII, ids=["encoding", "locale"])
def test_an_output_of_ascii_alone(environment):
    out, err = start(PRINTING, **environment).communicate(timeout=60)
    assert out == rb"81.7 +- 0.3 caf\xe9 \udcff" + b"\n"
    assert err == rb"error: caf\xe9" + b"\n"


def test_an_output_of_utf_8_shows_what_it_can():
    out, _ = start(PRINTING, PYTHONIOENCODING="utf-8").communicate(timeout=60)
    assert out == "81.7 ± 0.3 café \\udcff\n".encode()


@pytest.mark.parametrize("environment", ASCII, ids=["encoding", "locale"])
@pytest.mark.parametrize("command", ["train --help", pytest.param("info", marks=pytest.mark.slow)])
def test_commands_print_in_ascii(command, environment):
    done = subprocess.run(
        [sys.executable, "-m", *f"lamp_fast.{command}".split()],
        env={**os.environ, **environment},
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert done.stdout.isascii()
