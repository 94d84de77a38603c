"""Diffusion-DPO, and with chunks Curriculum DPO: ranked pairs of the model's own samples, or of a list on the disk."""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from softprompt.data.cache import EncodedObjects, PictureCache
from softprompt.data.samples import what_moved
from softprompt.data.storage import key_of
from softprompt.errors import InputError, RunError
from softprompt.model.pipeline import Pipeline
from softprompt.objectives.preference import open_pairs, ranked_pairs, stage_at, stages_by_rank, stages_by_reward
from softprompt.objectives.rewards import Reward
from train.objectives.functions import load_reward
from train.objectives.own_samples import OwnSamples, Snapshot, rate
from train.objectives.pairs import ListedPair, Told, doubtful, gaps_of, read_pairs
from train.objectives.preferences import Contest, HeldOut, Predict, PreferenceTerm, sampled
from train.objectives.terms import Context, StepBatch
from train.options.config import Config
from train.options.preferences import OWN, DpoConfig


class Dpo(PreferenceTerm):
    """Pairs of any kind, joining in stages; the reference is the untouched model: adapters off and prompt W_0."""

    name = "dpo"
    options: DpoConfig

    def __init__(self, config: Config) -> None:
        super().__init__(config, config.dpo, start=0.0, guidance_scales=config.dpo.guidance_scales)
        equal_share = math.ceil(config.train.steps / self.options.chunks)
        self._stage_steps = self.options.chunk_steps or equal_share
        self._open: list[list[int]] = []
        """By stage, the pairs that it trains on."""

    def stage(self, step: int) -> int:
        """Which of the curriculum's stages a step belongs to, counted from 0."""
        return stage_at(step, self._stage_steps, self.options.chunks)

    def unreached(self, steps: int) -> list[str]:
        """Warnings where a run of so many steps ends before the curriculum's last stage."""
        last = self.stage(steps - 1) + 1
        if self.weight == 0 or last == self.options.chunks:
            return []
        return [
            f"WARNING    dpo.chunk_steps: is {self._stage_steps}; the run's {steps} steps come to stage {last} of "
            f"{self.options.chunks}, so that harder pairs are never trained on; null shares the steps out"
        ]

    def share_out(self, joins: list[int]) -> None:
        """Take in at which stage each pair joins. Where the first stages have none, they train those of the first that has."""
        self._open = [open_pairs(joins, max(stage, min(joins))) for stage in range(self.options.chunks)]

    @abstractmethod
    def contest(self, context: Context, pair: int, generator: torch.Generator) -> Contest:
        """A pair, its winner first."""

    def turn(self, batch: StepBatch, index: int, generator: torch.Generator) -> Contest:
        """Any of the pairs that are open, each as likely: `index`, whose turn it would be, may have none."""
        del index
        opened = self._open[self.stage(batch.step)]
        return self.contest(batch.context, opened[int(torch.randint(len(opened), (), generator=generator))], generator)

    def regularised_toward(self, context: Context) -> Predict:
        """The untouched model."""
        return context.adapted.reference

    def measured_against(self, context: Context) -> Predict:
        """The pretrained model."""
        return context.adapted.reference


class OwnDpo(Dpo):
    """Every two sample sets that the model made of an object before the first step, ranked by a reward."""

    def __init__(self, config: Config, reward: tuple[str, Reward]) -> None:
        super().__init__(config)
        self._reward = reward
        self._starts_from_export = config.init_from is not None
        self._own: OwnSamples | None = None
        self._pairs: list[tuple[int, int, int]] = []
        """(object, winner, loser)."""

    def open(self, context: Context) -> list[str]:
        """Say what sampling will cost, and what the pairs would not fit. Raises: InputError for a reward that fails."""
        name, reward = self._reward
        truth, masks = (x[None].to(context.accelerator.device) for x in context.train.views(0, torch.Generator()))
        rate(reward, f"{name} of {context.train.names[0]}", 0.9 * truth, truth, masks)  # now, and not once all sets are made
        said = [self.cost_of_samples(context, sets=self.options.samples, rounds=1), *self.unreached(self.end)]
        if self._starts_from_export and self.weight > 0:
            said.append(
                "WARNING    dpo compares with the pretrained model, which did not make these samples: init_from did. Take the "
                "pipeline that that run exported as model, and its prompt as first waypoint, to compare with itself"
            )
        return said

    def kept_bytes(self, context: Context) -> int:
        """The sets."""
        return self.bytes_of_samples(context, sets=self.options.samples)

    def begins(self, step: int) -> bool:
        """Until all sets are there."""
        return self.others is None or (self.weight > 0 and step < self.end and not self._open)

    def begin(self, context: Context, folder: Path, step: int, position: float, stopped: Callable[[], bool]) -> None:
        """Make the sets, and rank them. Raises: RunError where no object has a pair."""
        started = self.take_start(context, step, position)
        if self.others is None:
            self.others = self.samples_of_held_out(context, folder, sets=self.options.samples, reward=self._reward)
            held_out = [self._held_out_contest(self.others, index) for index in range(len(self.others))]
            self.held_out = [one for one in held_out if one.pairs]
        if self.weight > 0 and step < self.end:
            self._own = self.samples_of_training(
                context, folder, "own", started, sets=self.options.samples, reward=self._reward
            )
            if self._own.fill(stopped=stopped, what="dpo: own samples"):
                self._rank(self._own)

    def _held_out_contest(self, others: OwnSamples, index: int) -> HeldOut:
        encoded, reference = others.given(index)
        sides = tuple(sampled(latents) for latents in others.latents(index))
        pairs = ranked_pairs(others.rewards(index), min_gap=self.options.min_gap)
        return HeldOut(Contest(encoded, reference, sides), tuple((pair.winner, pair.loser) for pair in pairs))

    def _rank(self, own: OwnSamples) -> None:
        rewards = [own.rewards(index) for index in range(len(own))]
        ranked = [(index, p) for index, given in enumerate(rewards) for p in ranked_pairs(given, min_gap=self.options.min_gap)]
        if not ranked:
            widest = max(max(given) - min(given) for given in rewards)
            raise RunError(
                f"dpo.min_gap: is {self.options.min_gap:g}; no two own sample sets of an object are further apart: their "
                f"rewards ({self.options.reward}) differ by {widest:.3g} at most. Expected less than that, or more dpo.samples"
            )
        self._pairs = [(index, pair.winner, pair.loser) for index, pair in ranked]
        if self.options.difficulty == "rank_gap":
            joins = stages_by_rank([pair.ranks for _, pair in ranked], self.options.samples, self.options.chunks)
        else:
            joins = stages_by_reward([pair.reward for _, pair in ranked], self.options.chunks, self.options.chunk_by)
        self.share_out(joins)

    def contest(self, context: Context, pair: int, generator: torch.Generator) -> Contest:
        """Two sets of one object, given the picture that they were made from."""
        del context, generator
        assert self._own is not None, "the pairs were made of it"
        index, winner, loser = self._pairs[pair]
        encoded, reference = self._own.given(index)
        latents = self._own.latents(index)
        return Contest(encoded, reference, (sampled(latents[winner]), sampled(latents[loser])))

    def state(self) -> dict[str, Any]:
        """The model that made the sets, so that one that is lost can be made again."""
        return {} if self.started_from is None else {"start": self.started_from.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state`."""
        self.started_from = Snapshot.from_state(state["start"])


class ListedDpo(Dpo):
    """Pairs that somebody has ranked; any of data.reference_view is given."""

    def __init__(self, config: Config, pipeline: Pipeline) -> None:
        """Raises: InputError for a list that cannot be used."""
        super().__init__(config)
        cache = None if config.data.cache is None else PictureCache(Path(config.data.cache), pipeline)
        self._pairs, self._samples = self._read("dpo.pairs", self.options.pairs, config, pipeline, cache)
        gaps = gaps_of(self._pairs, "dpo.pairs") if self._ranks else [0.0] * len(self._pairs)
        if self.options.chunks > (different := len(set(gaps))):
            raise InputError(
                f"dpo.chunks: is {self.options.chunks}; the pairs of {self.options.pairs} have {different} different gaps; "
                f"expected as many chunks at most, since further ones would be empty"
            )
        self.share_out(stages_by_reward(gaps, self.options.chunks, self.options.chunk_by))
        names = self._samples.names
        rows = [(names[pair.input], names[pair.winner], names[pair.loser], str(pair.gap)) for pair in self._pairs]
        self._key = key_of(*(part for row in rows for part in row)).hex()
        self._others: list[ListedPair] = []
        self._other_samples: EncodedObjects | None = None
        if self.options.held_out_pairs is not None:
            self._others, self._other_samples = self._read(
                "dpo.held_out_pairs", self.options.held_out_pairs, config, pipeline, cache
            )

    def _doubtful(self) -> list[str]:
        def told(pairs: list[ListedPair], samples: EncodedObjects | None) -> list[Told]:
            folders = [] if samples is None else samples.source.locations
            return [(folders[pair.input], folders[pair.winner], folders[pair.loser]) for pair in pairs]

        return doubtful(told(self._pairs, self._samples), told(self._others, self._other_samples))

    @property
    def _ranks(self) -> bool:
        """Whether it matters how far apart pairs are."""
        return self.options.chunks > 1 or self.options.min_gap > 0

    def _read(
        self, option: str, path: str, config: Config, pipeline: Pipeline, cache: PictureCache | None
    ) -> tuple[list[ListedPair], EncodedObjects]:
        """The pairs of a list that are no near-ties, and the samples that it names."""
        listed = read_pairs(path, size=pipeline.picture_size, num_views=pipeline.num_views, option=option)
        gaps = gaps_of(listed.pairs, option) if self._ranks else [math.inf] * len(listed.pairs)
        kept = [pair for pair, gap in zip(listed.pairs, gaps, strict=True) if gap > self.options.min_gap]
        if not kept:
            raise InputError(f"dpo.min_gap: is {self.options.min_gap:g}; no pair of {path} is further apart")
        return kept, EncodedObjects(listed.samples, pipeline, config.data.still_background, cache)

    def open(self, context: Context) -> list[str]:
        """Encode the samples. Raises: InputError naming a picture that cannot be used, or where nothing is left to do."""
        if self.weight == 0 and self._other_samples is None:
            raise InputError(
                "monitor.objectives: has dpo, and dpo.pairs is a list; expected dpo.held_out_pairs, another one to measure on"
            )
        accelerator = context.accelerator
        for option, samples in (("dpo.pairs", self._samples), ("dpo.held_out_pairs", self._other_samples)):
            if samples is None:
                continue
            share = (accelerator.process_index, accelerator.num_processes) if samples.cache is not None else (0, 1)
            try:
                samples.fill(progress=accelerator.is_main_process, share=share)
            except InputError as error:
                raise InputError(f"{option}: {error}") from error
            accelerator.wait_for_everyone()
            if samples.cache is not None:
                samples.cache.refresh()
        if self._other_samples is not None:
            given = context.reference_view
            contests = [self._contest_of(self._other_samples, pair, given) for pair in self._others]
            self.held_out = [HeldOut(contest, ((0, 1),)) for contest in contests]
        counts = f"dpo        {len(self._pairs)} pairs to train on, {len(self.held_out)} to measure on"
        lists = [samples.source for samples in (self._samples, self._other_samples) if samples is not None]
        moved = [f"WARNING    {said}" for said in what_moved(*lists)]
        return [counts, *moved, *self._doubtful(), *self.unreached(self.end)]

    def state(self) -> dict[str, Any]:
        """A digest of the list."""
        return {"pairs": self._key}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Raises: InputError where the list is another."""
        if state["pairs"] != self._key:
            raise InputError(
                f"dpo.pairs: {self.options.pairs} has other pairs than when the run began; expected the same ones, in the same "
                f"order. To train on others, begin a run with --init_from"
            )

    def contest(self, context: Context, pair: int, generator: torch.Generator) -> Contest:
        """The two sets, given a view of the input."""
        references = context.references
        reference = references[int(torch.randint(len(references), (), generator=generator))]
        return self._contest_of(self._samples, self._pairs[pair], reference)

    def _contest_of(self, samples: EncodedObjects, pair: ListedPair, reference: int) -> Contest:
        still = torch.Generator()  # their background is a single one
        encoded, winner, loser = (samples.get(index, still) for index in (pair.input, pair.winner, pair.loser))
        return Contest(encoded, reference, ((winner.mean, winner.std), (loser.mean, loser.std)))


def make_dpo(config: Config, pipeline: Pipeline) -> Dpo:
    """Raises: InputError for a list, or a reward, that cannot be used."""
    if config.dpo.pairs != OWN:
        return ListedDpo(config, pipeline)
    reward = load_reward(config.dpo.reward, config.dpo.encoder, pipeline, "dpo")
    return OwnDpo(config, (f"dpo.reward: {config.dpo.reward}", reward))
