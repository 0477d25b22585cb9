"""Settings of a run: generic over the method's, saved as the groups that are read, read again."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from lamp_fast import train
from lamp_fast.data.catalog import CATALOG
from lamp_fast.data.settings import ViewConfig
from lamp_fast.errors import InputError
from lamp_fast.fields import to_json, validate
from lamp_fast.methods import METHODS
from lamp_fast.runs.config import (
    TrainConfig,
    apply_preset,
    default_config,
    from_saved,
    saved_settings,
    to_saved,
)
from lamp_fast.runs.training import training_settings

PRESETS = [(method, name) for method, kind in METHODS.items() for name in kind.presets]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_saves_the_groups_that_it_reads_and_no_other(method):
    config = default_config({"method": method})
    values = json.loads(json.dumps(to_saved(config)))
    groups = {name for name, each in values.items() if isinstance(each, dict)}
    assert groups == {"clip", "data", "views", method, "optim", "selection", "machine", "trim"}
    assert values[method] == to_json(config.own)
    assert from_saved(values, "config.json") == config
    assert type(config.own) is METHODS[method].Settings


@pytest.mark.parametrize(("method", "name"), PRESETS)
def test_every_preset_is_of_its_method_and_within_bounds(method, name):
    config = apply_preset(TrainConfig(method="candle"), name)
    assert (config.method, config.preset) == (method, name)
    validate(config)
    kind, preset = METHODS[method], METHODS[method].presets[name]
    assert config.own == replace(kind.Settings(), **preset.own)
    assert config.views == replace(ViewConfig(), **preset.views)
    for changes in (*preset.by_data.values(), *preset.by_shots.values()):
        validate(replace(config, optim=replace(config.optim, **changes)))
    for data, changes in preset.own_by_data.items():
        assert data in CATALOG
        validate(replace(config, own=replace(config.own, **changes)))


def test_a_methods_own_values_follow_the_data_set_unless_they_are_given():
    """As the optimisation's do: of a preset that is taken unasked."""
    kind = METHODS["mmrl"]
    own = kind.presets["mmrl"].own_by_data["eurosat"]
    assert own
    assert default_config({"method": "mmrl", "data": "EuroSAT"}).own == kind.Settings(**own)
    assert default_config({"method": "mmrl", "data": "digits"}).own == kind.Settings()
    named = default_config({"preset": "mmrl", "data": "EuroSAT"})
    assert named.own == kind.Settings()


def test_groups_of_0_1_0_become_the_methods_own():
    """There every run saved all groups, and words of context had one of their own."""
    before = {
        **{name: {} for name in ("lamp", "mma", "lfa", "candle")},
        "context": {"n_ctx": 2, "ctx_init": None},
        "maple": {"depth": 3},
        "tcp": {"knowledge_layer": 5},
    }
    maple = from_saved({"method": "maple", **before}, "x").own
    assert to_json(maple) == {"n_ctx": 2, "ctx_init": None, "depth": 3}
    tcp = from_saved({"method": "tcp", **before}, "x").own
    assert (tcp.n_ctx, tcp.knowledge_layer, tcp.knowledge_weight) == (2, 5, 8.0)
    assert to_json(from_saved({"method": "coop", **before}, "x").own) == before["context"]
    assert from_saved({"method": "zeroshot", **before}, "x").own == METHODS["zeroshot"].Settings()


def test_lamps_phi_was_linear_before_it_was_a_setting_of_a_run():
    values = {"method": "lamp", "lamp": {"k": 3}}
    saved, by_hand = (read(values, "x").own for read in (saved_settings, from_saved))
    assert (saved.k, saved.phi, saved.similarity_gradient) == (3, "linear", "both")
    assert (by_hand.k, by_hand.phi, by_hand.similarity_gradient) == (3, "mlp", "keys")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], r"x: expected an object of settings, got \[\]"),
        ({"method": "best"}, "x.method: 'best' is none of lamp, "),
        ({"method": 3}, "x.method: 3 is none of lamp, "),
        ({"lamp": {"depth": 3}}, "x.lamp: unknown setting 'depth'"),
        ({"lamp": [3]}, r"x.lamp: expected an object of settings, got \[3\]"),
        ({"method": "coop", "context": [3]}, r"x.coop: expected an object of settings, got \[3\]"),
        ({"own": {"k": 3}}, "x.own: "),
        ({"own": None}, "x.own: "),
        ({"optim": {"lr": "fast"}}, "x.optim.lr: 'fast' is not"),
    ],
)
def test_settings_of_another_form_are_named(values, message):
    with pytest.raises(InputError, match=message):
        from_saved(values, "x")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' * 50 + "1" + "}" * 50, "{", None])
def test_a_config_that_is_no_json_is_one_line(tmp_path, text):
    file = tmp_path / "config.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(InputError, match=rf"^--config {re.escape(str(file))}: [^\n]+$"):
        default_config({"config": file})


def test_the_settings_of_another_method_are_refused():
    with pytest.raises(InputError, match="--method coop: the settings are those of another method"):
        validate(replace(TrainConfig(), method="coop"))


def test_keywords_may_be_numbers_of_numpy():
    given = {"shots": np.int64(4), "lr": np.float64(0.5), "layers": np.arange(3, 6), "mpp": True}
    flags = ["--shots", "4", "--lr", "0.5", "--layers", "3..5", "--mpp"]
    assert training_settings(given) == train.read_flags(flags)
    with pytest.raises(InputError, match="k: not a setting of training --method tcp"):
        training_settings({"method": "tcp", "k": 3})
    with pytest.raises(InputError, match="optim: not a setting of training"):
        training_settings({"optim": {}})


def test_switches_of_study_are_keywords_and_no_flags():
    config = training_settings({"last_row": False, "most_rows": 7})
    assert (config.trim.last_row, config.trim.most_rows) == (False, 7)
    with pytest.raises(InputError, match="--most-rows: --method lamp has no such flag"):
        train.read_flags(["--most-rows", "7"])
    shared = train.read_flags(["--no-share-routes", "--block", "9"])
    assert (shared.trim.share_routes, shared.trim.block) == (False, 9)
