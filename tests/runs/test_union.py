"""Base and new names at once: a run's figures against loops over its logits, and the columns."""

import numpy as np
import pytest
import torch

from lamp_fast import train
from lamp_fast.clip.load import load_clip
from lamp_fast.files import read_json
from lamp_fast.methods import METHODS
from lamp_fast.methods.surroundings import RunClasses
from lamp_fast.methods.zeroshot import ZeroShot
from lamp_fast.runs.building import build_method
from lamp_fast.runs.config import default_config
from lamp_fast.runs.experiment import load_run
from lamp_fast.runs.folder import RESULT
from lamp_fast.runs.scoring import UNION_COLUMNS, results_table

KEYS = [key for key, _ in UNION_COLUMNS]
INDEPENDENT = [name for name, each in METHODS.items() if each.load().independent_names]
TINY = ("--threads", "1", "--shots", "2", "--batch", "5", "--epochs", "1")


def test_the_figures_of_a_run(tmp_path, capsys):
    """Of zero-shot CLIP, whose two lists are scored apart, and of CoOp, whose are one."""
    flags = ("--method", "coop", *TINY, "--out", str(tmp_path / "run"), "--union")
    assert train.main(train.read_flags(flags)) == 0
    assert "| OpenworldAUC |" in " ".join(capsys.readouterr().out.split())
    experiment, _ = load_run(tmp_path / "run")
    benchmark = experiment.benchmark
    names = (*benchmark.base_names, *benchmark.new_names)
    rows = read_json(tmp_path / "run" / RESULT)
    for row, method in zip(rows, (ZeroShot(experiment.clip), experiment.method), strict=True):
        classes = method.prepare(names, benchmark.template, benchmark.origin)
        count, halves = len(benchmark.base_names), []
        for pictures, first in ((benchmark.test_base, 0), (benchmark.test_new, count)):
            images = torch.stack(
                [experiment.test_transform(pictures.load(each)) for each in range(len(pictures))]
            )
            logits = method.logits(images, classes).double().numpy()
            own = logits[:, first : first + count] if first else logits[:, :count]
            odds = np.exp(logits - logits.max(1, keepdims=True))
            belief = (odds / odds.sum(1, keepdims=True))[:, :count].max(1)
            labels = pictures.labels
            halves.append((own.argmax(1) == labels, logits.argmax(1) == labels + first, belief))
        (right, union, belief), (other, among, disbelief) = halves
        above = (belief[:, None] > disbelief).astype(float)
        pairs = right[:, None] * other * above
        # A picture whose two best names are within float32's rounding may go either way, and so a
        # share of it: one of 270 at most, and as many pairs as there are of it.
        near = 1.01 / 269
        assert row["union_base"] == pytest.approx(union.mean(), abs=near)
        assert row["union_new"] == pytest.approx(among.mean(), abs=near)
        assert row["union"] == pytest.approx(np.concatenate([union, among]).mean(), abs=near)
        assert row["openworld_auc"] == pytest.approx(pairs.mean(), abs=near)
        halves = row["union_base"], row["union_new"]
        assert row["union_hm"] == pytest.approx(2 * np.prod(halves) / sum(halves), rel=1e-14)
        # Fewer names to confuse a picture with.
        assert row["union_base"] <= row["acc_base"]
        assert row["union_new"] <= row["acc_new"]
    assert "OpenworldAUC" not in results_table(rows)


@pytest.mark.parametrize(
    "flags", [("--method", "lp++", "--lp-steps", "5"), ("--method", "tip", "--split", "all")]
)
def test_without_new_names_there_is_none(tmp_path, flags):
    assert train.main(train.read_flags([*flags, *TINY, "--out", str(tmp_path / "run")])) == 0
    row = read_json(tmp_path / "run" / RESULT)[1]
    assert [row[key] for key in KEYS] == [None] * len(KEYS)


@pytest.fixture(scope="module")
def clip():
    return load_clip("tiny", dtype=torch.float64)


@pytest.mark.parametrize("name", INDEPENDENT)
@torch.no_grad()
def test_scores_over_some_names_are_columns_of_all(clip, name):
    base, new = ("digit one", "digit two", "digit three"), ("digit four", "digit five")
    config = default_config({"method": name})
    method = build_method(clip, config, RunClasses(base, new, (5, 3, 2)))
    generator = torch.Generator().manual_seed(0)
    for each in method.parameters():  # some start at zeros, where all is alike
        each.add_(0.02 * torch.randn(each.shape, generator=generator, dtype=each.dtype))
    size = clip.preprocessing.size
    images = torch.randn(3, 3, size, size, generator=generator, dtype=torch.float64)
    every, first, second = (
        method.logits(images, method.prepare(names, "a photo of the {}."))
        for names in (base + new, base, new)
    )
    # float64's 1e-16 through twelve layers and a scale of 100, sums in another order.
    torch.testing.assert_close(torch.cat([first, second], dim=1), every, rtol=0, atol=1e-9)
