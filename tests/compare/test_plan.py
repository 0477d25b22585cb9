"""What a comparison will do and when it stops: flags, groups, costs, budgets, searches."""

import sys
from dataclasses import replace
from itertools import permutations

import pytest

from lamp_fast import cli
from lamp_fast.compare.candidates import describe_changes, find_candidates, published_settings
from lamp_fast.compare.cost import (
    Budget,
    Cost,
    Measured,
    Sizes,
    affordable,
    in_order,
    predict_cost,
)
from lamp_fast.compare.search import Search, resolve_trials, rounded, search_space
from lamp_fast.compare.settings import CompareConfig, format_duration, parse_duration
from lamp_fast.errors import InputError
from lamp_fast.fields import validate
from lamp_fast.methods import METHODS
from lamp_fast.runs.config import change, default_config

CONFIG = cli.parse(CompareConfig, ["--clip", "tiny"])


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("20m", 1200), ("1.5h", 5400), ("1h30m", 5400), ("2d", 172_800), ("0.5s", 0.5)],
)
def test_durations_are_read(text, seconds):
    assert parse_duration(text) == seconds
    assert cli.parse(CompareConfig, ["--budget", text]).budget == seconds
    # What is shown is read again, and keeps two units: within half of the smaller one.
    assert parse_duration(format_duration(seconds)) == seconds


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (7.24, "7.2s"), (9.96, "10s"), (59.7, "1m"), (125, "2m5s"), (3599.7, "1h"),
        (86_399, "1d"), (1e6, "11d14h"),
    ],
)  # fmt: skip
def test_durations_are_shown_to_two_units(seconds, shown):
    assert format_duration(seconds) == shown


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--budget", "20"], "--budget"),
        (["--budget", "m20"], "--budget"),
        (["--budget", "0s"], "--budget 0.0: expected more than 0"),
        (["--methods", "dreams"], "--methods dreams: expected some of lamp"),
        (["--split", "base-new"], "--split base-new: methods are compared on all classes"),
        (["--trials", "-1"], "--trials -1: expected at least 0"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(flags, message):
    with pytest.raises(InputError, match=message) as caught:
        validate(cli.parse(CompareConfig, flags))
    assert "\n" not in str(caught.value)


def test_every_method_is_a_candidate_as_it_was_published():
    candidates = find_candidates(CONFIG)
    assert {each.method for each in candidates} == METHODS.keys()
    groups = [each.group for each in candidates]
    assert groups == sorted(groups, key=["zero-shot", "over features", "training"].index)
    found = {each.method: each for each in candidates}
    assert found["zeroshot"].group == "zero-shot"
    over_features = ("linear-probe", "tip", "tip-f", "clip-adapter", "clap", "ss-text", "prolip")
    assert {found[name].group for name in over_features} == {"over features"}
    assert {found[name].group for name in ("coop", "lamp", "clip-lora", "lift")} == {"training"}
    for method in ("coop", "tip", "lamp"):
        data = CONFIG.pictures
        given = {"method": method, "data": data.data, "split": "all", "clip": "tiny"}
        published = default_config(given)
        assert found[method].published.own == published.own
        assert found[method].published.optim == published.optim


def test_settings_that_do_not_go_together_are_a_row_and_no_end():
    config = replace(CONFIG, data=replace(CONFIG.data, template="a scan of {}."))
    found = {each.method: each for each in find_candidates(config)}
    refused = [name for name, each in found.items() if each.published is None]
    assert refused == [name for name in found if METHODS[name].own_prompt]
    assert "has a prompt of its own" in found[refused[0]].refusal


def test_changes_of_settings_are_shown_as_flags():
    published = published_settings(CONFIG, "coop")
    changed = change(published, {"optim.lr": 0.5, "optim.logit_adjustment": True, "coop.n_ctx": 3})
    assert describe_changes(changed, published) == "--n-ctx 3 --lr 0.5 --logit-adjustment"
    assert describe_changes(published, published) == ""


# --- costs -----------------------------------------------------------------------------------


def test_a_cost_is_the_sum_of_its_parts():
    measured = Measured(
        start=1.0,
        build=2.0,
        read_once=3.0,
        read_picture=0.5,
        step=0.1,
        steps=50,
        passes=5,
        score_picture=0.25,
    )
    cost = predict_cost(measured, Sizes(train=10, val=4, test=8))
    # 1 + 2 + 3 + 10 / 2 + 50 / 10 + 5 * 4 / 4, and 1 + 2 + 8 / 4
    assert (cost.fit, cost.test, cost.whole) == (21.0, 5.0, 26.0)


def test_groups_come_in_order_and_the_last_by_cost():
    groups = {"zero": 0, "slow feature": 1, "fast feature": 1, "slow": 2, "fast": 2, "middle": 2}
    seconds = {"zero": 9, "slow feature": 8, "fast feature": 1, "slow": 7, "fast": 2, "middle": 3}
    costs = {name: Cost(fit=each, test=1) for name, each in seconds.items()}
    expected = ["zero", "slow feature", "fast feature", "fast", "middle", "slow"]
    for order in permutations(("slow", "fast", "middle")):
        mixed = {name: costs[name] for name in ("zero", "slow feature", "fast feature", *order)}
        assert in_order(groups, mixed, by_cost=2) == expected
    assert in_order({"x": 1, "y": 1}, {"x": Cost(2, 0), "y": Cost(1, 0)}, by_cost=2) == ["x", "y"]


def test_what_does_not_fit_is_passed_over():
    costs = {name: Cost(each, 1) for name, each in (("a", 4), ("b", 6), ("c", 2), ("d", 0))}
    assert affordable("abcd", costs, 9) == ["a", "c", "d"]  # 5 + 3 + 1
    assert affordable("abcd", costs, 8.9) == ["a", "c"]
    assert affordable("abcd", costs, 0) == []


def test_a_budget_keeps_the_time_of_tests_that_are_owed():
    now = [100.0]
    budget = Budget(10, clock=lambda: now[0])
    cost = Cost(fit=6, test=2)
    assert budget.fits(cost)
    now[0] += 1
    budget.owe(cost)
    assert budget.left == 7
    assert not budget.fits(cost)
    assert budget.fits_again(cost)
    budget.pay(cost)
    assert budget.left == 9
    now[0] += 9.5
    assert not budget.fits_again(Cost(fit=0.6, test=0))


# --- search ----------------------------------------------------------------------------------


def test_without_optuna_a_search_is_refused_where_it_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert resolve_trials(None) == resolve_trials(0) == 0
    with pytest.raises(InputError, match=r"--trials 3: needs optuna; pip install") as caught:
        resolve_trials(3)
    assert "\n" not in str(caught.value)


def test_a_search_begins_as_published_and_repeats_itself():
    pytest.importorskip("optuna", reason="the compare extra is not installed")
    assert resolve_trials(None) > 0
    published = published_settings(CONFIG, "coop")
    runs = [Search(published, seed=3) for _ in range(2)]
    tried = []
    for score in (0.5, None, 0.7, 0.6):
        one, other = (each.next(score) for each in runs)
        assert one == other
        tried.append(one)
    rates = [each.optim.lr for each in tried]
    assert len(set(rates)) == len(rates)
    assert all(published.optim.lr / 5.1 <= rate <= published.optim.lr * 5.1 for rate in rates)
    # Nothing but what is searched has changed.
    same = {"optim.lr": published.optim.lr, "optim.logit_adjustment": False}
    assert all(change(each, same) == published for each in tried)
    assert rounded({"a": 0.0012345, "b": True, "c": "x"}) == {"a": 0.0012, "b": True, "c": "x"}


def test_only_methods_that_train_by_their_logits_are_adjusted():
    adjusted = {
        name: "optim.logit_adjustment" in search_space(published_settings(CONFIG, name))
        for name in ("coop", "lamp", "candle", "lfa")
    }
    assert adjusted == {"coop": True, "lamp": True, "candle": False, "lfa": False}
