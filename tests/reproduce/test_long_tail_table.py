"""``reproduce lt``: the long-tail field's benchmarks, beside figures that others have published."""

import contextlib
import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import miniatures
import pytest

from lamp_fast import cli, train
from lamp_fast.clip.settings import ClipConfig
from lamp_fast.errors import InputError
from lamp_fast.jobs.identity import code_identity
from lamp_fast.reproduce import attempt, paper, render
from lamp_fast.reproduce.__main__ import main
from lamp_fast.reproduce.jobs import Identities
from lamp_fast.reproduce.plan import make_plan
from lamp_fast.reproduce.reproducing import remarks_on
from lamp_fast.reproduce.results import compare, read_cells
from lamp_fast.reproduce.settings import ReproduceConfig
from lamp_fast.reproduce.tables import TABLES
from lamp_fast.runs.config import change, default_config

LT = TABLES["lt"]
PANEL = "All classes"
CIFAR = tuple(f"cifar100_lt, imb {ratio}" for ratio in (100, 50, 10))
PUBLISHED = json.loads((Path(paper.__file__).parent / "long_tail.json").read_text())["tables"]["lt"]


def plan_of(*flags, **options):
    given = {"clip": "tiny", "preset": "tiny", "root": Path("/nowhere"), "seeds": (1,), **options}
    return make_plan(ReproduceConfig("lt", **given), flags)


def test_a_data_set_whose_tail_is_drawn_has_a_column_a_ratio():
    plan = plan_of(methods=("lift",))
    columns = {column.key: column.title for column in plan.table.columns}
    assert columns == {
        "cifar100_lt, imb 100": "CIFAR-100-LT, imb 100",
        "cifar100_lt, imb 50": "CIFAR-100-LT, imb 50",
        "cifar100_lt, imb 10": "CIFAR-100-LT, imb 10",
        "imagenet_lt": "ImageNet-LT",
        "places_lt": "Places-LT",
        "inaturalist2018": "iNaturalist 2018",
    }
    drawn = {key: plan.jobs[PANEL, "LIFT", key, 1].settings.data for key in columns}
    assert [each.imb for each in drawn.values()] == [100, 50, 10, 1, 1, 1]
    assert {(each.split, each.cap) for each in drawn.values()} == {("all", None)}
    epochs = [plan.jobs[PANEL, "LIFT", key, 1].settings.optim.epochs for key in columns]
    assert epochs == [10, 10, 10, 10, 10, 20]  # LIFT's own, which depend on the data


def test_imb_makes_columns_where_there_is_a_tail_to_draw():
    plan = plan_of(methods=("lift",), data=("places_lt", "cifar100_lt", "digits"), imb=(4, 20, 4))
    assert [column.key for column in plan.table.columns] == [
        "places_lt", "cifar100_lt, imb 4", "cifar100_lt, imb 20", "digits, imb 4",
        "digits, imb 20",
    ]  # fmt: skip
    with pytest.raises(InputError, match="--imb 4: places_lt are long-tailed as they are"):
        plan_of(data=("places_lt",), imb=(4,))


def test_the_edges_of_the_groups_are_printed():
    titles = [metric.title for metric in LT.metrics]
    assert titles[1:4] == ["many (> 100)", "medium (20..100)", "few (< 20)"]


def test_a_tables_defaults_come_before_flags_and_a_preset_of_ones_own():
    def settings(row, *flags, **options):
        plan = plan_of(*flags, data=("places_lt",), **options)
        return plan.jobs[PANEL, row, "places_lt", 1].settings

    probe = ("linear-probe",)
    assert settings("Linear probe", methods=probe).own.probe_c == 1
    balanced = settings("Linear probe, balanced", "--probe-c", "3", methods=probe).own
    assert (balanced.probe_c, balanced.probe_class_weight) == (3, "balanced")
    added = settings("Tip-Adapter", methods=("tip",)).own
    assert (added.tip_alpha, added.tip_beta) == (1.17, 1)
    assert settings("CoOp+LA", methods=("coop",)).optim.epochs == 10
    assert settings("CoOp+LA", methods=("coop",), epochs=2).optim.epochs == 2
    tiny = settings("LAMP+LA", methods=("lamp",)).optim
    assert (tiny.epochs, tiny.logit_adjustment) == (30, True)


def test_groups_of_zero_shot_clip_are_of_what_is_drawn_and_a_tte_is_a_score_of_its_run():
    plan = plan_of(data=("digits",), imb=(50, 10), methods=("zeroshot", "lift"), seeds=(1, 2))
    tasks = {key: Identities().task(job) for key, job in plan.jobs.items()}

    def address(row, imb, seed):
        return tasks[PANEL, row, f"digits, imb {imb}", seed].address

    assert address("CLIP", 50, 1) == address("CLIP", 50, 2) != address("CLIP", 10, 1)
    assert tasks[PANEL, "LIFT, TTE", "digits, imb 50", 2].needs == (address("LIFT", 50, 2),)
    assert address("LIFT, TTE", 50, 2) != address("LIFT", 50, 2)
    # Zero-shot CLIP twice, LIFT four times and its scores.
    assert len({Identities().task(job).address for job in plan.every_job()}) == 2 + 4 + 4


# --- what others have published ---------------------------------------------------------------


def test_every_published_figure_has_a_cell_and_a_footnote():
    assert PUBLISHED.keys() == {PANEL}
    rows = PUBLISHED[PANEL]
    assert rows.keys() == set(LT.paper_rows.values()) - {None}
    keys = {column.key for column in LT.columns}
    metrics = {metric.key for metric in LT.metrics}
    for row in rows.values():
        assert row.keys() <= keys
        assert all(figures.keys() <= metrics for figures in row.values())
    assert {note["row"] for note in paper.footnotes("lt")} == rows.keys()


def test_errors_of_cifar_stand_as_accuracies():
    shown = [paper.paper_figure("lt", PANEL, "LIFT, TTE", key, "acc") for key in CIFAR]
    assert shown == pytest.approx([100 - error for error in (18.3, 16.9, 15.1)])


def test_figures_that_were_not_read_are_not_there():
    for row, column in (("LIFT, TTE", "inaturalist2018"), (None, "places_lt")):
        assert paper.paper_figure("lt", PANEL, row, column, "acc") is None
    assert LT.paper_rows["LIFT"] is LT.paper_rows["LIFT+, TTE"] is None


def outcome(job):
    row = {"acc_base": 0.5, "many": 0.75, "medium": None, "few": 0.25}
    # Accuracies weighed by class are those of the last two metrics.
    row |= {"balanced_base": 0.4375, "worst_base": 0.0}
    return {"run": job.settings.method, "rows": {"method": row}, "figures": {}}


def test_published_rows_stand_where_they_have_figures():
    plan = plan_of(methods=("lift",))
    rendered = render.Rendered(plan, read_cells(plan, outcome), {}, [])
    markdown = render.markdown(rendered)
    assert markdown.startswith("# Long-tailed recognition over all classes\n")
    lines = [
        [part.strip() for part in line.strip("|").split("|")]
        for line in markdown.splitlines()
        if line.startswith("|")
    ]
    start = [number for number, line in enumerate(lines) if line[0] == ""][1]
    drawn, natural = lines[:start], lines[start:]
    # Three columns of six figures beside each other.
    assert drawn[0][:3] == ["", "CIFAR-100-LT, imb 100<br>all",
                            "CIFAR-100-LT, imb 100<br>many (> 100)"]  # fmt: skip
    titles = ["LIFT", "LIFT, TTE"]
    assert [line[0] for line in drawn[2:]] == titles
    assert [line[0] for line in natural[2:]] == [*titles, "VL-LTR", "LPT"]
    tte = drawn[3]
    assert [tte[each] for each in (1, 2, 3, 4)] == [
        "**50.00** (published 81.70 [1])", "**75.00**", "-", "**25.00**",
    ]  # fmt: skip
    assert natural[0][7] == "Places-LT<br>all"
    assert natural[4][7] == "- (published 50.10 [2])"
    assert natural[5][7:11] == [
        "- (published 50.07 [3])", "- (published 49.27 [3])", "- (published 52.31 [3])",
        "- (published 46.88 [3])",
    ]  # fmt: skip
    assert "[2] README of ChangyaoTian/VL-LTR" in markdown
    assert "VL-LTR & -- (77.20$^{2}$) &" in render.latex(rendered)

    header, body = render.flat(rendered)
    cells = [dict(zip(header, line, strict=True)) for line in body]
    (cell,) = (each for each in cells if each["row"] == "LPT" and each["paper"] == 52.31)
    assert (cell["method"], cell["metric"], cell["mean"], cell["seeds"]) == ("", "medium", "", 0)
    json.dumps(render.record(rendered))


def test_published_rows_are_left_out_where_none_of_their_columns_is_shown():
    plan = plan_of(methods=("lift",), data=("digits",))
    markdown = render.markdown(render.Rendered(plan, read_cells(plan, outcome), {}, []))
    assert "VL-LTR" not in markdown
    assert "published" not in markdown


def test_a_data_set_at_several_ratios_is_one_for_a_paired_test():
    """LIFT is 10 better on CIFAR-100-LT at each of three ratios, 4 worse on Places-LT."""
    plan = plan_of(methods=("lift", "ss-text"), data=("cifar100_lt", "places_lt"), seeds=(1, 2))

    def found(job):
        gain = 0.1 if job.settings.data.data == "cifar100_lt" else -0.04
        row = {"acc_base": 0.5 + gain * (job.settings.method == "lift")}
        return {"run": f"{job.settings.seed}", "rows": {"method": row}, "figures": {}}

    tests = compare(plan, read_cells(plan, found), "LIFT", "SS-Text")
    test = tests[PANEL, "acc"]
    assert (test.pairs, test.data_sets) == (3 * 2 + 2, 2)
    assert test.difference == pytest.approx((10 - 4) / 2)
    assert tests[PANEL, "many"] is None


def test_methods_that_also_read_validation_pictures_raise_no_alarm():
    """LP++ reads more of Places-LT than LIFT; two that read the same must find the same."""
    plan = plan_of(methods=("lift", "lift+", "lp++"), data=("places_lt",))

    def remarks(**hashes):
        record = {"commit": "c", "torch": "t", "precision": "fp32", "device": "d"}
        found = {
            job: {"record": {**record, "data_sha256": hashes[job.settings.method]}}
            for job in plan.jobs.values()
        }
        return "\n".join(remarks_on(plan, list(found.values()), found))

    assert "changed between runs" not in remarks(**{"lift": "a", "lift+": "a", "lp++": "b"})
    assert "changed between runs" in remarks(**{"lift": "a", "lift+": "b", "lp++": "c"})


# --- runs -------------------------------------------------------------------------------------


def test_a_score_on_five_crops_is_one_pass_over_five_crops(tmp_path, monkeypatch):
    miniatures.cifar100_lt(tmp_path)
    base = default_config({"method": "ss-text", "data": "cifar100_lt", "clip": "tiny"})
    data = replace(base.data, data="cifar100_lt", root=tmp_path, imb=4.0)
    config = change(base, {"data": data.resolved(), "clip": ClipConfig("tiny")})
    run = tmp_path / "jobs" / "trained" / "attempt-1" / "run"
    seen, score = [], attempt.score_method

    def spy(experiment, *arguments):
        seen.append((experiment.config.views.tte, experiment.test_transform.views))
        return score(experiment, *arguments)

    with contextlib.redirect_stdout(io.StringIO()):
        assert train.main(replace(config, out=run)) == 0
        monkeypatch.setattr(attempt, "score_method", spy)
        found = attempt._score(config, config.data, run, tte=True)
    ((tte, views),) = seen
    assert (tte, type(views).__name__) == (True, "FiveCrops")
    assert found["figures"]["inference_seconds"] is None
    assert found["run"] == "trained/attempt-1/run"


@pytest.mark.slow
def test_the_long_tails_table_from_one_command(tmp_path, capsys):
    """Real runs on a miniature: zero-shot CLIP, LIFT for one epoch, and its score on five crops."""
    miniatures.cifar100_lt(tmp_path)
    command = ["lt", "--clip", "tiny", "--preset", "tiny", "--data", "CIFAR100_LT", "--imb", "4",
               "--root", str(tmp_path), "--seeds", "1", "--epochs", "1",
               "--methods", "zeroshot", "lift", "--out", str(tmp_path / "queue")]  # fmt: skip
    assert main(cli.parse(ReproduceConfig, command), []) == 0
    assert capsys.readouterr().out.count("done: ") == 3
    tables = tmp_path / "queue" / "tables"
    record = json.loads((tables / "lt.json").read_text())
    cells = {(each["row"], each["metric"]): each["seeds"].get("1") for each in record["cells"]}
    run = tmp_path / "queue" / "jobs" / cells["LIFT", "acc"]["runs"][0]
    trained = json.loads((run / "result.json").read_text())[1]
    for metric, key in (("acc", "acc_base"), ("medium", "medium"), ("worst_base", "worst_base")):
        assert cells["LIFT", metric]["value"] == 100 * trained[key]
    # 20 pictures of each of three classes: at imb 100, which groups them, they keep 20, 2 and 1.
    assert cells["CLIP", "many"] is None
    assert cells["CLIP", "medium"] is not None
    assert cells["LIFT, TTE", "acc"]["runs"] == cells["LIFT", "acc"]["runs"]
    assert record["drawn"] == [{"panel": PANEL, "data": "CIFAR-100-LT, imb 4", "cap": None,
                                "pictures": 35, "most": 20, "least": 5}]  # fmt: skip
    markdown = (tables / "lt.md").read_text()
    assert "**Not comparable with the published figures.**" in markdown
    assert "other methods as published, but for what is said below." in markdown
    assert "OLTR counts 100 with many" in markdown
    with open(tables / "lt.csv", newline="") as file:
        rows = {each["row"] for each in csv.DictReader(file)}
    assert rows == {"CLIP", "LIFT", "LIFT, TTE", "VL-LTR", "LPT"}
    assert code_identity("lift") == record["code"]["lift"]
