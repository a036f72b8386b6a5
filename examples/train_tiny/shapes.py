"""Pictures of coloured shapes and clips of one that moves: what kimi-tiny learns to see.

    draw_scene([Shape("red", "circle", "left"), ...], rng)     a PIL image
    draw_clip(Shape("blue", "square"), "right", ...)           a list of PIL images

A picture is a 3 x 3 field of places. Sizes, positions, colours and the background vary a little, so no two pictures are
the same array.
"""

import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 70),
    "blue": (40, 80, 220),
    "yellow": (240, 200, 40),
    "purple": (150, 60, 190),
    "black": (30, 30, 30),
}
SHAPES = ("circle", "square", "triangle")
PLACES = {
    "at the top left": (0, 0),
    "at the top": (1, 0),
    "at the top right": (2, 0),
    "on the left": (0, 1),
    "in the middle": (1, 1),
    "on the right": (2, 1),
    "at the bottom left": (0, 2),
    "at the bottom": (1, 2),
    "at the bottom right": (2, 2),
}
DIRECTIONS = {
    "from left to right": (1, 0),
    "from right to left": (-1, 0),
    "from top to bottom": (0, 1),
    "from bottom to top": (0, -1),
}
SIZE = 84  # pixels: 6 x 6 patches, 9 tokens, one for each place


@dataclass(frozen=True)
class Shape:
    colour: str
    shape: str
    place: str = "in the middle"

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


def draw_shape(image: Image.Image, shape: Shape, x: float, y: float, radius: float, colour: tuple) -> None:
    """Centred at (x, y) pixels; `radius` is that of the circle, and half the side of the square."""
    draw = ImageDraw.Draw(image)
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape.shape == "circle":
        draw.ellipse(box, fill=colour)
    elif shape.shape == "square":
        draw.rectangle(box, fill=colour)
    else:
        draw.polygon([(x, y - radius), (x + radius, y + radius), (x - radius, y + radius)], fill=colour)


def nearby(colour: tuple[int, int, int], rng: random.Random, spread: int = 15) -> tuple[int, ...]:
    return tuple(min(255, max(0, value + rng.randint(-spread, spread))) for value in colour)


def background(rng: random.Random, size: int = SIZE) -> Image.Image:
    grey = rng.randint(225, 255)
    return Image.new("RGB", (size, size), nearby((grey, grey, grey), rng, 5))


def draw_scene(shapes: list[Shape], rng: random.Random, size: int = SIZE) -> Image.Image:
    """Each shape in its ninth of the picture."""
    image, cell = background(rng, size), size / 3
    for shape in shapes:
        column, row = PLACES[shape.place]
        radius = cell * rng.uniform(0.3, 0.46)
        slack = cell / 2 - radius
        x = (column + 0.5) * cell + rng.uniform(-slack, slack)
        y = (row + 0.5) * cell + rng.uniform(-slack, slack)
        draw_shape(image, shape, x, y, radius, nearby(COLOURS[shape.colour], rng))
    return image


def along(progress: float) -> float:
    """Where on its way, from -1 to 1, a shape is after this share of its time: it starts and stops gently."""
    return -math.cos(math.pi * min(1.0, max(0.0, progress)))


def place_on_the_way(direction: str, progress: float) -> str:
    """The name of the third of the picture where the shape of a clip then is."""
    (dx, dy), position = DIRECTIONS[direction], along(progress)
    third = -1 if position < -0.3 else 1 if position > 0.3 else 0
    return next(name for name, place in PLACES.items() if place == (1 + dx * third, 1 + dy * third))


def draw_clip(
    shape: Shape,
    direction: str,
    starts: float,
    lasts: float,
    num_frames: int,
    rng: random.Random,
    size: int = SIZE,
) -> list[Image.Image]:
    """The shape rests, crosses the picture in `lasts` frames from frame `starts` on, and rests again."""
    dx, dy = DIRECTIONS[direction]
    radius, colour = size * rng.uniform(0.12, 0.17), nearby(COLOURS[shape.colour], rng)
    across = rng.uniform(-0.15, 0.15) * size
    reach = size / 2 - radius - rng.uniform(1, 6)
    empty, frames = background(rng, size), []
    for index in range(num_frames):
        way = reach * along((index - starts) / lasts)
        x = size / 2 + (dx * way if dx else across)
        y = size / 2 + (dy * way if dy else across)
        frame = empty.copy()
        draw_shape(frame, shape, x, y, radius, colour)
        frames.append(frame)
    return frames
