"""Device transforms against torchvision, on the CPU: the same views, the same pixels."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from lamp_fast import train
from lamp_fast.clip.settings import ClipConfig
from lamp_fast.data.loading import move_batches
from lamp_fast.data.resample import Packed, PackTransform, join, pack, resample
from lamp_fast.data.settings import DataConfig
from lamp_fast.data.transforms import (
    CentreCrop,
    Preprocessing,
    RandomCrop,
    View,
    evaluation_transform,
    training_transform,
)
from lamp_fast.files import read_json
from lamp_fast.runs import trainer
from lamp_fast.runs.config import TrainConfig, apply_preset
from lamp_fast.runs.experiment import assemble
from lamp_fast.runs.folder import CONFIG, LEARNED, METRICS
from lamp_fast.runs.trainer import Trainer
from lamp_fast.tensors import load_tensors

CPU = torch.device("cpu")
SIZE = 56
PREPROCESSING = Preprocessing(size=SIZE)
# Height, width: scaling up and down, extreme aspect ratios, sides of one pixel, strips' edges.
SIZES = [
    (90, 120),
    (20, 30),
    (1, 200),
    (300, 1),
    (1, 1),
    (2, 2),
    (5, 700),
    (700, 5),
    (64, 65),
    (63, 56),
]


def binary_noise(height: int, width: int, channels: int = 3) -> torch.Tensor:
    """The hardest picture for a bicubic filter: every edge overshoots."""
    generator = torch.Generator().manual_seed(height * 1000 + width)
    shape = (channels, height, width)
    return torch.randint(0, 2, shape, generator=generator, dtype=torch.uint8) * 255


def pictures() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    smooth = torch.rand(3, 6, 8, generator=generator)
    smooth = v2.functional.resize((255 * smooth).to(torch.uint8), [150, 110], antialias=True)
    grey = binary_noise(80, 70, channels=1).expand(3, -1, -1)
    return [*(binary_noise(*each) for each in SIZES), smooth, grey]


def error(got: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Per picture, the mean absolute difference in steps of 255."""
    std = torch.tensor(PREPROCESSING.std)[:, None, None]
    return ((got - expected).abs() * 255 * std).mean(dim=(1, 2, 3))


def v2_training() -> v2.Compose:
    """torchvision's own pipeline: the oracle of what is drawn and of every pixel."""
    return v2.Compose(
        [
            v2.RandomResizedCrop(
                SIZE, (0.08, 1.0), interpolation=InterpolationMode.BICUBIC, antialias=True
            ),
            v2.RandomHorizontalFlip(),
            v2.Lambda(torch.Tensor.contiguous),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(PREPROCESSING.mean, PREPROCESSING.std),
        ]
    )


def seeded(transform, picture, seed):
    torch.manual_seed(seed)
    result = transform(picture)
    return result, torch.rand(1).item()


@pytest.mark.parametrize("seed", range(5))
def test_training_draws_and_computes_what_torchvision_does(seed):
    """To the bit, and the generator is left where torchvision leaves it."""
    ours, oracle = training_transform(PREPROCESSING), v2_training()
    for picture in pictures():
        got, expected = (seeded(each, picture, seed) for each in (ours, oracle))
        assert torch.equal(got[0], expected[0])
        assert got[1] == expected[1]


@pytest.mark.parametrize("random", [True, False])
def test_the_device_agrees_with_the_host(random):
    """The same views, within 2/255 in the mean of every picture (the requirement).

    Both round to 8 bits after each pass; torchvision's weights have 15 bits or so, so a value near
    a half may round the other way, which 0.05 steps in the mean allow for one in twenty.
    """
    host = (training_transform if random else evaluation_transform)(PREPROCESSING)
    device = PackTransform(PREPROCESSING, host.views)
    for seed in range(4 if random else 1):
        expected, packed = [], []
        for picture in pictures():
            results = [seeded(each, picture, seed) for each in (host, device)]
            expected.append(results[0][0])
            packed.append(results[1][0])
            assert results[0][1] == results[1][1]  # the generator is left in the same place
        got = resample(join(packed), CPU, torch.float32)
        assert got.shape == (len(packed), 3, SIZE, SIZE)
        assert got.is_contiguous()
        assert error(got, torch.stack(expected)).max() < 0.05


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
def test_every_kind_of_test_transform(interpolation, resize_mode):
    preprocessing = Preprocessing(SIZE, interpolation=interpolation, resize_mode=resize_mode)
    transform, whole = (
        evaluation_transform(preprocessing),
        PackTransform(preprocessing, CentreCrop()),
    )
    expected = torch.stack([transform(each) for each in pictures()])
    got = resample(join([whole(each) for each in pictures()]), CPU, torch.float32)
    assert error(got, expected).max() < 0.05


def test_a_batch_does_not_change_a_picture():
    """Neighbours decide how many taps are computed, never what they weigh."""
    packed = [PackTransform(PREPROCESSING, CentreCrop())(each) for each in pictures()]
    together = resample(join(packed), CPU, torch.float32)
    for index, each in enumerate(packed):
        assert torch.equal(resample(each, CPU, torch.float32)[0], together[index])


def test_mirroring_and_dtype():
    picture = binary_noise(40, 50)
    plain = View((3, 4, 30, 40), (SIZE, SIZE))
    flipped = View((3, 4, 30, 40), (SIZE, SIZE), flip=True)
    one, other = (pack(picture, [each], PREPROCESSING) for each in (plain, flipped))
    got = resample(join([one, other]), CPU, torch.bfloat16)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got[0], got[1].flip(-1))


def test_the_padding_of_a_strip_is_never_seen():
    packed = pack(binary_noise(70, 40), [View((0, 0, 70, 40), (SIZE, SIZE))], PREPROCESSING)
    dirty = packed.pixels.view(3, 40, 128).clone()
    dirty[:, :, 70:] = 255
    other = packed._replace(pixels=dirty.view(-1, 64))
    assert torch.equal(resample(packed, CPU, torch.float32), resample(other, CPU, torch.float32))


def test_only_the_crop_is_packed():
    picture = binary_noise(400, 300)
    torch.manual_seed(1)
    (view,) = RandomCrop()(picture, PREPROCESSING)
    packed = pack(picture, [view], PREPROCESSING)
    _, _, height, width = view.crop
    assert packed.pixels.numel() == 3 * width * -(-height // 64) * 64
    assert packed.views.tolist() == [[height, width, SIZE, SIZE, 0, 0, int(view.flip)]]


@pytest.mark.parametrize("shape", [(100, 133), (133, 100), (56, 56), (57, 57), (301, 97)])
def test_the_centre_view_is_torchvisions(shape):
    (view,) = CentreCrop()(torch.zeros(3, *shape), PREPROCESSING)
    resized = v2.Resize(SIZE)(torch.arange(shape[0] * shape[1]).float().view(1, *shape))
    assert view.scaled == resized.shape[-2:]
    expected = v2.CenterCrop(SIZE)(resized)
    top, left = view.corner
    assert torch.equal(resized[:, top : top + SIZE, left : left + SIZE], expected)


def test_an_empty_batch():
    empty = Packed(
        torch.empty(0, 64, dtype=torch.uint8), torch.empty(0, 7, dtype=torch.int64), PREPROCESSING
    )
    assert resample(empty, CPU, torch.float32).shape == (0, 3, SIZE, SIZE)


@pytest.fixture
def folder(tmp_path):
    """Two classes of six pictures of different sizes."""
    for label, name in enumerate(("dark", "light")):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(6):
            pixels = binary_noise(30 + 5 * number, 60 - 4 * number) // 4 + 120 * label
            image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
            image.save(tmp_path / "data" / name / f"{number}.png")
    return tmp_path


def run(folder, transforms, workers=0):
    config = apply_preset(TrainConfig(out=folder / f"{transforms}{workers}"), "tiny")
    config = replace(
        config,
        clip=ClipConfig("tiny"),
        data=DataConfig(data="folder", root=folder / "data"),
        optim=replace(config.optim, epochs=1, batch=3, warmup_epochs=0),
        machine=replace(config.machine, transforms=transforms, workers=workers, threads=1),
    )
    return config


def test_a_run_with_the_devices_transforms(folder):
    """From the command to the table; the first loss is the host's to the pixels' rounding."""
    losses = {}
    for transforms in ("host", "device"):
        config = run(folder, transforms)
        assert train.main(config) == 0
        record = read_json(config.out / CONFIG)
        assert record["settings"]["machine"]["transforms"] == transforms
        line = (config.out / METRICS).read_text().splitlines()[0]
        losses[transforms] = json.loads(line)["step_loss"]
    # A logit moves by about the relative change of a picture, some 1e-4, times CLIP's scale.
    assert losses["device"][0] == pytest.approx(losses["host"][0], abs=1e-2)


@pytest.mark.slow
def test_packed_batches_come_from_worker_processes(folder):
    """Two processes that import torch; the same bits as from this one."""
    weights = []
    for workers in (0, 2):
        config = run(folder, "device", workers)
        assert train.main(config) == 0
        weights.append(load_tensors(config.out / LEARNED)[0])
    assert all(torch.equal(each, weights[1][name]) for name, each in weights[0].items())


def test_auto_takes_the_host_without_a_gpu(folder):
    expected = "device" if torch.cuda.is_available() else "host"
    assert assemble(run(folder, "auto")).config.machine.transforms == expected


def test_batches_keep_order_and_dtype_on_the_way_to_the_device():
    batches = [
        [torch.full((2, 3, 4, 4), n), torch.tensor([n, n]), torch.tensor([n])] for n in (1, 2)
    ]
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        moved = list(move_batches(batches, torch.device(device), torch.float64))
        assert [each[0].unique().tolist() for each in moved] == [[1.0], [2.0]]
        assert all(each[0].dtype == torch.float64 for each in moved)
        assert [each[1].tolist() for each in moved] == [[1, 1], [2, 2]]
        assert all(part.device.type == device for each in moved for part in each)


def test_features_keep_their_precision_on_the_way_to_a_clip_of_less():
    features = torch.rand(2, 5)
    ((moved, _),) = move_batches([[features, torch.tensor([0, 1])]], CPU, torch.bfloat16)
    assert torch.equal(moved, features)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")
def test_a_gpu_computes_what_the_cpu_does():
    packed = join([PackTransform(PREPROCESSING, CentreCrop())(each) for each in pictures()])
    host = resample(packed, CPU, torch.float32)
    on_gpu = resample(packed, torch.device("cuda"), torch.float32).cpu()
    assert error(on_gpu, host).max() < 0.05


def test_the_progress_line_shows_the_wait_for_data(folder, monkeypatch):
    shown = []

    class Bar(trainer.tqdm):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **{**options, "disable": False})

        def set_postfix(self, **values):
            shown.append(values)

    monkeypatch.setattr(trainer, "tqdm", Bar)
    config = run(folder, "host")
    training = Trainer(assemble(config), config.out)
    training._epoch(0)
    assert len(shown) == len(training.batch_sizes)
    assert all(0 < int(each["waiting_for_data"].rstrip("%")) <= 100 for each in shown)
