"""The reader of .mat files in its own process; test_catalog.py has what it reads."""

import miniatures

from lamp_fast.data.sources import matlab


def test_the_reader_of_matlab_files_has_a_process_of_its_own(tmp_path, monkeypatch):
    miniatures.stanford_cars(tmp_path)
    names = tmp_path / "stanford_cars" / "devkit" / "cars_meta.mat"
    annotations = tmp_path / "stanford_cars" / miniatures.CARS_TEST
    models, rows = matlab.read_variables({names: "class_names", annotations: "annotations"})
    assert models == ["AM General Hummer SUV 2000", "BMW X5 SUV 2007"]
    assert [(row["fname"], row["class"]) for row in rows] == [("00001.jpg", 2), ("00002.jpg", 1)]
    names.write_bytes(b"text")
    message = miniatures.refusal(
        matlab.read_variables, {annotations: "annotations", names: "class_names"}
    )
    assert message == f"{names}: cannot be read as a .mat file (Mat file appears to be truncated)"
    # A crash of the compiled reader ends its process alone.
    monkeypatch.setattr(matlab, "READER", "import os; os.kill(os.getpid(), 11)")
    message = miniatures.refusal(matlab.read_variables, {annotations: "annotations"})
    assert message.endswith("(its reader was ended by signal 11)")
    monkeypatch.setattr(matlab, "READER", "import time; time.sleep(60)")
    monkeypatch.setattr(matlab, "LONGEST_SECONDS", 0.1)
    message = miniatures.refusal(matlab.read_variables, {annotations: "annotations"})
    assert message.endswith("(takes more than 0.1 seconds)")
