"""The shapes of the micro world's objects: heads, cats and mice as lists of coloured ellipsoids.

Object space is right-handed: x to the right as the front camera sees it, y away from that camera, z up. An object faces
-y. Units are arbitrary: the renderer scales each object to its frame.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Colour = tuple[float, float, float]

DARK: Colour = (0.06, 0.05, 0.06)


class Dice:
    """Uniform random numbers of one object: the same on every machine."""

    def __init__(self, *key: int) -> None:
        self._generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))

    def __call__(self, low: float, high: float) -> float:
        return low + (high - low) * float(self._generator.random())

    def pick(self, choices: list[Colour], spread: float = 0.0) -> Colour:
        """One of the colours, each channel moved by up to `spread`, all alike by as much again."""
        colour = choices[min(int(self(0, len(choices))), len(choices) - 1)]
        light = self(-spread, spread)
        red, green, blue = (min(max(c + light + self(-spread, spread), 0.0), 1.0) for c in colour)
        return red, green, blue


@dataclass(frozen=True)
class Part:
    """One ellipsoid."""

    centre: Colour | Array
    radii: tuple[float, float, float]
    colour: Colour
    below: Colour | None = None
    """Colour of the underside, where it is another (a pale belly)."""
    tilt: float = 0.0
    """Rotation about the x axis in radians: positive lifts the front (-y) end."""
    yaw: float = 0.0
    """Rotation about the z axis in radians, after the tilt."""
    roll: float = 0.0
    """Rotation about the y axis in radians, before the tilt: positive leans the top toward +x."""
    furry: bool = False
    """Takes part in the object's fur pattern."""

    def axes(self) -> Array:
        """[3, 3], columns are the ellipsoid's axes in object space."""
        (cr, sr), (ct, st), (cy, sy) = ((np.cos(a), np.sin(a)) for a in (self.roll, -self.tilt, self.yaw))
        roll = np.array([[cr, 0, sr], [0, 1, 0], [-sr, 0, cr]])
        tilt = np.array([[1, 0, 0], [0, ct, -st], [0, st, ct]])
        yaw = np.array([[cy, -sy, 0], [sy, cy, 0], [0, 0, 1]])
        return yaw @ tilt @ roll


@dataclass(frozen=True)
class Fur:
    """A pattern that multiplies the brightness of furry parts, a function of the place on the object."""

    stripes: float = 0.0
    """Depth of stripes across the body, 0 none .. 1 black."""
    stripe_frequency: float = 0.0
    """Stripes per unit of length, times 2 pi."""
    mottle: float = 0.0
    """Depth of irregular patches."""
    phases: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Where the pattern starts along each axis."""


@dataclass(frozen=True)
class Shape:
    """An object: its parts, and the pattern of its fur."""

    parts: list[Part]
    fur: Fur


def head(dice: Dice) -> Shape:
    """A person's head with hair, face, neck and shirt."""
    skin = dice.pick([(0.95, 0.78, 0.66), (0.82, 0.60, 0.45), (0.55, 0.36, 0.26), (0.90, 0.70, 0.55)], 0.04)
    hair = dice.pick([(0.12, 0.09, 0.08), (0.40, 0.24, 0.12), (0.85, 0.68, 0.30), (0.70, 0.25, 0.12), (0.6, 0.6, 0.62)], 0.05)
    shirt = dice.pick([(0.2, 0.4, 0.8), (0.8, 0.2, 0.25), (0.2, 0.6, 0.35), (0.85, 0.75, 0.3), (0.5, 0.3, 0.6)], 0.1)
    iris = dice.pick([(0.10, 0.08, 0.07), (0.12, 0.22, 0.40), (0.12, 0.28, 0.14)], 0.02)
    lips = (skin[0] * 0.85, skin[1] * 0.50, skin[2] * 0.52)
    wide, tall, eye, length = dice(0.70, 0.84), dice(0.95, 1.12), dice(0.09, 0.13), dice(0.0, 1.0)
    parts = [
        Part((0, 0, 0), (wide, 0.86, tall), skin),
        Part((0, 0.22, 0.20), (wide * 1.10, 0.88, tall * 1.0), hair),  # hair: behind and above, the face stays free
        Part((0, -0.88, -0.12), (dice(0.10, 0.15), 0.20, 0.18), (skin[0] * 0.9, skin[1] * 0.85, skin[2] * 0.83)),
        Part((0, -0.70, -0.52), (dice(0.18, 0.28), 0.14, 0.055), lips),
        Part((0, 0.12, -1.05), (0.36, 0.36, 0.5), skin),
        Part((0, 0.18, -1.55), (dice(0.95, 1.15), 0.55, 0.36), shirt),
    ]
    if length > 0.35:  # hair down the neck
        parts.append(Part((0, 0.55, -0.25 - 0.55 * length), (wide * 0.95, 0.42, 0.55 + 0.35 * length), hair))
    elif dice(0, 1) > 0.5:  # a bun
        parts.append(Part((0, 0.95, 0.65), (0.36, 0.36, 0.36), hair))
    for side in (-1, 1):
        parts += [
            Part((side * wide, 0.05, -0.05), (0.12, 0.17, 0.25), skin),
            Part((side * 0.31, -0.76, 0.13), (0.17, 0.10, 0.11), (0.97, 0.97, 0.97)),
            Part((side * 0.31, -0.84, 0.13), (eye, 0.07, eye), iris),
            Part((side * 0.31, -0.78, 0.33), (0.19, 0.08, 0.045), hair),
        ]
    return Shape(parts, Fur())


def cat(dice: Dice) -> Shape:
    """A cat that stands, tail up."""
    coat = dice.pick([(0.85, 0.55, 0.25), (0.45, 0.42, 0.40), (0.80, 0.72, 0.60), (0.30, 0.22, 0.17), (0.62, 0.48, 0.34)], 0.06)
    pale = dice.pick([(0.95, 0.92, 0.87), (coat[0] * 0.8 + 0.2, coat[1] * 0.8 + 0.2, coat[2] * 0.8 + 0.2)], 0.02)
    iris = dice.pick([(0.55, 0.75, 0.20), (0.85, 0.65, 0.15), (0.30, 0.60, 0.75)], 0.04)
    inner = (0.85, 0.55, 0.52)
    fat, leg, curl = dice(0.42, 0.54), dice(0.46, 0.58), dice(-0.5, 0.5)
    face = (0.0, -1.02, 0.64)
    parts = [
        Part((0, 0.1, 0), (fat, 0.84, fat * 1.02), coat, below=pale, tilt=0.06, furry=True),
        Part((0, -0.56, 0.16), (fat * 0.82, 0.45, fat), coat, below=pale, tilt=0.5, furry=True),  # chest and neck
        Part(face, (0.54, 0.45, 0.47), coat, furry=True),
        Part((0, face[1] - 0.35, face[2] - 0.14), (0.25, 0.18, 0.17), pale),  # muzzle
        Part((0, face[1] - 0.52, face[2] - 0.06), (0.075, 0.05, 0.055), inner),
    ]
    for side in (-1, 1):
        parts += [
            Part((side * 0.33, face[1] + 0.05, face[2] + 0.45), (0.16, 0.10, 0.30), coat, roll=side * 0.3),
            Part((side * 0.33, face[1] - 0.03, face[2] + 0.43), (0.10, 0.06, 0.22), inner, roll=side * 0.3),
            Part((side * 0.20, face[1] - 0.375, face[2] + 0.09), (0.115, 0.07, 0.105), iris),
            Part((side * 0.20, face[1] - 0.43, face[2] + 0.09), (0.05, 0.04, 0.085), DARK),
            Part((side * fat * 0.55, -0.54, -0.28 - leg / 2), (0.15, 0.17, leg), coat, below=pale, furry=True),
            Part((side * fat * 0.62, 0.62, -0.25 - leg / 2), (0.18, 0.24, leg * 1.02), coat, below=pale, furry=True),
        ]
    for i in range(5):  # the tail: up, and to one side
        t = i / 4
        centre = (curl * t * t, 0.92 + 0.34 * t - 0.20 * t * t, 0.25 + 0.95 * t)
        parts.append(Part(centre, (0.12, 0.14, 0.24), coat, roll=curl * t, tilt=-0.5 + 0.6 * t, furry=True))
    fur = Fur(
        stripes=dice(0.15, 0.5) if dice(0, 1) > 0.4 else 0.0,
        stripe_frequency=dice(9, 12),
        mottle=dice(0.05, 0.18),
        phases=(dice(0, 6.28), dice(0, 6.28), dice(0, 6.28)),
    )
    return Shape(parts, fur)


def mouse(dice: Dice) -> Shape:
    """A mouse on the floor, its tail behind it."""
    coat = dice.pick([(0.45, 0.38, 0.33), (0.62, 0.50, 0.38), (0.30, 0.28, 0.28), (0.90, 0.88, 0.85), (0.55, 0.55, 0.57)], 0.05)
    pale = (coat[0] * 0.6 + 0.38, coat[1] * 0.6 + 0.36, coat[2] * 0.6 + 0.34)
    pink = dice.pick([(0.92, 0.66, 0.62), (0.80, 0.58, 0.55)], 0.03)
    fat, long, ear = dice(0.62, 0.76), dice(0.72, 0.86), dice(0.31, 0.40)
    bend = dice(0.8, 1.9) * (1 if dice(0, 1) > 0.5 else -1)
    face_y, face_z = -long - 0.12, -0.08
    parts = [
        Part((0, 0.12, 0), (fat, long, fat * 0.88), coat, below=pale, furry=True),
        Part((0, 0.42, -0.02), (fat * 1.1, 0.58, fat * 0.92), coat, below=pale, furry=True),  # haunches
        Part((0, face_y, face_z), (0.35, 0.46, 0.34), coat, below=pale, tilt=-0.2, furry=True),
        Part((0, face_y - 0.34, face_z - 0.12), (0.17, 0.28, 0.15), coat, below=pale, tilt=-0.25),
        Part((0, face_y - 0.61, face_z - 0.16), (0.075, 0.07, 0.065), pink),
    ]
    for side in (-1, 1):
        parts += [
            Part((side * 0.33, face_y + 0.17, face_z + 0.34), (ear, 0.09, ear), coat, roll=side * 0.25, yaw=side * 0.35),
            Part(
                (side * 0.33, face_y + 0.12, face_z + 0.34),
                (ear * 0.72, 0.07, ear * 0.72),
                pink,
                roll=side * 0.25,
                yaw=side * 0.35,
            ),
            Part((side * 0.235, face_y - 0.23, face_z + 0.10), (0.085, 0.10, 0.09), DARK),
            Part((side * fat * 0.72, -long * 0.62, -fat * 0.74), (0.12, 0.22, 0.09), pink),
            Part((side * fat * 0.95, 0.36, -fat * 0.74), (0.14, 0.30, 0.10), pink),
        ]
    count = 8
    x, y = 0.0, long + 0.12
    for i in range(count):  # the tail: along the floor, in an arc to one side
        t = i / (count - 1)
        thick, turn = 0.13 - 0.07 * t, bend * t
        parts.append(Part((x, y, -fat * 0.62), (thick, 0.15, thick), pink, yaw=-turn))
        x, y = x + 0.16 * np.sin(turn), y + 0.16 * np.cos(turn)
    fur = Fur(mottle=dice(0.06, 0.2), phases=(dice(0, 6.28), dice(0, 6.28), dice(0, 6.28)))
    return Shape(parts, fur)


def bird(dice: Dice) -> Shape:
    """A bird that stands, its wings folded."""
    coat = dice.pick([(0.25, 0.40, 0.70), (0.75, 0.25, 0.20), (0.35, 0.30, 0.26), (0.85, 0.70, 0.20), (0.25, 0.50, 0.35)], 0.06)
    belly = dice.pick(
        [(0.93, 0.90, 0.84), (0.90, 0.62, 0.35), (coat[0] * 0.7 + 0.25, coat[1] * 0.7 + 0.25, coat[2] * 0.7 + 0.25)], 0.02
    )
    horn = dice.pick([(0.90, 0.62, 0.15), (0.25, 0.22, 0.20), (0.80, 0.42, 0.22)], 0.03)
    wing = (coat[0] * 0.65, coat[1] * 0.65, coat[2] * 0.65)
    fat, beak, tail = dice(0.50, 0.62), dice(0.14, 0.24), dice(0.40, 0.60)
    parts = [
        Part((0, 0.05, 0), (fat, 0.78, fat * 0.95), coat, below=belly, tilt=0.45, furry=True),
        Part((0, -0.62, 0.62), (0.38, 0.40, 0.38), coat, below=belly, furry=True),
        Part((0, -1.0 - beak / 2, 0.56), (0.10, beak, 0.08), horn, tilt=-0.15),
        Part((0, 0.80, -0.34), (0.22, tail, 0.08), wing, tilt=0.45),
    ]
    for side in (-1, 1):
        parts += [
            Part((side * fat * 0.86, 0.15, 0.02), (0.13, 0.62, 0.34), wing, tilt=0.5, yaw=side * -0.12),
            Part((side * 0.26, -0.86, 0.72), (0.07, 0.08, 0.08), DARK),
            Part((side * 0.22, 0.08, -0.78), (0.06, 0.06, 0.36), horn),
            Part((side * 0.22, -0.06, -1.12), (0.13, 0.24, 0.05), horn),
        ]
    return Shape(parts, Fur(mottle=dice(0.05, 0.2), phases=(dice(0, 6.28), dice(0, 6.28), dice(0, 6.28))))


def rabbit(dice: Dice) -> Shape:
    """A rabbit that sits, ears up."""
    coat = dice.pick([(0.70, 0.60, 0.48), (0.55, 0.52, 0.50), (0.92, 0.90, 0.87), (0.42, 0.32, 0.24), (0.25, 0.24, 0.25)], 0.05)
    pale = (coat[0] * 0.5 + 0.46, coat[1] * 0.5 + 0.45, coat[2] * 0.5 + 0.43)
    inner = dice.pick([(0.90, 0.66, 0.64), (0.80, 0.60, 0.56)], 0.03)
    fat, ear, lean = dice(0.56, 0.68), dice(0.52, 0.70), dice(0.05, 0.35)
    face_y, face_z = -0.78, 0.50
    parts = [
        Part((0, 0.22, 0), (fat, 0.72, fat), coat, below=pale, tilt=0.2, furry=True),
        Part((0, -0.40, 0.05), (fat * 0.74, 0.42, fat * 0.85), coat, below=pale, tilt=0.5, furry=True),
        Part((0, face_y, face_z), (0.38, 0.42, 0.38), coat, furry=True),
        Part((0, face_y - 0.33, face_z - 0.12), (0.22, 0.16, 0.16), pale),
        Part((0, face_y - 0.48, face_z - 0.05), (0.06, 0.05, 0.05), inner),
        Part((0, 0.95, 0.05), (0.22, 0.20, 0.22), (0.96, 0.95, 0.93)),
    ]
    for side in (-1, 1):
        parts += [
            Part((side * 0.18, face_y + 0.14, face_z + 0.28 + ear), (0.12, 0.08, ear), coat, roll=side * lean),
            Part((side * 0.18, face_y + 0.08, face_z + 0.28 + ear), (0.07, 0.05, ear * 0.8), inner, roll=side * lean),
            Part((side * 0.30, face_y - 0.16, face_z + 0.10), (0.07, 0.10, 0.10), DARK),
            Part((side * fat * 0.82, 0.42, -0.26), (0.24, 0.44, 0.38), coat, furry=True),
            Part((side * fat * 0.72, 0.10, -0.62), (0.16, 0.44, 0.11), pale),
            Part((side * 0.26, -0.58, -0.46), (0.13, 0.18, 0.30), coat),
        ]
    return Shape(parts, Fur(mottle=dice(0.05, 0.22), phases=(dice(0, 6.28), dice(0, 6.28), dice(0, 6.28))))


def fox(dice: Dice) -> Shape:
    """A fox that stands, its brush behind it."""
    coat = dice.pick([(0.82, 0.42, 0.16), (0.72, 0.34, 0.14), (0.60, 0.58, 0.57), (0.90, 0.56, 0.24)], 0.05)
    white = dice.pick([(0.96, 0.94, 0.90), (0.90, 0.86, 0.80)], 0.02)
    sock = (0.14, 0.11, 0.10)
    slim, leg, sway, brush = dice(0.34, 0.42), dice(0.40, 0.50), dice(-0.5, 0.5), dice(0.20, 0.27)
    face_y, face_z = -1.05, 0.52
    parts = [
        Part((0, 0, 0), (slim, 0.86, slim * 1.05), coat, below=white, furry=True),
        Part((0, -0.66, 0.18), (slim * 0.85, 0.42, slim), coat, below=white, tilt=0.6, furry=True),
        Part((0, face_y, face_z), (0.40, 0.36, 0.34), coat, below=white, furry=True),
        Part((0, face_y - 0.42, face_z - 0.12), (0.15, 0.36, 0.13), coat, below=white, tilt=-0.15),
        Part((0, face_y - 0.76, face_z - 0.14), (0.07, 0.06, 0.06), DARK),
    ]
    for side in (-1, 1):
        parts += [
            Part((side * 0.27, face_y + 0.08, face_z + 0.38), (0.15, 0.08, 0.28), coat, roll=side * 0.3),
            Part((side * 0.27, face_y + 0.03, face_z + 0.36), (0.09, 0.06, 0.19), sock, roll=side * 0.3),
            Part((side * 0.20, face_y - 0.29, face_z + 0.07), (0.07, 0.07, 0.07), DARK),
            Part((side * slim * 0.6, -0.52, -0.30 - leg / 2), (0.11, 0.13, leg), sock),
            Part((side * slim * 0.65, 0.58, -0.28 - leg / 2), (0.13, 0.18, leg), coat, below=sock),
        ]
    for i in range(5):  # the brush: back, down and to one side, its end white
        t = i / 4
        centre = (sway * t * t, 0.86 + 0.85 * t, 0.05 - 0.30 * t)
        thick = brush * (0.6 + 1.1 * t - 0.9 * t * t)
        parts.append(Part(centre, (thick, 0.26, thick), white if i == 4 else coat, yaw=-sway * t, tilt=-0.3, furry=i < 4))
    return Shape(parts, Fur(mottle=dice(0.05, 0.15), phases=(dice(0, 6.28), dice(0, 6.28), dice(0, 6.28))))


SHAPES: dict[str, Callable[[Dice], Shape]] = {
    "heads": head,
    "cats": cat,
    "mice": mouse,
    "birds": bird,
    "rabbits": rabbit,
    "foxes": fox,
}
