"""Sampled views as pictures: grids with labels for people, tiles without for programs."""

from collections.abc import Sequence

import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor


def preview_grid(
    rows: Sequence[tuple[str, Tensor]], pictures: Tensor, names: Sequence[str], scale_to: int = 128
) -> Image.Image:
    """One block per object, one row per kind of views, the input picture at the left.

    rows: (label, [B, V, 3, S, S] in [0, 1]). pictures: [B, 3, S, S], what was given. names: of the views.
    scale_to: side of a tile in pixels at least.
    """
    objects, views, _, size, _ = rows[0][1].shape
    tile = size * max(1, -(-scale_to // size))
    margin, header, gap = 92, 18, 10
    width = margin + (views + 1) * tile
    height = header + objects * (len(rows) * tile + gap)
    grid = Image.new("RGB", (width, height), "white")
    ink, font = ImageDraw.Draw(grid), ImageFont.load_default()
    for column, name in enumerate(("input", *names)):
        ink.text((margin + column * tile + 4, 3), name, fill="black", font=font)
    for b in range(objects):
        for r, (label, sampled) in enumerate(rows):
            y = header + b * (len(rows) * tile + gap) + r * tile
            ink.text((4, y + tile // 2 - 6), label, fill="black", font=font)
            for v in range(views):
                grid.paste(_tile(sampled[b, v], tile), (margin + (v + 1) * tile, y))
        grid.paste(_tile(pictures[b], tile), (margin, header + b * (len(rows) * tile + gap)))
    return grid


def preview_tiles(rows: Sequence[Tensor], pictures: Tensor) -> Image.Image:
    """The grid without words or margins: for each object a line of tiles [S, S] per kind of views, its input picture first.

    rows: [B, V, 3, S, S] in [0, 1] each. pictures: [B, 3, S, S].
    """
    given = pictures[:, None].cpu()
    tiles = torch.stack([torch.cat([given, views.cpu()], dim=1) for views in rows], dim=1)  # B rows 1+V 3 S S
    pixels = (tiles.clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(rearrange(pixels, "b r v c h w -> (b r h) (v w) c").numpy())


def _tile(picture: Tensor, side: int) -> Image.Image:
    pixels = (picture.clamp(0, 1) * 255).round().to("cpu", torch.uint8).permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
