"""Each picture through the frozen encoders once, not every step."""

from collections.abc import Sequence

import torch
from tqdm import tqdm

from softprompt.conditioning import EncodedViews, encode_views
from softprompt.data import Source, backgrounds, composite, pick_background
from softprompt.pipeline import Pipeline


class EncodedObjects:
    """A source of samples, encoded: in memory, once per object and background.

    background: one of softprompt.data's. Where any colour may come (`random`) nothing can be kept, and each object is encoded
    anew each time it is asked for.
    """

    def __init__(self, source: Source, pipeline: Pipeline, background: str) -> None:
        self.source = source
        self.pipeline = pipeline
        self.background = background
        self._encoded: dict[tuple[int, tuple[float, ...]], EncodedViews] = {}

    def __len__(self) -> int:
        return len(self.source)

    @property
    def names(self) -> Sequence[str]:
        """Of the samples."""
        return self.source.names

    def fill(self, *, progress: bool) -> None:
        """Read every sample now, so that a broken picture stops the run before it starts; encode it where that can be kept.

        progress: show a bar. Raises: InputError naming the first sample that cannot be used.
        """
        colours = backgrounds(self.background)
        for index in tqdm(
            range(len(self)), desc="encoding pictures", unit="object", disable=not progress, leave=False, delay=2
        ):
            rgba = self.source.load(index)
            for colour in colours or []:
                self._encoded[index, _key(colour)] = encode_views(self.pipeline, composite(rgba, colour))

    def get(self, index: int, generator: torch.Generator) -> EncodedViews:
        """Object `index` on a background drawn from `generator`."""
        colour = pick_background(self.background, generator)
        kept = self._encoded.get((index, _key(colour)))
        return kept or encode_views(self.pipeline, composite(self.source.load(index), colour))

    def pictures(self, index: int, generator: torch.Generator) -> torch.Tensor:
        """[V, 3, S, S] in [0, 1]: the pictures themselves, on a background drawn from `generator`."""
        return composite(self.source.load(index), pick_background(self.background, generator))

    def masks(self, index: int) -> torch.Tensor:
        """[V, 1, S, S] in [0, 1]: where the object is; 1 throughout for pictures without alpha."""
        return self.source.load(index)[:, 3:].float() / 255


def _key(colour: torch.Tensor) -> tuple[float, ...]:
    return tuple(colour.tolist())
