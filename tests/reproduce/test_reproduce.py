"""Tables from declaration to file: expansion, addresses, the paper's figures, cells, forms."""

import contextlib
import csv
import io
import json
import math
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

from lamp_fast import cli, train
from lamp_fast.clip.settings import ClipConfig
from lamp_fast.errors import InputError
from lamp_fast.files import write_json
from lamp_fast.jobs import identity
from lamp_fast.jobs.cluster import run_on_cluster
from lamp_fast.jobs.identity import code_identity, read_settings
from lamp_fast.jobs.queue import Queue, Task, Timing
from lamp_fast.methods import METHODS
from lamp_fast.reproduce import attempt, paper, render, results, tables
from lamp_fast.reproduce.__main__ import main, split_flags
from lamp_fast.reproduce.jobs import Identities, Job
from lamp_fast.reproduce.plan import make_plan
from lamp_fast.reproduce.results import best, compare, read_cells
from lamp_fast.reproduce.settings import ReproduceConfig
from lamp_fast.reproduce.tables import TABLES
from lamp_fast.runs import parameters, stats
from lamp_fast.runs.config import TrainConfig, apply_preset, change, from_saved, to_saved
from lamp_fast.runs.experiment import load_run_on
from lamp_fast.runs.metrics import harmonic_mean
from lamp_fast.runs.stats import paired_test
from lamp_fast.runs.trainer import Trainer
from lamp_fast.runs.transfer import transfer_rows
from lamp_fast.tensors import load_tensors

TINY = {"clip": "tiny", "preset": "tiny", "data": ("digits",)}
PAPER = json.loads((Path(paper.__file__).parent / "paper.json").read_text())["tables"]


def plan_of(table, *flags, **options):
    return make_plan(ReproduceConfig(table, **{**TINY, **options}), flags)


# --- what the tables are ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "panels", "columns", "metrics", "average"),
    [
        ("table1", ["imb 10", "imb 20", "imb 50"], 11, "HM-A HM-M", True),
        ("table2", ["16 shots"], 11, "Base New HM", True),
        ("table3", ["imb 100"], 11, "Acc. Mac.", True),
        ("table4", ["imb 100"], 5, "Acc. Mac.", False),
        ("table6", ["imb 10"], 2, "HM-A HM-M", False),
        ("table7", ["imb 10"], 1, "HM-A HM-M Avg.", False),
        ("table9", ["imb 100"], 10, "HM-A", True),
        ("table10", ["imb 200"], 10, "HM-A", True),
        ("table11", ["imb 10"], 1, "HM-A HM-M", False),
    ],
)
def test_a_table_has_the_layout_that_the_paper_prints(table, panels, columns, metrics, average):
    written = TABLES[table]
    assert [panel.title for panel in written.panels] == panels
    assert len(written.columns) == columns
    assert [metric.title for metric in written.metrics] == metrics.split()
    assert bool(written.averaged) == average


@pytest.mark.parametrize("table", PAPER)
def test_every_figure_of_the_paper_has_a_cell_beside_it(table):
    """Rows, columns and metrics of the paper's file are those of the declaration, both ways."""
    written = TABLES[table]
    if table == "table2":
        written = replace(written, panels=tables.shot_panels(16, 1, 2, 4, 8))
    assert {panel.title for panel in written.panels} == PAPER[table].keys()
    ours = {row.paper for row in written.rows} - {None}
    columns = {column.key for column in written.columns} | {"average"} & {
        "average" if written.averaged else ""
    }
    for panel, rows in PAPER[table].items():
        assert rows.keys() <= ours
        assert table == "table2" or rows.keys() == ours
        for row in rows.values():
            assert row.keys() == columns, panel
            for figures in row.values():
                assert figures.keys() <= {metric.key for metric in written.metrics}


@pytest.mark.parametrize(
    ("table", "preset"),
    [
        *((f"table{number}", "ablation-best") for number in (1, 6, 7, 11)),
        *((f"figure3{letter}", "ablation-best") for letter in "abcd"),
        *((f"table{number}", "table16-imb") for number in (5, 9, 10)),
        ("table2", "table16-fewshot"),
        *((f"table{number}", "table16-cross") for number in (3, 4)),
    ],
)
def test_each_table_has_its_written_preset(table, preset):
    assert TABLES[table].preset == preset


@pytest.mark.parametrize(
    ("figure", "setting", "grid"),
    [
        ("figure3b", "lamp.d", [16, 32, 64, 128]),
        ("figure3c", "lamp.layers", [range(1, 7), range(1, 10), range(3, 13), range(6, 13),
                                     range(9, 13)]),
        ("figure3d", "lamp.gamma", [1e-4, 5e-4, 1e-3, 5e-3, 1e-2]),
        ("table7", "lamp.beta", [0, 0.2, 0.5, 1, 2, 4, 8]),
        ("table11", "lamp.m", [10, 12, 15, 20, 25, 30]),
    ],
)  # fmt: skip
def test_the_ablations_have_their_written_grids(figure, setting, grid):
    values = [row.settings[setting] for row in TABLES[figure].rows if row.reading == "method"]
    assert values == [tuple(each) if isinstance(each, range) else each for each in grid]


def test_figure_3a_crosses_k_and_s():
    rows = [row.settings for row in TABLES["figure3a"].rows if row.reading == "method"]
    assert [(row["lamp.k"], row["lamp.s"]) for row in rows] == [*product((1, 2, 4, 6, 8), repeat=2)]
    assert TABLES["figure3a"].rows[0].title == "k = 1 s = 1".upper()


def test_what_lbo_adapts_has_a_marked_row_beside_it():
    titles = [row.title for row in TABLES["table6"].rows]
    assert titles == [
        "CLIP", "MPP", "MSP", "MPP+MSP", "MPP+LBO", "MPP+LBO, b_new on new (transductive)",
        "MPP+MSP+LBO", "MPP+MSP+LBO, b_new on new (transductive)",
    ]  # fmt: skip
    assert not any(row.reading == "transductive" for row in TABLES["table3"].rows)
    assert [row.title for row in TABLES["table1"].rows[-4:]] == [
        "LAMP", "LAMP, b_new on new (transductive)", "LAMP+LA",
        "LAMP+LA, b_new on new (transductive)",
    ]  # fmt: skip


# --- plans -----------------------------------------------------------------------------------


def addresses(plan, identities=None):
    identities = identities or Identities()
    return {identities.task(job).address for job in plan.every_job()}


def test_a_plan_counts_as_the_table_says():
    """LAMP and LAMP+LA at two ratios and three seeds, read twice each; zero-shot CLIP once."""
    plan = plan_of("table1", methods=("zeroshot", "lamp"), imb=(10, 50), seeds=(1, 2, 3))
    assert len(plan.table.rows) == 5
    assert len(plan.jobs) == 5 * 2 * 3
    assert len(addresses(plan)) == 2 * 2 * 3 + 1


def test_tables_share_what_they_have_in_common():
    beta = plan_of("table7", "--beta", "1", seeds=(1,))
    table1 = plan_of("table1", methods=("lamp",), imb=(10,), seeds=(1,))
    # tiny has beta = 1 and M = 20: LAMP's row of table 1 is in tables 7 and 11.
    table11 = plan_of("table11", seeds=(1,))
    assert len(addresses(beta) & addresses(table1) & addresses(table11)) == 1
    # What the table varies is the table's, whatever the flags say.
    assert len({job.settings.own.beta for job in beta.every_job()}) == 7


def test_flags_of_one_method_go_to_its_rows_alone():
    """And one that no method of the table has is refused."""
    flags = ("--layers", "5,6", "--no-phi-bias", "--n-ctx=3", "--ctx-init", "none", "--lr", "0.5")
    plan = plan_of("table1", *flags, methods=("lamp", "coop", "zeroshot"), imb=(10,), seeds=(1,))
    settings = {job.settings.method: job.settings for job in plan.every_job()}
    assert (settings["lamp"].own.layers, settings["lamp"].own.phi_bias) == ((5, 6), False)
    assert (settings["coop"].own.n_ctx, settings["coop"].own.ctx_init) == (3, None)
    assert {each.optim.lr for each in settings.values()} == {0.5}
    with pytest.raises(InputError, match="--depth: --method lamp has no such flag"):
        plan_of("table1", "--depth", "3", methods=("lamp",), imb=(10,), seeds=(1,))


def test_flags_come_between_the_preset_and_the_table():
    plan = plan_of("table11", "--lr", "0.5", "--batch", "8", epochs=2, seeds=(1,))
    job = plan.jobs["imb 10", "m = 12".upper(), "digits", 1]
    settings = job.settings
    assert (settings.optim.lr, settings.optim.batch, settings.optim.epochs) == (0.5, 8, 2)
    assert (settings.own.m, settings.own.k, settings.data.imb) == (12, 2, 10)
    assert settings.clip.clip == "tiny"
    assert any("--lr 0.5 --batch 8" in remark for remark in plan.remarks)


def test_few_shots_are_parts_of_table_2():
    plan = plan_of("table2", methods=("lamp",), shots=(1, 4), seeds=(1,))
    assert [panel.title for panel in plan.table.panels] == ["1 shot", "4 shots"]
    assert {(job.settings.data.shots, job.settings.data.imb) for job in plan.every_job()} == {
        (1, 1.0), (4, 1.0),
    }  # fmt: skip


def test_targets_are_scored_without_training_again():
    options = {"source": "digits", "data": ("digits", "Caltech-101"), "root": Path("/nowhere")}
    plan = plan_of("table3", methods=("lamp",), seeds=(1,), **options)
    every = list(plan.every_job())
    assert all(job.settings.data.split == "all" and job.settings.data.imb == 100 for job in every)
    assert {job.target and job.target.data for job in every} == {None, "caltech101"}
    assert len({job.trained for job in every}) == 2  # LAMP and LAMP+LA
    assert plan.table.averaged == ()  # one target


def test_a_timed_metric_is_a_job_that_needs_the_run():
    plan = plan_of("table5", methods=("lamp",), seeds=(1,))
    tasks = [Identities().task(job) for job in plan.every_job()]
    assert [task.needs for task in tasks[:2]] == [(), (tasks[0].address,)]


def test_rows_deeper_than_the_clip_are_left_out_or_refused():
    plan = plan_of("figure3c", seeds=(1,))
    assert [row.title for row in plan.table.rows if row.reading == "method"] == ["layers = 1..6"]
    assert sum("the CLIP has 6 layers" in remark for remark in plan.remarks) == 8
    with pytest.raises(InputError, match=r"has 6 layers, fewer than 6\.\.12"):
        plan_of("table7", preset="ablation-best")


def test_rows_of_methods_that_are_not_there_are_left_out_with_a_remark(monkeypatch):
    for name in METHODS.keys() - {"lamp", "zeroshot"}:
        monkeypatch.delitem(METHODS, name)
    plan = plan_of("table1", seeds=(1,))
    assert {row.method for row in plan.table.rows} == {"lamp", "zeroshot"}
    assert plan.remarks[0].startswith("Not implemented, so left out: CoOp+LA, CoCoOp+LA, LFA")


def test_another_method_of_the_registry_joins_a_table(monkeypatch):
    monkeypatch.setitem(METHODS, "mine", replace(METHODS["coop"], title="Mine"))
    plan = plan_of("table1", methods=("lamp", "mine"), imb=(10,), seeds=(1,))
    assert plan.table.rows[-1].title == "Mine+LA"
    assert plan.jobs["imb 10", "Mine+LA", "digits", 1].settings.optim.logit_adjustment
    assert "Not in the published table: Mine+LA." in plan.remarks
    assert not any("Not in the published" in each for each in plan_of("table1", seeds=(1,)).remarks)


@pytest.mark.parametrize("method", ["promptsrc", "mmrl", "mmrl++"])
def test_recent_methods_join_the_tables_as_rows_that_the_paper_lacks(method):
    """With their own published settings of the data set, and without a figure beside them."""
    plan = plan_of("table1", methods=(method,), imb=(10,), seeds=(1,), data=("dtd",))
    (job,) = plan.jobs.values()
    own = METHODS[method].presets[method].own_for("dtd")
    assert {name: getattr(job.settings.own, name) for name in own} == own
    (row,) = plan.table.rows
    assert row.paper is None
    assert plan.remarks[0] == f"Not in the published table: {METHODS[method].title}+LA."


def test_a_length_that_the_data_decide_is_the_same_job_everywhere():
    """CLIP-LoRA's and 2SFS's epochs are not known before the data are; the steps a shot are."""
    plan = plan_of("table1", methods=("clip-lora", "2sfs"), imb=(10,), seeds=(1,))
    lora, staged = (
        plan.jobs["imb 10", title, "digits", 1] for title in ("CLIP-LoRA+LA", "2SFS+LA")
    )
    assert (lora.settings.optim.epochs, lora.settings.own.steps_per_shot) == (None, 500)
    assert (staged.settings.optim.epochs, staged.settings.own.steps_per_shot) == (None, 300)
    assert from_saved(to_saved(lora.settings), "task") == lora.settings
    given = plan_of("table1", methods=("2sfs",), imb=(10,), seeds=(1,), epochs=3)
    assert {job.settings.optim.epochs for job in given.every_job()} == {3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"table": "table8"}, "table8: expected one of table1"),
        ({"methods": ("dreams",)}, "--methods dreams: expected some of lamp"),
        ({"table": "table7", "methods": ("zeroshot",)}, "table7 has lamp alone"),
        ({"shots": (4,)}, "--shots 4: table1 has no such parts"),
        ({"table": "table2", "imb": (4,)}, "--imb 4: table2 has no such parts"),
        ({"source": "digits"}, "--source digits: expected table3 or table4"),
        ({"seeds": ()}, "--seeds: expected at least one"),
        ({"imb": (0.5,)}, "--imb 0.5: expected at least 1"),
        ({"preset": "dreams"}, "--preset dreams: expected one of"),
        ({"clip": "dreams"}, "dreams"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(options, message):
    with pytest.raises(InputError, match=message) as caught:
        plan_of(**{"table": "table1", **options})
    assert "\n" not in str(caught.value)


# --- addresses -------------------------------------------------------------------------------

BASE = change(
    apply_preset(TrainConfig(clip=ClipConfig("tiny")), "tiny"),
    {"data": TrainConfig().data.resolved(), "seed": 3},
)


def address(config, target=None, codes=None):
    return Identities(codes or {}).task(Job(config, target)).address


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 4},
        {"lamp.k": 3},
        {"optim.lr": 1e-4},
        {"data.imb": 20.0},
        {"data.template": "a scan of {}."},
        {"machine.precision": "bf16"},
        {"clip.clip": "ViT-S-32", "clip.pretrained": "random"},
    ],
)
def test_what_changes_a_result_changes_the_address(changes, monkeypatch):
    if "clip.clip" in changes:
        clip, depth = identity.describe_clip(BASE.clip)
        other = replace(clip, fingerprint="0" * 64)
        monkeypatch.setattr(
            identity,
            "describe_clip",
            lambda asked: ((clip if asked == BASE.clip else other), depth),
        )
    assert address(change(BASE, changes)) != address(BASE)


@pytest.mark.parametrize(
    "changes",
    [
        {"out": "elsewhere"},
        {"preset": None},
        {"machine.device": "cuda"},
        {"machine.threads": 7},
        {"machine.test_batch": 3},
        {"trim.block": 100},
        {"tensorboard": True},
    ],
)
def test_what_changes_nothing_does_not(changes):
    assert address(change(BASE, changes)) == address(BASE)


def test_zero_shot_depends_on_nothing_that_is_drawn_or_trained():
    zero = replace(BASE, method="zeroshot", own=None)
    for changes in ({"seed": 9}, {"data.imb": 50.0}, {"optim.epochs": 3}, {"data.cap": None}):
        assert address(change(zero, changes)) == address(zero)
    assert address(change(zero, {"data.split": "all"})) != address(zero)
    assert "lamp" not in read_settings(zero)


def test_a_score_has_an_address_of_its_own_and_needs_its_run():
    target = replace(BASE.data, split="all")
    task = Identities().task(Job(BASE, target))
    assert task.needs == (address(BASE),)
    assert task.address != address(BASE)


def test_the_data_are_their_listing(tmp_path):
    from PIL import Image

    for name, part in product("ab", ("train", "test")):
        folder = tmp_path / part / name
        folder.mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")
    data = replace(BASE.data, data="folder", root=tmp_path, split="all").resolved()
    before = identity.data_identity(data)
    identity._data_identity.cache_clear()
    assert identity.data_identity(replace(data, imb=7.0, shots=1)) == before
    (tmp_path / "train" / "a" / "0.png").rename(tmp_path / "train" / "a" / "7.png")
    identity._data_identity.cache_clear()
    assert identity.data_identity(data) != before


def test_two_methods_of_one_file_depend_on_it(tmp_path, monkeypatch):
    for name in ("lift.py", "coop.py"):
        (tmp_path / "lamp_fast" / "methods").mkdir(parents=True, exist_ok=True)
        (tmp_path / "lamp_fast" / "methods" / name).write_text("x = 1\n")
    monkeypatch.setattr(identity.lamp_fast, "__file__", str(tmp_path / "lamp_fast" / "__init__.py"))

    def identities():
        code_identity.cache_clear()
        return [code_identity(method) for method in ("lift", "lift+", "coop")]

    try:
        before = identities()
        (tmp_path / "lamp_fast" / "methods" / "lift.py").write_text("x = 2\n")
        now = identities()
        assert [one != other for one, other in zip(now, before, strict=True)] == [True, True, False]
    finally:
        code_identity.cache_clear()


def test_code_counts_but_for_other_methods_and_what_makes_tables(tmp_path, monkeypatch):
    for name in ("clip/towers.py", "methods/lamp/model.py", "methods/other.py",
                 "methods/settings/other.py", "report/page.py", "reproduce/render.py",
                 "runs/config.py"):  # fmt: skip
        (tmp_path / "lamp_fast" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "lamp_fast" / name).write_text("x = 1\n")
    monkeypatch.setattr(identity.lamp_fast, "__file__", str(tmp_path / "lamp_fast" / "__init__.py"))
    # Two that share a file, which bears the name of neither.
    for name in ("one", "one+"):
        monkeypatch.setitem(METHODS, name, replace(METHODS["zeroshot"], model="other.One"))

    def identities():
        code_identity.cache_clear()
        both = code_identity("one")
        assert code_identity("one+") == both
        return [code_identity("lamp"), both]

    before = identities()
    try:
        assert before[0] != before[1]
        for name, changed in (
            ("clip/towers.py", [True, True]),
            ("methods/lamp/model.py", [True, False]),
            ("methods/other.py", [False, True]),
            ("methods/settings/other.py", [False, True]),
            ("methods/new.py", [True, True]),  # shared by methods, for all that is known
            ("report/page.py", [False, False]),
            ("reproduce/render.py", [False, False]),
            ("runs/config.py", [False, False]),
        ):
            file = tmp_path / "lamp_fast" / name
            content = file.read_text() if file.exists() else ""
            file.write_text(content + "y = 2\n")
            now = identities()
            assert [one != other for one, other in zip(now, before, strict=True)] == changed, name
            before = now
        kernel = tmp_path / "kernels" / "retrieve.py"
        kernel.parent.mkdir()
        kernel.write_text("z = 3\n")
        assert all(one != other for one, other in zip(identities(), before, strict=True))
    finally:
        monkeypatch.undo()
        code_identity.cache_clear()


def test_older_code_counts_where_it_is_asked_for():
    assert address(BASE, codes={"lamp": "then"}) != address(BASE)
    assert address(BASE, codes={"lamp": code_identity("lamp")}) == address(BASE)


# --- the paper's figures ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "printed"),
    [
        (("table1", "imb 10", "LAMP", "imagenet", "hm_a"), 72.96),
        (("table1", "imb 50", "Candle", "ucf101", "hm_m"), 74.00),
        (("table1", "imb 20", "TCP+LA", "caltech101", "hm_a"), 97.78),
        (("table2", "16 shots", "MMA", "caltech101", "acc_new"), 94.67),
        (("table2", "8 shots", "LAMP", "stanford_cars", "hm_a"), 93.77),
        (("table2", "1 shot", "CoOp", "eurosat", "hm_a"), 54.93),
        (("table3", "imb 100", "LAMP", "dtd", "f1"), 40.62),
        (("table4", "imb 100", "LAMP", "imagenet_sketch", "f1"), 48.79),
        (("table4", "imb 100", "MMA+LA", "imagenetv2", "acc"), 63.55),
        (("table5", "imb 10", "LAMP", "eurosat", "parameters"), 470_000),
        (("table6", "imb 10", "MPP+LBO", "food101", "hm_m"), 90.84),
        (("table7", "imb 10", "0.20", "imagenet", "hm_mean"), 69.25),
        (("table9", "imb 100", "Candle", "fgvc_aircraft", "hm_a"), 37.90),
        (("table10", "imb 200", "MaPLe+LA", "food101", "hm_a"), 88),
        (("table11", "imb 10", "25", "imagenet", "hm_a"), 73.00),
        (("table11", "imb 10", "99", "imagenet", "hm_a"), None),
        (("figure3a", "imb 10", None, "imagenet", "hm_mean"), None),
    ],
)
def test_figures_are_those_that_the_paper_prints(where, printed):
    assert paper.paper_figure(*where) == printed


def printed_averages(table):
    """(panel, row, metric, mean of the data sets, printed average) of every printed average."""
    for panel, rows in PAPER[table].items():
        for name, row in rows.items():
            for metric, average in row["average"].items():
                values = [v[metric] for column, v in row.items() if column != "average"]
                yield panel, name, metric, np.mean(values), average


# Two decimals each: the mean of rounded figures is off by at most 0.005, its rounding by as much.
ROUNDING = 0.0101


@pytest.mark.parametrize(
    ("table", "odd"),
    [
        ("table1", set()),
        ("table2", {
            ("16 shots", "TCP"), ("16 shots", "MMA"), ("4 shots", "MaPLe"), ("8 shots", "CoOp"),
            ("8 shots", "CoCoOp"), ("8 shots", "MaPLe"), ("8 shots", "MMA"),
        }),
        ("table9", set()),
        ("table10", set()),
    ],
)  # fmt: skip
def test_printed_averages_are_means_but_for_those_with_a_footnote(table, odd):
    off = {
        (panel, row)
        for panel, row, _, mean, printed in printed_averages(table)
        if abs(mean - printed) > ROUNDING
    }
    assert off == odd
    noted = {(note.get("panel"), note.get("row")) for note in paper.footnotes(table)}
    assert odd <= noted


def test_the_note_on_table_5_counts_parameters_as_the_package_does(monkeypatch):
    """And, beside them, b as it is printed: R^{M x D}, once a modality and layer."""
    shapes = parameters.shapes_of("ViT-B-16")
    monkeypatch.setattr(parameters, "shapes_of", lambda name: shapes)
    config = apply_preset(TrainConfig(), TABLES["table5"].preset)
    counts = {}
    for phi in ("mlp", "linear"):
        own = replace(config.own, phi=phi)
        first, *_ = parameters.parameter_lines(replace(config, own=own))
        counts[phi] = int(first.rpartition(" ")[2])
    printed_bias = 2 * len(own.layers) * own.m * own.d
    (note,) = (
        each["text"]
        for each in paper.footnotes("table5")
        if each.get("row") == "LAMP" and each.get("metric") == "parameters"
    )
    assert f"D={own.d}, layers 3..12, M={own.m}, S={own.s} give {counts['mlp']:,} " in note
    assert f"({counts['linear']:,} with --phi linear)" in note
    assert f"{counts['mlp'] + printed_bias:,} with the printed bias" in note


def test_the_known_oddities_are_there():
    # Table 6's CLIP is Table 1's CoOp+LA.
    for column, figures in PAPER["table6"]["imb 10"]["CLIP"].items():
        assert figures == PAPER["table1"]["imb 10"]["CoOp+LA"][column]
    # Table 6's and Table 11's best rows are Table 1's LAMP.
    best_row = PAPER["table1"]["imb 10"]["LAMP"]["imagenet"]
    assert PAPER["table6"]["imb 10"]["MPP+MSP+LBO"]["imagenet"] == best_row
    assert PAPER["table11"]["imb 10"]["20"]["imagenet"] == best_row
    # Table 7's average at beta = 0.2 is the only one that is not a mean.
    odd = [
        beta
        for beta, row in PAPER["table7"]["imb 10"].items()
        if abs((row["imagenet"]["hm_a"] + row["imagenet"]["hm_m"]) / 2 - row["imagenet"]["hm_mean"])
        > ROUNDING
    ]
    assert odd == ["0.20"]
    # HM-M above HM-A once in Table 1.
    above = [
        (panel, row, column)
        for panel, rows in PAPER["table1"].items()
        for row, columns in rows.items()
        for column, figures in columns.items()
        if figures["hm_m"] > figures["hm_a"]
    ]
    assert above == [("imb 10", "LAMP", "stanford_cars")]
    # Table 5's HM-A and HM-M are Table 1's averages.
    for row, of in (("MaPLe", "MaPLe+LA"), ("MMA", "MMA+LA"), ("LAMP", "LAMP")):
        figures = PAPER["table5"]["imb 10"][row]["eurosat"]
        average = PAPER["table1"]["imb 10"][of]["average"]
        assert {name: figures[name] for name in average} == average


def test_table_3_averages_with_the_source_in_it():
    for _, row, _, mean, printed in printed_averages("table3"):
        assert abs(mean - printed) <= ROUNDING, row


def test_table_2_fits_once_two_rows_are_exchanged_from_food101_on():
    rows = PAPER["table2"]["16 shots"]
    second = ["food101", "fgvc_aircraft", "sun397", "dtd", "eurosat", "ucf101"]
    for one, other in (("TCP", "MMA"), ("MMA", "TCP")):
        for metric in ("acc_base", "acc_new"):
            values = [
                rows[other if column in second else one][column][metric]
                for column in rows[one]
                if column != "average"
            ]
            assert abs(np.mean(values) - rows[one]["average"][metric]) <= ROUNDING


def test_table_2_harmonic_means_belong_to_their_columns():
    odd = []
    for row, columns in PAPER["table2"]["16 shots"].items():
        for column, figures in columns.items():
            off = abs(harmonic_mean(figures["acc_base"], figures["acc_new"]) - figures["hm_a"])
            if column != "average" and off > 0.1:
                odd.append((row, column))
    assert odd == [("MaPLe", "oxford_pets")]


def test_every_footnote_is_about_a_figure():
    for table in PAPER:
        for note in paper.footnotes(table):
            assert any(
                render._is_about(note, (panel, "", column, metric), row)
                for panel, rows in PAPER[table].items()
                for row, columns in rows.items()
                for column, figures in columns.items()
                for metric in figures
            ), note


# --- statistics ------------------------------------------------------------------------------


def test_mean_and_spread():
    assert stats.mean((1.0, 2.0, 6.0)) == 3
    assert stats.spread((1.0, 2.0, 6.0)) == pytest.approx(math.sqrt(7))  # (4 + 1 + 9) / 2
    assert stats.spread((1.0,)) is None
    assert stats.mean(()) is None


def test_the_permutation_test_counts_sign_flips():
    """Differences 1, 2, 4 on one data set: of 8 sign patterns only +++ and --- reach 7."""
    first = {("a", seed): value for seed, value in enumerate((11.0, 12.0, 14.0))}
    second = {("a", seed): 10.0 for seed in range(3)}
    test = paired_test(first, second)
    assert (test.difference, test.pairs, test.data_sets) == (pytest.approx(7 / 3), 3, 1)
    assert test.p_pairs == pytest.approx(2 / 8)
    assert test.p_data_sets is None


def test_data_sets_weigh_alike_however_many_seeds_they_have():
    first = {("a", 1): 3.0, ("a", 2): 3.0, ("a", 3): 3.0, ("b", 1): 1.0, ("c", 1): 9.0}
    second = {("a", 1): 0.0, ("a", 2): 0.0, ("a", 3): 0.0, ("b", 1): 0.0}
    test = paired_test(first, second)
    assert (test.difference, test.pairs, test.data_sets) == (2.0, 4, 2)


def test_over_data_sets_it_is_wilcoxon_of_their_means():
    rng = np.random.default_rng(0)
    keys = [(name, seed) for name in "abcdefgh" for seed in (1, 2)]
    first = dict(zip(keys, rng.normal(1, 1, 16), strict=True))
    second = dict(zip(keys, rng.normal(0, 1, 16), strict=True))
    means = [np.mean([first[n, s] - second[n, s] for s in (1, 2)]) for n in "abcdefgh"]
    assert paired_test(first, second).p_data_sets == pytest.approx(
        scipy.stats.wilcoxon(means).pvalue
    )


def test_what_does_not_differ_has_no_p():
    same = {(name, 1): 1.0 for name in "abcdefgh"}
    test = paired_test(same, same)
    assert (test.difference, test.p_pairs, test.p_data_sets) == (0, None, None)
    assert paired_test(same, {("z", 1): 1.0}) is None
    assert paired_test({("a", 1): 2.0}, {("a", 1): 1.0}).p_pairs is None


# --- cells and forms -------------------------------------------------------------------------


def outcome(run, hm_a, transductive=None, **figures):
    def row(value):
        return {"acc_base": value, "acc_new": value, "hm_a": value, "hm_m": value - 0.1,
                "f1_base": value}  # fmt: skip

    rows = {"method": row(hm_a)}
    if transductive is not None:
        rows["transductive"] = row(transductive)
    return {"run": run, "rows": rows, "figures": figures}


@pytest.fixture
def small():
    """Table 1 at two data sets and seeds; seed 2 of LAMP on the second data set has failed."""
    options = {"methods": ("zeroshot", "lamp"), "imb": (10,), "seeds": (1, 2)}
    plan = plan_of("table1", data=("digits", "caltech101"), root=Path("/nowhere"), **options)

    def outcomes(job):
        settings = job.settings
        if settings.method == "zeroshot":
            return outcome(f"zero-{settings.data.data}", 0.5)
        if settings.optim.logit_adjustment:
            return None
        at = settings.data.data, settings.seed
        values = {("digits", 1): 0.8, ("digits", 2): 0.9, ("caltech101", 1): 0.4}
        if at not in values:
            return None
        return outcome(f"lamp-{at[0]}-{at[1]}", values[at], transductive=0.99)

    return plan, read_cells(plan, outcomes)


def test_cells_hold_means_spreads_and_where_they_come_from(small):
    _, cells = small
    cell = cells["imb 10", "LAMP", "digits", "hm_a"]
    assert (cell.mean, cell.spread) == (pytest.approx(85), pytest.approx(math.sqrt(50)))
    assert cell.runs == {1: ("lamp-digits-1",), 2: ("lamp-digits-2",)}
    zero = cells["imb 10", "CLIP", "digits", "hm_a"]
    assert (zero.mean, zero.spread, zero.missing) == (50, None, 0)
    caltech = cells["imb 10", "LAMP", "caltech101", "hm_a"]
    assert (caltech.mean, caltech.missing, caltech.paper) == (pytest.approx(40), 1, 97.58)
    average = cells["imb 10", "LAMP", "average", "hm_a"]
    assert (average.by_seed, average.missing) == ({1: pytest.approx(60)}, 1)
    assert average.runs == {1: ("lamp-digits-1", "lamp-caltech101-1")}
    assert average.paper is None  # not the paper's data sets
    assert cells["imb 10", "LAMP+LA", "digits", "hm_a"].mean is None
    marked = cells["imb 10", f"LAMP, {tables.MARK}", "digits", "hm_a"]
    assert marked.mean == pytest.approx(99)


def test_the_best_of_a_column_has_seen_no_new_picture(small):
    plan, cells = small
    found = best(plan, cells)
    assert ("imb 10", "LAMP", "digits", "hm_a") in found
    assert ("imb 10", "CLIP", "caltech101", "hm_a") in found
    assert not any("transductive" in row for _, row, _, _ in found)


def test_metrics_come_in_the_unit_that_is_shown():
    given = outcome("run", 0.8, parameters=1234, training_bytes=3 * 2**20)
    metric = {each.key: each for each in (*tables.EFFICIENCY, *tables.TRANSFER, tables.HM_MEAN)}
    read = {key: results.read_metric(each, "method", given) for key, each in metric.items()
            if key in ("parameters", "training_bytes", "acc", "hm_mean")}  # fmt: skip
    assert read == {"parameters": 1234, "training_bytes": 3, "acc": pytest.approx(80),
                    "hm_mean": pytest.approx(75)}  # fmt: skip
    assert results.read_metric(tables.HM_A, "transductive", given) is None
    few, worst = tables.Metric("few", "Few"), tables.Metric("worst", "Worst", ("worst_base",))
    assert results.read_metric(few, "method", given) is None  # a run of 0.2.0 has none
    given["rows"]["method"] |= {"few": 0.25, "worst_base": 0.0}
    assert results.read_metric(few, "method", given) == 25
    assert results.read_metric(worst, "method", given) == 0


def test_markdown_latex_and_csv_as_written_by_hand(small):
    plan, cells = small
    pair = ("LAMP", "CLIP")
    rendered = render.Rendered(
        plan, cells, {pair: compare(plan, cells, *pair)}, ["A remark & more."],
        [render.Drawn("imb 10", "Digits", 100, 195, 91, 9)],
    )  # fmt: skip
    markdown = render.markdown(rendered).splitlines()
    assert markdown[0] == "# Table 1: Long-tailed base-to-new generalisation"
    lines = [[part.strip() for part in line.strip("|").split("|")] for line in markdown]
    assert ["", "Digits<br>HM-A", "Digits<br>HM-M", "Caltech101<br>HM-A", "Caltech101<br>HM-M",
            "Average<br>HM-A", "Average<br>HM-M"] in lines  # fmt: skip
    assert ["LAMP", "**85.00** ± 7.07", "**75.00** ± 7.07",
            "40.00 (1 of 2 seeds) (paper 97.58)", "30.00 (1 of 2 seeds) (paper 92.91)",
            "**60.00** (1 of 2 seeds)", "**50.00** (1 of 2 seeds)"] in lines  # fmt: skip
    assert ["LAMP+LA", "-", "-", "-", "-", "-", "-"] in lines
    # Over digits seeds 1 and 2 and Caltech101 seed 1: ((30 + 40) / 2 - 10) / 2.
    assert ["LAMP", "CLIP", "imb 10", "HM-A", "+12.50", "3 / 2", "0.5000", "n/a"] in lines
    assert ["Digits", "imb 10", "100", "195", "91", "9", "10.11"] in lines
    assert "A remark & more." in markdown

    tex = render.latex(rendered)
    assert (
        "LAMP & \\textbf{85.00} $\\pm$ 7.07 & \\textbf{75.00} $\\pm$ 7.07 & 40.00 [1/2] (97.58) &"
        " 30.00 [1/2] (92.91) & \\textbf{60.00} [1/2] & \\textbf{50.00} [1/2] \\\\"
    ) in tex.splitlines()
    assert "imb 10 & \\multicolumn{2}{c}{Digits} & \\multicolumn{2}{c}{Caltech101} &" in tex
    assert "\\cmidrule(lr){2-3}\\cmidrule(lr){4-5}\\cmidrule(lr){6-7}" in tex
    assert "A remark \\& more.\\par" in tex
    assert tex.count("\\begin{tabular}{lcccccc}") == tex.count("\\end{tabular}") == 1

    header, body = render.flat(rendered)
    row = next(each for each in body if each[2:6] == ["LAMP", "lamp", "digits", "hm_a"])
    assert dict(zip(header, row, strict=True)) == {
        "table": "table1", "panel": "imb 10", "row": "LAMP", "method": "lamp",
        "column": "digits", "metric": "hm_a", "unit": "%", "mean": "85.0000", "std": "7.0711",
        "seeds": 2, "paper": "",
    }  # fmt: skip
    record = render.record(rendered)
    cell = next(each for each in record["cells"] if each["row"] == "LAMP"
                and (each["column"], each["metric"]) == ("digits", "hm_a"))  # fmt: skip
    assert cell["seeds"]["2"] == {"value": pytest.approx(90), "runs": ["lamp-digits-2"]}
    json.dumps(record)


def test_a_footnote_stands_where_its_figure_is():
    plan = plan_of("table6", data=("imagenet",), root=Path("/nowhere"), seeds=(1,))
    cells = read_cells(plan, lambda job: outcome("run", 0.5))
    rendered = render.Rendered(plan, cells, {}, [])
    markdown = render.markdown(rendered)
    assert "(paper 68.05 [1])" in markdown
    assert "(paper 70.05)" in markdown
    assert '[1] The paper\'s row "CLIP" repeats' in markdown
    assert "50.00 (68.05$^{1}$)" in render.latex(rendered).replace("\\textbf{50.00}", "50.00")


@pytest.mark.parametrize("figure", ["figure3a", "figure3b", "figure3d"])
def test_figures_are_drawn_also_where_runs_are_missing(figure, tmp_path):
    plan = plan_of(figure, seeds=(1, 2))

    def outcomes(job):
        missing = job.settings.own.k == 4 or job.settings.own.d == 64
        value = 0.5 + job.settings.seed / 100
        return None if missing else outcome("run", value, transductive=value)

    rendered = render.Rendered(plan, read_cells(plan, outcomes), {}, [])
    assert all(file.stat().st_size for file in render.write_table(rendered, tmp_path))
    drawing = render.draw(rendered, plan.table.plot)
    panels = 2 if figure == "figure3a" else 1
    assert len(drawing.axes) == panels
    assert len(drawing.axes[0].lines) == (0 if figure == "figure3a" else 4)


# --- the cluster and the whole ---------------------------------------------------------------


def test_workers_go_through_submitit(tmp_path):
    pytest.importorskip("submitit", reason="the cluster extra is not installed")

    def command(job, attempt):
        if job.name == "f":
            return ["false"]
        file = f"{job}/attempt-{attempt}/outcome.json"
        return ["sh", "-c", f"echo x >> {job}/did; echo '{{}}' > {file}"]

    queue = Queue(tmp_path, command, Timing(poll=0.01, scan=0.05))
    tasks = [Task(each, f"job {each}") for each in "abcf"]
    failures = run_on_cluster(
        queue, tasks, workers=2, cluster="local", parameters=["timeout_min=5"]
    )
    assert [(each.task.address, each.reason) for each in failures] == [("f", "exit code 1")]
    for each in "abc":
        assert (queue.job_folder(each) / "did").read_text() == "x\n"


@pytest.mark.parametrize(
    ("parameters", "message"),
    [(["timeout_min"], "expected NAME=VALUE"), (["dreams=1"], "--submit dreams=1")],
)
def test_submitits_parameters_are_checked(tmp_path, parameters, message):
    pytest.importorskip("submitit", reason="the cluster extra is not installed")
    queue = Queue(tmp_path, lambda job, attempt: ["true"])
    with pytest.raises(InputError, match=message):
        run_on_cluster(queue, [], workers=1, cluster="local", parameters=parameters)
    assert not (tmp_path / "jobs").exists()


@pytest.mark.slow
def test_a_table_from_one_command(tmp_path, capsys):
    """Real runs: digits, one epoch, one seed, two methods; then again, from what is there."""
    command = ["table2", "--clip", "tiny", "--preset", "tiny", "--data", "digits", "--seeds", "1",
               "--epochs", "1", "--methods", "zeroshot", "lamp", "--out", str(tmp_path), "--",
               "--adapt-passes", "1"]  # fmt: skip
    own, flags = split_flags(command)
    config = cli.parse(ReproduceConfig, own)
    assert main(config, flags) == 0
    assert capsys.readouterr().out.count("done: ") == 2
    record = json.loads((tmp_path / "tables" / "table2.json").read_text())
    cells = {(each["row"], each["metric"]): each for each in record["cells"]}
    for row, reading in (("CLIP", 0), ("LAMP", 1), (f"LAMP, {tables.MARK}", 2)):
        seed = cells[row, "hm_a"]["seeds"]["1"]
        run = tmp_path / "jobs" / seed["runs"][0]
        assert seed["value"] == 100 * json.loads((run / "result.json").read_text())[reading]["hm_a"]
        saved = json.loads((run / "config.json").read_text())["settings"]
        assert saved[saved["method"]].get("adapt_passes") == (None if row == "CLIP" else 1)
    assert record["drawn"] == [{"panel": "16 shots", "data": "Digits", "cap": None,
                                "pictures": 80, "most": 16, "least": 16}]  # fmt: skip
    assert "**Not comparable with the paper.**" in (tmp_path / "tables" / "table2.md").read_text()
    with open(tmp_path / "tables" / "table2.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 3 * 3

    assert main(config, flags) == 0
    printed = capsys.readouterr().out
    assert "2 jobs, 2 done" in printed
    assert "done: " not in printed


@pytest.mark.slow
def test_a_run_goes_on_where_another_worker_left_it(tmp_path):
    """The second epoch of a run whose worker died: the same weights as without the death."""
    config = change(
        BASE, {"optim.epochs": 2, "data.shots": 2, "data.imb": 1.0, "lamp.adapt_passes": 1}
    )
    task = Identities().task(Job(config))
    write_json(tmp_path / "task.json", {"needs": [], **task.content})
    earlier = tmp_path / "attempt-1" / "run"
    whole = tmp_path / "attempt-9" / "run"
    with contextlib.redirect_stdout(io.StringIO()):
        assert train.main(replace(config, out=whole)) == 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(Trainer, "run", stop_after_one_epoch)
        with pytest.raises(KeyboardInterrupt):
            train.main(replace(config, out=earlier))
    assert not (earlier / "learned.safetensors").exists()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert attempt.main(attempt.AttemptConfig(tmp_path, 2)) == 0
    assert "resume  after epoch 1 of 2" in printed.getvalue()
    outcome = json.loads((tmp_path / "attempt-2" / "outcome.json").read_text())
    assert outcome["rows"].keys() == {"zeroshot", "method", "transductive"}
    content = [(tmp_path / f"attempt-{each}" / "run" / "learned.safetensors") for each in (2, 9)]
    one, other = (load_tensors(each)[0] for each in content)
    assert all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


def test_a_trained_run_is_scored_on_its_own_and_on_other_pictures(tmp_path):
    from PIL import Image

    for name, part, number in product(("zero", "one"), ("train", "test"), range(3)):
        file = tmp_path / "pictures" / part / name / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (80 * number, 40, 200 if name == "one" else 0)).save(file)
    changes = {"optim.epochs": 1, "data.shots": 1, "data.imb": 1.0, "data.split": "all"}
    config = change(BASE, changes)
    run = tmp_path / "jobs" / "trained" / "attempt-1" / "run"
    other = replace(BASE.data, data="folder", root=tmp_path / "pictures", split="all")
    with contextlib.redirect_stdout(io.StringIO()):
        assert train.main(replace(config, out=run)) == 0
        own, on_other = (attempt._score(config, each, run) for each in (config.data, other))
        expected = transfer_rows(*load_run_on(run, other)[:1], 0.0)[1]
    saved = json.loads((run / "result.json").read_text())[1]
    for key in ("acc_base", "f1_base"):
        assert own["rows"]["method"][key] == saved[key]
    assert own["figures"]["inference_seconds"] > 0
    assert on_other["figures"]["inference_seconds"] is None
    assert on_other["rows"]["method"]["acc_base"] == expected.base.accuracy
    assert own["run"] == on_other["run"] == "trained/attempt-1/run"


def stop_after_one_epoch(trainer):
    trainer.progress.history.append(trainer._epoch(0))
    trainer.progress.epoch = 1
    trainer.save()
    raise KeyboardInterrupt
