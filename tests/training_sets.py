"""Training sets as a run would hand them to a method, without a run."""

from lamp_fast.clip.features import FeatureReader
from lamp_fast.data.transforms import evaluation_transform, training_transform
from lamp_fast.methods.training_set import TrainingSet


def training_set(benchmark, clip, batch, *, seed=1, cache=None):
    """Of a benchmark and a CLIP; pictures are encoded four at a time."""
    return TrainingSet(
        benchmark,
        FeatureReader(clip, cache, batch=4),
        centre=evaluation_transform(clip.preprocessing),
        random=training_transform(clip.preprocessing) if benchmark.augment else None,
        batch=batch,
        seed=seed,
    )
