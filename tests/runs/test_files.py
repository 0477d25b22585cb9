"""Writing files: whole or not there, through links, into devices, never over what is read."""

import os
import stat
import subprocess
import sys
import threading

import pytest

from lamp_fast.errors import InputError
from lamp_fast.files import parse_json, read_json, refuse_output, write_bytes, write_csv


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path):
    (tmp_path / "shelf").mkdir()
    file, link = tmp_path / "shelf" / "file", tmp_path / "link"
    file.write_text("old")
    link.symlink_to("second")
    (tmp_path / "second").symlink_to("shelf/file")
    write_bytes(link, b"new")
    assert link.is_symlink()
    assert file.read_text() == "new"
    assert [each.name for each in file.parent.iterdir()] == ["file"]
    file.unlink()
    write_bytes(link, b"again")
    assert file.read_text() == "again"


def test_links_in_a_circle_are_an_error_of_the_machine(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="symbolic links"):
        write_bytes(tmp_path / "a", b"")


def test_a_pipe_is_written_to_and_stays(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    got = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    write_csv(pipe, ["a"], [[1]])
    reader.join(timeout=30)
    assert got == [b"a\n1\n"]
    assert stat.S_ISFIFO(os.stat(pipe).st_mode)


def test_a_device_stays_one(tmp_path):
    link = tmp_path / "null"
    link.symlink_to("/dev/null")
    for name in ("/dev/null", link):
        write_bytes(type(link)(name), b"gone")
        assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert link.is_symlink()


@pytest.mark.parametrize("to_file", [True, False])
def test_standard_output_by_its_name_is_written_to(tmp_path, to_file):
    """Also where it is a regular file, which is not taken from whoever has it open."""
    code = (
        "import sys; from pathlib import Path; from lamp_fast.files import write_bytes;"
        "print('before', flush=True); write_bytes(Path('/dev/stdout'), b'by name')"
    )
    file = tmp_path / "out"
    with open(file, "wb") as stream:
        inode = os.fstat(stream.fileno()).st_ino
        target = stream if to_file else subprocess.PIPE
        done = subprocess.run([sys.executable, "-c", code], stdout=target, check=True)
    assert (file.read_bytes() if to_file else done.stdout) == b"before\nby name"
    assert file.stat().st_ino == inode


def test_an_output_that_is_read_is_refused(tmp_path):
    file, other = tmp_path / "list.csv", tmp_path / "other.csv"
    file.write_text("path\n")
    other.write_text("path\n")
    (tmp_path / "link.csv").symlink_to(file)
    os.link(file, tmp_path / "name.csv")
    for output in ("list.csv", "link.csv", "name.csv", "../" + tmp_path.name + "/list.csv"):
        with pytest.raises(InputError, match=r"--csv .*: is read as .*, expected another file"):
            refuse_output("--csv", tmp_path / output, [tmp_path / "missing", file])
    refuse_output("--csv", other, [file])
    refuse_output("--csv", tmp_path / "new.csv", [file])
    refuse_output("--csv", type(file)("/dev/null"), [type(file)("/dev/null")])
    with pytest.raises(InputError, match="is a folder"):
        refuse_output("--csv", tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "[" * 40 + "]" * 40,
        '{"a": ' * 500 + "1" + "}" * 500,
        str(2**64),
        '{"\\ud800": 1}',
        "{",
        "",
    ],
)
def test_json_that_no_run_writes(tmp_path, text):
    file = tmp_path / "file.json"
    file.write_text(text)
    with pytest.raises(InputError, match=r"file\.json: damaged"):
        read_json(file)
    with pytest.raises(ValueError, match=r"."):
        parse_json(text)


def test_a_file_of_a_run_that_is_no_file(tmp_path):
    """A pipe is not waited for."""
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "missing", "."):
        with pytest.raises(InputError, match="expected a file of a run"):
            read_json(tmp_path / name)
