"""Libraries that are missing or broken, each as one line."""

import pytest

from lamp_fast.errors import InputError
from lamp_fast.extras import need


def test_a_library_that_is_there():
    assert need("--flag", "xml.sax", "some").__name__ == "xml.sax"


@pytest.mark.parametrize("module", ["some_library", "some_library.part"])
def test_a_missing_library(module):
    with pytest.raises(InputError) as refused:
        need("--flag x", module, "some", otherwise="; .csv does without")
    expected = "--flag x: needs some_library (pip install 'lamp_fast[some]'); .csv does without"
    assert str(refused.value) == expected


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("import no_such_part_of_it", "No module named 'no_such_part_of_it'"),
        ("raise ImportError('built for\\nanother version')", "built for another version"),
    ],
)
def test_a_library_that_cannot_be_imported(content, reason, tmp_path, monkeypatch):
    (tmp_path / "broken_library.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError) as refused:
        need("--flag", "broken_library", "some")
    assert str(refused.value) == f"--flag: broken_library cannot be imported ({reason})"
