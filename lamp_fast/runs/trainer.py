"""The training loop of a run, and the adaptation to new classes that follows it."""

import bisect
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lamp_fast.data.loading import evaluation_batches, training_batches
from lamp_fast.runs import checkpoint, graph
from lamp_fast.runs.ahead import LookAhead
from lamp_fast.runs.checkpoint import Progress, Snapshot
from lamp_fast.runs.experiment import Experiment
from lamp_fast.runs.graph import CapturedStep, CudaRecorder, StepTensors
from lamp_fast.runs.optimisation import build_criterion, build_optimiser, learning_rate
from lamp_fast.runs.ranks import ALONE, Ranks, batch_sizes
from lamp_fast.runs.selection import is_exhausted, selected_epoch
from lamp_fast.runs.settings import OptimConfig
from lamp_fast.runs.tensorboard import EventWriter
from lamp_fast.runs.validation import Validation

# On a GPU reading a loss waits for the device, so finiteness is looked at this often.
STEPS_BETWEEN_CHECKS = {"cpu": 1, "cuda": 50}
# Where epochs are shorter, writing the state after each would take longer than training.
SECONDS_BETWEEN_CHECKPOINTS = 1.0


class NonFiniteLossError(Exception):
    """Training diverged; the message names the step and the last good checkpoint."""


class Trainer:
    """The training loop of one run: :meth:`run` goes from the current epoch to the last.

    With several ranks all of them run it, each on its rows of every batch.

    Where epochs are compared, only those of a method's last stage are: before it, not all that a
    prediction needs is trained.

    Args:
        experiment: what is trained, and on what.
        folder: of the run.
        ranks: the processes that train it together.
    """

    def __init__(self, experiment: Experiment, folder: Path, ranks: Ranks = ALONE) -> None:
        self.experiment = experiment
        self.folder = folder
        self.ranks = ranks
        self.method = experiment.method
        self.optim = experiment.config.optim
        benchmark, config = experiment.benchmark, experiment.config
        # Where a batch is not full, it is the only one.
        rows = min(self.optim.batch, len(benchmark.train))
        machine = config.machine
        self.training = experiment.training_set(rows)
        started = time.perf_counter()
        batches = self.method.read_training_set(self.training)
        self.reading_seconds = time.perf_counter() - started
        self.parameters = [each for each in self.method.parameters() if each.requires_grad]
        self.optimiser = build_optimiser(self.optim, self.parameters, experiment.device)
        self.scaler = torch.amp.GradScaler(
            experiment.device.type, enabled=config.machine.precision == "fp16"
        )
        self.criterion = build_criterion(
            self.optim,
            benchmark.counts,
            experiment.device,
            scale=self.method.cosine_scale,
            names=benchmark.base_names,
        )
        self.classes = self.method.prepare(
            benchmark.base_names, benchmark.template, benchmark.origin
        )
        self.ahead = _look_ahead(experiment, ranks, rows, on_features=batches is not None)
        if batches is None:
            batches = training_batches(
                benchmark.train,
                experiment.train_transform,
                self.optim.batch,
                seed=config.seed,
                workers=machine.workers,
                sampler=self.optim.sampler,
            )
        self.batch_sizes = [rows] * len(batches)
        self.batches = ranks.share(batches)
        self.planned_steps = self.optim.epochs * len(self.batch_sizes)
        self.progress = Progress(epoch=0, steps=0, history=[], scaler={})
        self.stages = self.method.stages(self.optim.epochs)
        self._entered: int | None = None
        # The epoch to end with; earlier than the rate's curve where another run has chosen it.
        self.last_epoch = self.optim.epochs
        self.validation = None
        if config.selection.searches and self.parameters:
            self.validation = Validation(experiment, ranks)
        # The method's state after the best epoch so far.
        self.selected: dict[str, Tensor] | None = None
        # t / T of the step that is taken, where a captured step can read it.
        self.elapsed = torch.zeros((), dtype=torch.float64, device=experiment.device)
        self.not_captured = graph.why_not_captured(config, self.method, experiment.device, ranks)
        self.captured: CapturedStep | None = None
        if self.not_captured is None:
            self.capture(CudaRecorder(experiment.device))
        self.events: EventWriter | None = None
        # Of the newest state what is not written yet, when one was, and epochs among the events.
        self._kept: Snapshot | None = None
        self._written, self._logged = 0.0, 0

    def capture(self, recorder: graph.Recorder) -> None:
        """Record the first step from here on, and replay it for every batch of its size."""
        self.captured = CapturedStep(self._fixed_step, self._state, recorder)

    def restore(self) -> None:
        """Go on from the folder's checkpoint, whose log is written again: a killed process may have
        come no further than the checkpoint."""
        self.progress, self.selected = checkpoint.load_checkpoint(
            self.folder, self.method, self.optimiser, self.scaler.state_dict()
        )
        if self.progress.scaler:
            self.scaler.load_state_dict(self.progress.scaler)
        self._logged = self.progress.epoch
        if self.ranks.first:
            checkpoint.write_metrics(self.folder, self.progress.history)

    def save(self) -> None:
        """Write the checkpoint of the last finished epoch, then the log that belongs to it."""
        self._kept = self._snapshot()
        self._write_kept()

    def run(self) -> None:
        """Train the remaining epochs, then go back to the best one where they are compared.

        The state after each is written, but where epochs are shorter than a second only once a
        second, and when training ends or stops; what is held until then is lost with the process.
        """
        try:
            for epoch in range(self.progress.epoch, self.last_epoch):
                if self._is_exhausted():
                    break
                line = self._epoch(epoch)
                self._check_state(epoch)
                self._compare(epoch, line)
                self.progress.history.append(line)
                self.progress.epoch = epoch + 1
                self.ranks.once(self._keep)
        finally:
            self._write_kept()
        if self.selected is not None:
            self.method.load_state_dict(self.selected)

    def _is_exhausted(self) -> bool:
        return is_exhausted(self.progress.history, self.experiment.config.selection.patience)

    def _compare(self, epoch: int, line: dict[str, Any]) -> None:
        """Add the figures on validation pictures to the epoch's line, and hold its state where they
        are the best so far."""
        if self.validation is None or epoch < sum(self.stages[:-1]):
            return
        line |= self.validation.line()
        if selected_epoch([*self.progress.history, line]) == epoch + 1:
            state = self.method.state_dict()
            self.selected = {name: each.detach().clone() for name, each in state.items()}

    def time_steps(self, count: int) -> Iterator[float]:
        """Take the first steps of a run for their time alone, after which it is of no other use.

        Yields:
            The seconds of each, what its pictures took to come included.
        """
        optim, _ = self._enter_stage(0)
        self._set_rate(learning_rate(optim, 0))
        self.method.train()
        self.method.start_epoch()
        parts = self.ranks.parts(self.batches, self.batch_sizes, 0)
        batches = self.experiment.move_batches(batch for batch, _ in parts)
        started = time.perf_counter()
        for images, labels, _ in itertools.islice(batches, count):
            self._take_step(images, labels, self.batch_sizes[0])["loss"].item()
            ended = time.perf_counter()
            yield ended - started
            started = ended

    def _keep(self) -> None:
        """Write the state after an epoch, or hold it where the last one was just written."""
        since = time.monotonic() - self._written
        if since >= SECONDS_BETWEEN_CHECKPOINTS or self.progress.epoch == self.last_epoch:
            self.save()
        else:
            self._kept = self._snapshot().kept()

    def _snapshot(self) -> Snapshot:
        self.progress.scaler = self.scaler.state_dict()
        return Snapshot.take(self.method, self.optimiser, self.progress, self.selected)

    def _write_kept(self) -> None:
        """Write what is held, if anything; rank 0 alone holds any."""
        if self._kept is None:
            return
        history = self._kept.progress.history
        self._kept.write(self.folder, expected=len(history) > 1)
        if self.experiment.config.tensorboard and len(history) > self._logged:
            self.events = self.events or EventWriter(self.folder, self._logged)
            for line in history[self._logged :]:
                self.events.add(line)
            self._logged = len(history)
        self._kept, self._written = None, time.monotonic()

    def _epoch(self, epoch: int) -> dict:
        started = time.perf_counter()
        optim, begun = self._enter_stage(epoch)
        rate = learning_rate(optim, epoch - begun)
        self._set_rate(rate)
        self.method.train()
        self.method.start_epoch()
        device = self.experiment.device
        every = STEPS_BETWEEN_CHECKS[device.type]
        names: list[str] = []
        outcomes: list[Tensor] = []
        parts = self.ranks.parts(self.batches, self.batch_sizes, epoch)
        loaded = _Waited(self.experiment.move_batches(batch for batch, _ in parts))
        bar = tqdm(
            zip(self.ahead(loaded), self.batch_sizes, strict=True),
            desc=f"epoch {epoch + 1}/{self.optim.epochs}",
            total=len(self.batch_sizes),
            leave=False,
            disable=None if self.ranks.first else True,
        )
        for step, ((images, labels, _), rows) in enumerate(bar):
            if self.optim.lr_per == "step":
                passed = epoch - begun + step / len(self.batch_sizes)
                self._set_rate(learning_rate(optim, passed))
            outcome = self._take_step(images, labels, rows)
            names = list(outcome)
            # A vector of our own: a captured step overwrites its scalars.
            outcomes.append(torch.stack(list(outcome.values())))
            if len(outcomes) % every == 0:
                self._check_finite(outcomes, every, epoch)
                if not bar.disable:
                    waiting = loaded.seconds / (time.perf_counter() - started)
                    loss = f"{outcomes[-1][0].item():.3f}"
                    bar.set_postfix(loss=loss, waiting_for_data=f"{waiting:.0%}", refresh=False)
        self._check_finite(outcomes, every, epoch)
        columns = dict(zip(names, torch.stack(outcomes).T.contiguous(), strict=True))
        losses, correct = columns.pop("loss"), columns.pop("correct").double().sum().item()
        means = {name: values.mean().item() for name, values in columns.items()}
        parts = self.ranks.gather((correct, means))
        seconds = time.perf_counter() - started
        return {
            "epoch": epoch + 1,
            "lr": rate,
            "loss": losses.mean().item(),
            **{name: sum(part.get(name, 0.0) for _, part in parts) for name in parts[0][1]},
            "accuracy": sum(count for count, _ in parts) / sum(self.batch_sizes),
            "seconds": seconds,
            "waiting_for_data": loaded.seconds / seconds,
            "step_loss": losses.tolist(),
            **self.method.epoch_log(),
        }

    def _enter_stage(self, epoch: int) -> tuple[OptimConfig, int]:
        """Tell the method of a stage that it was not in; the optimisation of the stage's epochs
        alone, and the epoch that it began with."""
        ends = list(itertools.accumulate(self.stages))
        number = bisect.bisect_right(ends, epoch)
        epochs = self.stages[number]
        begun = ends[number] - epochs
        if number != self._entered:
            self.method.enter_stage(number, self.classes, first_epoch=epoch == begun)
            self._entered = number
        return replace(self.optim, epochs=epochs), begun

    def _set_rate(self, rate: float) -> None:
        for group in self.optimiser.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def _take_step(self, images: Tensor, labels: Tensor, rows: int) -> StepTensors:
        """One optimiser step, captured where it can be."""
        self.elapsed.fill_(self.progress.steps / self.planned_steps)
        if self.captured is not None and self.captured.fits(images, labels):
            outcome, applied = self.captured(images, labels), True
        else:
            outcome, applied = self._step(images, labels, rows, fixed_shapes=False)
        self.progress.steps += applied
        return outcome

    def _fixed_step(self, images: Tensor, labels: Tensor) -> StepTensors:
        """A step that looks at no value and whose shapes are those of the batch alone."""
        return self._step(images, labels, len(labels), fixed_shapes=True)[0]

    def _state(self) -> list[Tensor]:
        """Every tensor that a step changes."""
        slots = [each for state in self.optimiser.state.values() for each in state.values()]
        tensors = [each for each in slots if isinstance(each, Tensor)]
        return [*self.method.parameters(), *self.method.buffers(), *tensors]

    def _step(
        self, images: Tensor, labels: Tensor, rows: int, fixed_shapes: bool
    ) -> tuple[StepTensors, bool]:
        """One optimiser step over a batch of ``rows`` rows on all ranks, in ``accumulate`` pieces.

        Returns:
            Scalars: the whole batch's "loss" first, "correct" among this rank's rows and, where it
            has any, its share of the method's terms. False where the loss scaler skipped the step.
        """
        self.optimiser.zero_grad(set_to_none=True)
        share = len(labels) / rows

        def scale(loss: Tensor) -> Tensor:
            return self.scaler.scale(loss if share == 1 else loss * share)

        pieces = []
        if len(labels):
            count = self.optim.accumulate
            pieces = self.method.accumulate(
                images, labels, self.classes, self.criterion, count, scale, fixed_shapes
            )
        else:
            # The scaler begins with the first loss that it scales.
            scale(torch.zeros((), device=self.experiment.device))
        loss = sum(
            (len(each.logits) / rows * each.loss.detach() for each in pieces),
            torch.zeros((), device=self.experiment.device),
        )
        # What a stage leaves alone has no gradient on any rank; a sum would make it one of zeros.
        trained = [each for each in self.parameters if each.requires_grad]
        loss = self.ranks.sum_gradients(trained, loss)
        if self.optim.clip_grad is not None:
            self.scaler.unscale_(self.optimiser)
            torch.nn.utils.clip_grad_norm_(trained, self.optim.clip_grad)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimiser)
        self.scaler.update()
        applied = self.scaler.get_scale() >= scale  # a smaller scale means a skipped step
        if applied:
            observations = [piece.observations for piece in pieces]
            self.method.after_step(observations, self.elapsed, self.ranks.summing)
        outcome = {"loss": loss, "correct": loss.new_zeros(())}
        if pieces:
            logits = torch.cat([piece.logits for piece in pieces])
            outcome["correct"] = (logits.argmax(1) == labels).sum().to(loss.dtype)
            for name in pieces[0].terms:
                value = sum(len(each.logits) / rows * each.terms[name] for each in pieces)
                outcome[name] = value.to(loss.dtype)
        return outcome, applied

    def _check_finite(self, outcomes: Sequence[Tensor], every: int, epoch: int) -> None:
        losses = [each[0] for each in outcomes[-every:]]
        if bool(torch.isfinite(torch.stack(losses)).all()):
            return
        losses = [each[0] for each in outcomes]
        step = next(index for index, loss in enumerate(losses, 1) if not math.isfinite(loss))
        raise NonFiniteLossError(
            f"the loss is {losses[step - 1].item()} at step {step} of epoch {epoch + 1}; stopped."
            f" The last good checkpoint, of epoch {self.progress.epoch}, is in {self.folder}"
        )

    def _check_state(self, epoch: int) -> None:
        """The last step may have broken what it left, which no loss has shown yet."""
        numbers = [each for each in self._state() if each.is_floating_point()]
        if all(bool(torch.isfinite(each).all()) for each in numbers):
            return
        raise NonFiniteLossError(
            f"weights are not finite after epoch {epoch + 1}; stopped."
            f" The last good checkpoint, of epoch {self.progress.epoch}, is in {self.folder}"
        )


def adapt_to_new_classes(experiment: Experiment, ranks: Ranks = ALONE) -> dict | None:
    """Run the method's adaptation over the unlabelled training pictures of the new classes."""
    benchmark = experiment.benchmark
    if not len(benchmark.adapt) or experiment.method.entry.no_new_names is not None:
        return None
    classes = experiment.method.prepare(benchmark.new_names, benchmark.template, benchmark.origin)
    return experiment.method.adapt(_Images(experiment, ranks), classes, ranks.summing)


def _look_ahead(
    experiment: Experiment, ranks: Ranks, rows: int, *, on_features: bool = False
) -> LookAhead:
    """For batches of which all ranks together have at most so many rows."""
    here = -(-rows // ranks.size)
    config, method, device = experiment.config, experiment.method, experiment.device
    return LookAhead.of(config, method, device, here, on_features=on_features)


class _Waited:
    """Batches, and how many seconds of waiting for them there were so far."""

    def __init__(self, batches: Iterator[list[Tensor]]) -> None:
        self.batches, self.seconds = batches, 0.0

    def __iter__(self) -> Iterator[list[Tensor]]:
        return self

    def __next__(self) -> list[Tensor]:
        asked = time.perf_counter()
        try:
            return next(self.batches)
        finally:
            self.seconds += time.perf_counter() - asked


class _Images:
    """Batches to adapt on, without labels, on the device, as often as they are asked for: pictures,
    or what of them enters the method's first changed layer."""

    def __init__(self, experiment: Experiment, ranks: Ranks) -> None:
        self.experiment, self.ranks = experiment, ranks
        config, pictures = experiment.config, experiment.benchmark.adapt
        self.sizes = batch_sizes(len(pictures), config.optim.batch)
        self.ahead = _look_ahead(experiment, ranks, self.sizes[0])
        self.batches = ranks.share(
            evaluation_batches(
                pictures,
                experiment.centre_transform,
                config.optim.batch,
                workers=config.machine.workers,
            )
        )

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[Tensor]:
        batches = (batch for batch, _ in self.ranks.parts(self.batches, self.sizes))
        for images, _, _ in self.ahead(self.experiment.move_batches(batches)):
            yield images
