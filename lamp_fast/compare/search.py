"""Further settings of a method, proposed by optuna, from what the validation pictures said of the
earlier ones.

Only what training itself depends on most: the learning rate around the published one and, where
the method trains by its logits, logit adjustment. Methods without an optimiser choose what they
have to choose on the validation pictures themselves.
"""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from lamp_fast.errors import InputError
from lamp_fast.methods import METHODS
from lamp_fast.runs.config import TrainConfig, change

# The rate is tried between a fifth of the published one and five times as much.
REACH = 5.0
DEFAULT_TRIALS = 4
EXTRA = "pip install 'lamp_fast[compare]'"


def find_optuna() -> ModuleType | None:
    """optuna, if it is installed; quiet."""
    try:
        import optuna
    except ImportError:
        return None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def resolve_trials(trials: int | None) -> int:
    """How many settings are tried beside the published ones.

    Raises:
        InputError: some were asked for, and optuna is missing.
    """
    if trials == 0:
        return 0
    if find_optuna() is None:
        if trials is not None:
            raise InputError(
                f"--trials {trials}: needs optuna; {EXTRA}, or --trials 0 for published settings"
            )
        return 0
    return DEFAULT_TRIALS if trials is None else trials


class Search:
    """The settings of one method to try: the published ones, then what the sampler proposes.

    Asked and told the same, it proposes the same.

    Args:
        published: of the method; it trains by steps of an optimiser.
        seed: of the sampler.
    """

    def __init__(self, published: TrainConfig, seed: int) -> None:
        optuna = find_optuna()
        self.published = published
        self.space = search_space(published)
        self._distributions = {
            name: optuna.distributions.FloatDistribution(*values, log=True)
            if isinstance(values, tuple)
            else optuna.distributions.CategoricalDistribution(values)
            for name, values in self.space.items()
        }
        # numpy's old generator takes no more.
        sampler = optuna.samplers.TPESampler(seed=seed % 2**32)
        self._study = optuna.create_study(direction="maximize", sampler=sampler)
        self._study.enqueue_trial(_values(published, self.space))
        self._trial = self._study.ask(self._distributions)

    def next(self, score: float | None) -> TrainConfig:
        """Further settings.

        Args:
            score: of the settings before, in the beginning the published ones; None where they
                gave none.
        """
        from optuna.trial import TrialState

        if score is None:
            self._study.tell(self._trial, state=TrialState.FAIL)
        else:
            self._study.tell(self._trial, score)
        self._trial = self._study.ask(self._distributions)
        return change(self.published, rounded(self._trial.params))


def search_space(published: TrainConfig) -> dict[str, tuple[float, float] | list[Any]]:
    """What is tried, by dotted setting: a range, searched by its logarithm, or some values."""
    optim = published.optim
    space: dict[str, tuple[float, float] | list[Any]] = {
        "optim.lr": (optim.lr / REACH, optim.lr * REACH)
    }
    if METHODS[published.method].own_loss is None and optim.loss == "ce":
        space["optim.logit_adjustment"] = [False, True]
    return space


def rounded(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same with two digits of what is no word."""
    return {
        name: float(f"{value:.2g}") if isinstance(value, float) else value
        for name, value in values.items()
    }


def _values(settings: TrainConfig, names: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for name in names:
        group, _, field = name.partition(".")
        found[name] = getattr(getattr(settings, group), field)
    return found
