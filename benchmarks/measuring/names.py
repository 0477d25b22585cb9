"""Class names, so that a benchmark needs no data set: Caltech101's in label order, ImageNet's."""

from collections.abc import Sequence

import open_clip

TEMPLATE = "a photo of a {}."
CALTECH101 = tuple(
    name.strip()
    for name in """
face, leopard, motorbike, accordion, airplane, anchor, ant, barrel, bass, beaver, binocular,
bonsai, brain, brontosaurus, buddha, butterfly, camera, cannon, car side, ceiling fan,
cellphone, chair, chandelier, cougar body, cougar face, crab, crayfish, crocodile, crocodile
head, cup, dalmatian, dollar bill, dolphin, dragonfly, electric guitar, elephant, emu,
euphonium, ewer, ferry, flamingo, flamingo head, garfield, gerenuk, gramophone, grand piano,
hawksbill, headphone, hedgehog, helicopter, ibis, inline skate, joshua tree, kangaroo, ketch,
lamp, laptop, llama, lobster, lotus, mandolin, mayfly, menorah, metronome, minaret, nautilus,
octopus, okapi, pagoda, panda, pigeon, pizza, platypus, pyramid, revolver, rhino, rooster,
saxophone, schooner, scissors, scorpion, sea horse, snoopy, soccer ball, stapler, starfish,
stegosaurus, stop sign, strawberry, sunflower, tick, trilobite, umbrella, watch, water lilly,
wheelchair, wild cat, windsor chair, wrench, yin yang
""".replace("\n", " ").split(",")
)


def numbered(names: Sequence[str], count: int) -> tuple[str, ...]:
    """The first ``count`` names; beyond their end they begin again, each with a number."""
    rounds = range(-(-count // len(names)))
    return tuple(f"{name} {each}" if each else name for each in rounds for name in names)[:count]


def base_and_new(count: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """``count`` trained classes and as many others: Caltech101's, or ImageNet's beyond its end."""
    known = CALTECH101 if count <= len(CALTECH101) else open_clip.IMAGENET_CLASSNAMES
    names = numbered(known, 2 * count)
    return names[:count], names[count:]
