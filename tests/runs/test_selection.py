"""Which epoch is kept: against all epochs' states, kept aside, and scores that sklearn gives."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

from lamp_fast import train
from lamp_fast.errors import InputError
from lamp_fast.fields import validate
from lamp_fast.files import read_json
from lamp_fast.methods import METHODS
from lamp_fast.runs import experiment as experiments
from lamp_fast.runs import trainer
from lamp_fast.runs.experiment import load_run
from lamp_fast.runs.folder import HOLDOUT, LEARNED, METRICS, RESULT, VALIDATION
from lamp_fast.runs.selection import is_exhausted, selected_epoch
from lamp_fast.runs.trainer import Trainer
from lamp_fast.runs.validation import validation_logits
from lamp_fast.tensors import load_tensors

TINY = ("--threads", "1", "--shots", "2", "--batch", "5", "--warmup-epochs", "0")
# So large a rate that epochs differ in what they get right.
METHOD_FLAGS = {
    "clip-adapter": ("--lr", "3", "--epochs", "6"),
    "lfa": ("--lr", "0.1", "--epochs", "6"),
    "lamp": ("--lr", "0.1", "--epochs", "3", "--adapt-passes", "1"),
    "2sfs": ("--lr", "0.01", "--epochs", "3"),
    "coop": ("--lr", "2", "--epochs", "4"),
}


def settings(out, method, *flags):
    words = ["--method", method, *TINY, *METHOD_FLAGS.get(method, ()), "--out", out, *flags]
    return train.read_flags([str(each) for each in words])


def history(out):
    return [json.loads(line) for line in (out / METRICS).read_text().splitlines()]


def timeless(lines):
    clocks = ("seconds", "waiting_for_data", "val_seconds")
    return [{name: each for name, each in line.items() if name not in clocks} for line in lines]


def same_state(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(other[name].cpu(), value.cpu()), name


@pytest.fixture
def watched(monkeypatch):
    """By run folder the method's state and sklearn's macro-F1 after each epoch."""
    seen, compare = {}, Trainer._compare

    def watch(self, epoch, line):
        compare(self, epoch, line)
        state = {name: each.clone() for name, each in self.method.state_dict().items()}
        score = None
        if self.validation is not None:
            logits, labels = validation_logits(self.experiment, self.method)
            labels, predicted = labels.numpy(), logits.argmax(1).numpy()
            shown = np.unique(labels)
            score = f1_score(labels, predicted, labels=shown, average="macro", zero_division=0)
        seen.setdefault(self.folder, []).append((state, score))

    monkeypatch.setattr(Trainer, "_compare", watch)
    return seen


@pytest.mark.parametrize(
    ("scores", "expected"),
    [([], None), ([None, None], None), ([0.2, 0.5, 0.5, 0.1], 2), ([None, 0.3, 0.3], 2)],
)
def test_the_first_of_equals(scores, expected):
    lines = [
        {"epoch": epoch, **({} if score is None else {"val_score": score})}
        for epoch, score in enumerate(scores, start=1)
    ]
    assert selected_epoch(lines) == expected
    for patience in (1, 2, 3):
        after = len(lines) - (expected or len(lines))
        assert is_exhausted(lines, patience) is (after >= patience)
    assert not is_exhausted(lines, None)


@pytest.mark.parametrize("method", ["lamp", pytest.param("lfa", marks=pytest.mark.slow), "2sfs"])
def test_the_best_state_is_what_is_kept(tmp_path, watched, method):
    """With what an epoch moves beside parameters: LFA's average, LAMP's load balancing."""
    best, last = tmp_path / "best", tmp_path / "last"
    assert train.main(settings(best, method, "--select", "best")) == 0
    lines, (states, scores) = history(best), zip(*watched[best], strict=True)
    # 2SFS's first stage, of 2 epochs, leaves no classifier to compare.
    first = 2 if method == "2sfs" else 0
    assert ["val_score" in line for line in lines] == [False] * first + [True] * (
        len(lines) - first
    )
    for line, score in list(zip(lines, scores, strict=True))[first:]:
        # Both are means of at most 5 ratios of small integers: a few roundings.
        assert line["val_score"] == pytest.approx(score, rel=1e-14)
    chosen = first + int(np.argmax(np.round(scores[first:], 12)))
    learned, facts = load_tensors(best / LEARNED)
    assert (facts["selected"], facts["epochs"]) == (chosen + 1, len(lines))
    if method != "lamp":
        same_state(states[chosen], learned)
    row = read_json(best / RESULT)[1]
    assert row["selection"]["epoch"] == chosen + 1
    assert [each["val_score"] for each in row["selection"]["curve"]] == [
        line["val_score"] for line in lines[first:]
    ]
    # Looking changes nothing of what is learned.
    assert train.main(settings(last, method, "--validation", "on")) == 0
    for (one, _), (other, _) in zip(watched[best], watched[last], strict=True):
        same_state(one, other)
    assert load_tensors(last / LEARNED)[1]["selected"] is None
    experiment, _ = load_run(best)
    logits, labels = validation_logits(experiment, experiment.method)
    kept = load_tensors(best / VALIDATION)[0]
    # In one process and in one order of pictures.
    assert torch.equal(kept["logits"], logits)
    assert torch.equal(kept["labels"], labels)


@pytest.mark.parametrize(
    ("seconds", "stop"), [(0.0, 1), pytest.param(1e9, 3, marks=pytest.mark.slow)]
)
def test_going_on(tmp_path, monkeypatch, seconds, stop):
    """To the bit, with the epoch that is best so far and the patience that is left."""
    flags = ("--select", "best", "--patience", "3", "--epochs", "30")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert train.main(settings(whole, "clip-adapter", *flags)) == 0
    lines = history(whole)
    assert len(lines) == selected_epoch(lines) + 3 < 30
    take = Trainer._take_step

    def interrupt(self, *batch):
        if self.progress.epoch == stop:
            raise KeyboardInterrupt
        return take(self, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "SECONDS_BETWEEN_CHECKPOINTS", seconds)
        patch.setattr(Trainer, "_take_step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train.main(settings(stopped, "clip-adapter", *flags))
    for _ in range(2):  # once more where all is done
        assert train.main(settings(stopped, "clip-adapter", *flags, "--resume")) == 0
        assert timeless(history(stopped)) == timeless(lines)
        same_state(load_tensors(whole / LEARNED)[0], load_tensors(stopped / LEARNED)[0])


def test_stand_ins_and_training_again(tmp_path, watched, monkeypatch):
    """The run without some classes has the pictures of the others; the run with all is, up to the
    epoch that was found, the one that nothing was chosen for. Stopped, it goes on."""
    out, plain = tmp_path / "run", tmp_path / "plain"
    flags = ("--select", "best", "--holdout-classes", "0.4", "--retrain", "--shots", "4")
    take = Trainer._take_step

    def interrupt(self, *batch):
        if self.folder.name == HOLDOUT and self.progress.epoch == 2:
            raise KeyboardInterrupt
        return take(self, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_take_step", interrupt)
        with pytest.raises(KeyboardInterrupt, match=r"--out \S+/run --resume goes on"):
            train.main(settings(out, "coop", *flags))
    assert train.main(settings(out, "coop", *flags, "--resume")) == 0
    lines = history(out / HOLDOUT)
    for line in lines:
        kept, held = line["val_macro_f1"], line["val_macro_f1_held_out"]
        assert line["val_score"] == pytest.approx(2 * kept * held / (kept + held), rel=1e-14)
    epoch = selected_epoch(lines)
    assert len(history(out)) == epoch == load_tensors(out / LEARNED)[1]["selected"]
    assert not (out / HOLDOUT / RESULT).exists()
    assert train.main(settings(plain, "coop", "--shots", "4")) == 0
    same_state(watched[plain][epoch - 1][0], load_tensors(out / LEARNED)[0])

    inner = experiments.load_benchmark(load_run(out / HOLDOUT)[0].config)
    outer = load_run(out)[0].benchmark
    kept, held = inner.base_names, inner.stand_ins
    assert sorted(kept + held) == sorted(outer.base_names)
    assert len(held) == 2
    for part in ("train", "val", "test_base"):
        pictures, every = getattr(inner, part), getattr(outer, part)
        expected = {
            (name, outer.base_names[label])
            for name, label in zip(every.names, every.labels, strict=True)
            if outer.base_names[label] in kept
        }
        found = {(n, kept[label]) for n, label in zip(pictures.names, pictures.labels, strict=True)}
        assert found == expected
    assert {held[label] for label in inner.val_new.labels} == set(held)


@pytest.fixture
def poison(monkeypatch):
    """Every test picture becomes noise, and the labels change places."""
    find = experiments.find_source

    def poisoned(*arguments, **named):
        source = find(*arguments, **named)
        generator = np.random.default_rng(0)
        noise = generator.integers(0, 256, source.test.arrays.shape, dtype=np.uint8)
        labels = generator.permutation(source.test.labels)
        return replace(source, test=replace(source.test, arrays=noise, labels=labels))

    return lambda: monkeypatch.setattr(experiments, "find_source", poisoned)


CHOOSING = {
    "coop": ("--select", "best", "--holdout-classes", "0.4", "--retrain", "--epochs", "2"),
    "tip-f": ("--select", "best", "--epochs", "3", "--tip-views", "2", "--tip-passes", "1"),
    "linear-probe": ("--probe-c", "none"),
    "lp++": ("--lp-steps", "20"),
}


@pytest.mark.parametrize(
    "method",
    [
        "coop",
        "tip-f",
        pytest.param("linear-probe", marks=pytest.mark.slow),
        pytest.param("lp++", marks=pytest.mark.slow),
    ],
)
def test_nothing_is_chosen_on_test_pictures(tmp_path, poison, method):
    """Epochs, C, alpha and beta, LP++'s step: the same bits, whatever the test pictures are."""
    clean, other = tmp_path / "clean", tmp_path / "poisoned"
    assert train.main(settings(clean, method, *CHOOSING[method])) == 0
    poison()
    assert train.main(settings(other, method, *CHOOSING[method])) == 0
    for name in (LEARNED, VALIDATION):
        (expected, facts), (got, their) = (load_tensors(run / name) for run in (clean, other))
        same_state(expected, got)
        assert facts.get("selected") == their.get("selected")
    scores = [read_json(run / RESULT)[1]["acc_base"] for run in (clean, other)]
    assert scores[1] < 0.5 < scores[0]  # the poison works


@pytest.mark.parametrize(
    ("method", "flags", "message"),
    [
        ("promptsrc", ["--select", "best"], "average of the weights of all epochs"),
        ("coop", ["--patience", "2"], "--patience 2: expected --select best"),
        ("coop", ["--holdout-classes", "0.2"], "expected --select best with it"),
        ("coop", ["--select", "best", "--retrain"], "--retrain: expected --holdout-classes"),
        ("coop", ["--select", "best", "--validation", "off"], "--validation off"),
        ("coop", ["--select", "best", "--holdout-classes", "0.2", "--split", "all"], "base-new"),
        ("lift", ["--select", "best", "--holdout-classes", "0.2"], "one row a trained class"),
        ("coop", ["--select", "best", "--holdout-classes", "1"], "less than 1"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, method, flags, message):
    with pytest.raises(InputError, match=message):
        validate(settings(tmp_path / "run", method, *flags))


def test_too_few_classes_to_hold_out(tmp_path):
    flags = ("--select", "best", "--holdout-classes", "0.8")
    with pytest.raises(InputError, match="of 5 base classes 4 would be held out"):
        train.main(settings(tmp_path / "run", "coop", *flags))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["coop", "promptsrc", "tip"])
def test_the_default_of_own_pictures(method):
    """Best, but where there is nothing to choose; runs of papers' data have the last."""
    own = settings("run", method, "--data", "folder").resolved_selection()
    selectable = METHODS[method].no_selection is None
    assert (own.select, own.validation) == ("best" if selectable else "last", "on")
    for flags in ((), ("--data", "list")):
        papers = settings("run", method, *flags).resolved_selection()
        assert (papers.select, papers.validation) == ("last", "off")
