"""The things that Spark's pictures show: emoji of Noto Color Emoji, with an English name each.

`things.png` holds them in rows of sixteen, in the order of `THINGS`, 64 x 64 pixels each.
`benchmarks/spark_training/things.py` makes that file from Debian's fonts-noto-color-emoji.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

_ANIMALS = """
mouse 1f401, cow 1f404, tiger 1f405, rabbit 1f407, cat 1f408, dragon 1f409, crocodile 1f40a,
whale 1f433, snail 1f40c, snake 1f40d, horse 1f40e, goat 1f410, sheep 1f411, monkey 1f412,
rooster 1f413, dog 1f415, pig 1f416, elephant 1f418, octopus 1f419, ant 1f41c, bee 1f41d,
ladybird 1f41e, fish 1f420, blowfish 1f421, turtle 1f422, chick 1f424, bird 1f426, penguin 1f427,
koala 1f428, poodle 1f429, camel 1f42b, dolphin 1f42c, frog 1f438, hamster 1f439, wolf 1f43a,
bear 1f43b, panda 1f43c, squirrel 1f43f, crab 1f980, lion 1f981, scorpion 1f982, turkey 1f983,
unicorn 1f984, eagle 1f985, duck 1f986, bat 1f987, shark 1f988, owl 1f989, fox 1f98a,
butterfly 1f98b, deer 1f98c, gorilla 1f98d, lizard 1f98e, rhino 1f98f, shrimp 1f990, squid 1f991,
giraffe 1f992, zebra 1f993, hedgehog 1f994, dinosaur 1f995, kangaroo 1f998, llama 1f999,
peacock 1f99a, hippo 1f99b, parrot 1f99c, raccoon 1f99d, lobster 1f99e, mammoth 1f9a3, swan 1f9a2,
sloth 1f9a5, otter 1f9a6, skunk 1f9a8, flamingo 1f9a9, seal 1f9ad"""
_FOOD_AND_PLANTS = """
cactus 1f335, tulip 1f337, rose 1f339, sunflower 1f33b, palm tree 1f334, mushroom 1f344,
tomato 1f345, grapes 1f347, melon 1f348, watermelon 1f349, lemon 1f34b, banana 1f34c,
pineapple 1f34d, apple 1f34e, pear 1f350, peach 1f351, cherry 1f352, strawberry 1f353,
hamburger 1f354, pizza 1f355, doughnut 1f369, cookie 1f36a, ice cream 1f366, lollipop 1f36d,
honey pot 1f36f, birthday cake 1f382, cupcake 1f9c1, pretzel 1f968, pie 1f967, cheese 1f9c0,
carrot 1f955, broccoli 1f966, avocado 1f951, corn cob 1f33d, aubergine 1f346, pepper 1f336,
onion 1f9c5, garlic 1f9c4, potato 1f954, croissant 1f950, bagel 1f96f, sandwich 1f96a,
coconut 1f965, kiwi 1f95d, mango 1f96d, teapot 1fad6"""
_VEHICLES = """
rocket 1f680, helicopter 1f681, locomotive 1f682, tram 1f68b, bus 1f68c, ambulance 1f691,
fire engine 1f692, police car 1f693, taxi 1f695, car 1f697, truck 1f69a, tractor 1f69c, ship 1f6a2,
speedboat 1f6a4, sailboat 26f5, canoe 1f6f6, bicycle 1f6b2, scooter 1f6f4, motorbike 1f3cd,
racing car 1f3ce, airplane 1f6e9, flying saucer 1f6f8, sled 1f6f7, skateboard 1f6f9,
pickup 1f6fb"""
_OBJECTS = """
balloon 1f388, gift 1f381, pumpkin 1f383, christmas tree 1f384, teddy bear 1f9f8, crown 1f451,
top hat 1f3a9, dress 1f457, shirt 1f455, boot 1f462, shoe 1f45f, handbag 1f45c, backpack 1f392,
ring 1f48d, diamond 1f48e, ghost 1f47b, skull 1f480, alien 1f47d, robot 1f916, light bulb 1f4a1,
bomb 1f4a3, camera 1f4f7, television 1f4fa, radio 1f4fb, telephone 260e, computer 1f4bb,
book 1f4d5, key 1f511, hammer 1f528, magnet 1f9f2, telescope 1f52d, microscope 1f52c,
crystal ball 1f52e, trophy 1f3c6, football 26bd, basketball 1f3c0, guitar 1f3b8, trumpet 1f3ba,
violin 1f3bb, drum 1f941, accordion 1fa97, chair 1fa91, alarm clock 23f0, umbrella 2602,
snowman 26c4, castle 1f3f0, house 1f3e0, tent 26fa, fountain 26f2, anchor 2693, kite 1fa81,
die 1f3b2, candle 1f56f, wheel 1f6de, bell 1f514, lantern 1f3ee, vase 1f3fa, basket 1f9fa,
bucket 1faa3, mailbox 1f4eb, money bag 1f4b0, heart 2764, star 2b50, planet 1fa90"""


def _read(text: str) -> dict[str, int]:
    entries = (entry.split() for entry in text.replace("\n", " ").split(","))
    return {" ".join(words): int(code, 16) for *words, code in entries}


THINGS: dict[str, int] = {
    name: code
    for text in (_ANIMALS, _FOOD_AND_PLANTS, _VEHICLES, _OBJECTS)
    for name, code in _read(text).items()
}
"""The code point of each thing, by name."""
NAMES = tuple(THINGS)
TINTS: dict[str, tuple[float, float, float]] = {
    "red": (0.85, 0.12, 0.12),
    "orange": (0.95, 0.52, 0.10),
    "yellow": (0.93, 0.82, 0.12),
    "green": (0.16, 0.62, 0.22),
    "blue": (0.14, 0.32, 0.88),
    "purple": (0.52, 0.20, 0.72),
    "pink": (0.96, 0.50, 0.75),
}
"""Colours that a thing can have. As a number, 0 is its own colour, and i + 1 the i-th here."""
SIDE = 64
"""Pixels of one side of a thing in the file."""
COLUMNS = 16
FILE = Path(__file__).parent / "things.png"
_LUMA = (0.299, 0.587, 0.114)
_MIDDLE = 0.55  # brightness at which a painted thing has the tint itself
_DISTINCT = 0.17  # mean difference of a painted thing to itself
_SOFT = 5  # standard deviation of a shadow's edge, in pixels of the file


def article(noun: str) -> str:
    """Return a noun with "a" or "an"."""
    return f"{'an' if noun[0] in 'aeio' or noun.startswith('umb') else 'a'} {noun}"


@cache
def pictures() -> Tensor:
    """Return every thing: (kinds, 5, 64, 64) float32 in [0, 1].

    The channels are premultiplied red, green and blue, the opacity, and the opacity of a soft
    shadow.
    """
    sheet = np.asarray(Image.open(FILE).convert("RGBA"), dtype=np.float32) / 255
    rows = len(sheet) // SIDE
    tiles = sheet.reshape(rows, SIDE, COLUMNS, SIDE, 4).transpose(0, 2, 4, 1, 3)
    things = torch.from_numpy(tiles.reshape(-1, 4, SIDE, SIDE)[: len(THINGS)].copy())
    colour, opacity = things[:, :3], things[:, 3:]
    reach = torch.arange(-3 * _SOFT, 3 * _SOFT + 1)
    bell = torch.exp(-(reach**2) / (2 * _SOFT**2))
    bell = (bell / bell.sum())[None, None, None]
    rows_softened = functional.conv2d(opacity, bell, padding="same")
    shadow = functional.conv2d(rows_softened, bell.mT, padding="same")
    return torch.cat([colour * opacity, opacity, shadow], 1)


def painted(sprite: Tensor, tint: Tensor, shade: Tensor) -> Tensor:
    """Paint sprites in a colour: dark parts stay dark, and light parts stay light."""
    table = torch.tensor([(0.0, 0.0, 0.0), *TINTS.values()], device=sprite.device)
    colour = table[tint] * (1 + 0.16 * shade[:, None])
    opacity = sprite[:, 3:4].clamp_min(1e-4)
    light = luma(sprite[:, :3] / opacity).clamp(0, 1)
    colour = colour[:, :, None, None]
    painted = torch.where(
        light < _MIDDLE,
        colour * (0.25 + light / _MIDDLE * 0.75),
        colour + (1 - colour) * (light - _MIDDLE),
    )
    painted = painted.clamp(0, 1) * sprite[:, 3:4]
    mixed = torch.where((tint > 0)[:, None, None, None], painted, sprite[:, :3])
    return torch.cat([mixed, sprite[:, 3:]], 1)


def luma(picture: Tensor) -> Tensor:
    """Return the brightness of (N, 3, H, W): (N, 1, H, W)."""
    weights = torch.tensor(_LUMA, device=picture.device)[:, None, None]
    return (picture * weights).sum(1, keepdim=True)


@cache
def distinct() -> Tensor:
    """Whether a thing in a tint looks unlike itself: (kinds, tints + 1) bool; True for no tint.

    A yellow lemon that is painted yellow would be a change that nobody can see.
    """
    sprites = pictures()
    columns = [torch.ones(len(sprites), dtype=torch.bool)]
    cover = sprites[:, 3].sum((1, 2))
    for tint in range(1, len(TINTS) + 1):
        which = torch.full((len(sprites),), tint)
        coloured = painted(sprites, which, torch.zeros(len(sprites)))
        error = (coloured[:, :3] - sprites[:, :3]).abs().sum((1, 2, 3)) / 3 / cover
        columns.append(error > _DISTINCT)
    return torch.stack(columns, 1)
