"""From a configuration to a run that is ready to start: everything loaded, checked and encoded."""

from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, gather_object

from softprompt.data.cache import EncodedObjects, PictureCache
from softprompt.data.samples import Source, Subset, open_source, what_moved
from softprompt.errors import InputError
from softprompt.micro.world import MicroWorld
from softprompt.model.adapted import compile_blocks
from softprompt.model.pipeline import Pipeline
from softprompt.model.weights import noted
from softprompt.prompt.pacing import Curriculum
from train.build import build_adapted, build_pipeline, build_trainer, build_waypoints, make_curriculum
from train.device import choose_precision, dtype_of, quiet_libraries
from train.evaluation.evaluator import Evaluator
from train.export.read import start_from
from train.objectives.custom import Custom
from train.objectives.dpo import make_dpo
from train.objectives.draft import Draft
from train.objectives.functions import load_function, load_reward
from train.objectives.separate import make_separate
from train.objectives.spin import Spin
from train.objectives.studio import make_studio
from train.objectives.terms import Objectives, Term
from train.options.advice import advice
from train.options.config import Config
from train.options.groups import MICRO
from train.state.run import Job

MICRO_TRAIN_OBJECTS = 40
FIRST_HELD_OUT = 10_000
"""Seed of the first object of the embedded world that nothing is trained on."""
MICRO_HELD_OUT_OBJECTS = 24
HELD_OUT_SHARE, HELD_OUT_OBJECTS = 0.05, 24
"""Share of the training samples that is held out where there are no others to validate on, and the most of them."""
ORIGINAL_HELD_OUT_OBJECTS = 12
"""Most objects of the original domain on which forgetting is measured."""


def make_accelerator(config: Config) -> Accelerator:
    """Device, precision and processes. Raises: InputError for a device or precision that this machine does not have."""
    precision, _ = choose_precision(config.train.device, config.train.precision)
    accelerator = Accelerator(
        cpu=config.train.device == "cpu" or not torch.cuda.is_available(),
        mixed_precision={"fp32": "no"}.get(precision, precision),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    quiet_libraries(accelerator.is_main_process)
    return accelerator


def prepare(config: Config, accelerator: Accelerator | None = None, *, resumed: bool = False) -> Job:
    """Load and check everything. resumed: a checkpoint is loaded afterwards, instead of what `init_from` gives.

    Raises: InputError for anything that cannot be used.
    """
    precision, chosen = choose_precision(config.train.device, config.train.precision)
    accelerator = accelerator or make_accelerator(config)
    notes = [f"{chosen}; what trains is fp32"]

    # The model
    pipeline = build_pipeline(config, dtype_of(precision), accelerator.device)
    if config.unet is not None:
        notes.append(f"unet       {config.unet}, instead of the one in {config.model}")
    notes += [f"weights    {note}" for note in pipeline.notes]
    _check_together(config, pipeline)
    curriculum = _make_curriculum(config, pipeline)
    objectives = make_objectives(config, pipeline)
    waypoints = build_waypoints(config, pipeline)
    train, held_out, data_notes = _open_data(config, pipeline)
    adapted = build_adapted(pipeline, waypoints, config.prompt, config.lora, seed=config.train.seed).train()
    if config.train.gradient_checkpointing == "always":
        pipeline.unet.enable_gradient_checkpointing()
    if config.train.compile:
        compile_blocks(pipeline.unet)
    # A frozen prompt is in no checkpoint: a resumed run takes it from where the run started, too.
    if config.init_from is not None and not (resumed and config.prompt.learn):
        names: list[str] = []
        with noted(names):
            start_from(Path(config.init_from), adapted, curriculum.position(curriculum.start(), 0))
        notes += [f"start      prompt and LoRA of {config.init_from}, at step 0", *(f"weights    {note}" for note in names)]

    # The data
    cache = None
    if config.data.cache is not None and (train.locations or held_out.locations or config.data.original is not None):
        cache = PictureCache(Path(config.data.cache), pipeline)
    replay, original, original_notes = _open_original(config, pipeline, cache)
    train_objects = EncodedObjects(train, pipeline, config.data.background, cache)
    held_out_objects = EncodedObjects(held_out, pipeline, config.data.still_background, cache)
    needed = [train_objects, held_out_objects, *([original] if original else [])]
    needed += [replay] if replay and _measures_kl_on_original(config) else []
    encoding_notes, skipped = _encode(needed, accelerator, cache, config)
    notes += data_notes + original_notes + encoding_notes + advice(config)
    if all(objects.background != "random" for objects in needed) and not objectives.decode:
        with pipeline.encoders_on_device():  # they leave the device as the block ends
            pipeline.encoders_rest = True

    trainer = build_trainer(
        config,
        accelerator,
        pipeline,
        adapted,
        train=train_objects,
        held_out=held_out_objects,
        replay=replay,
        objectives=objectives,
        curriculum=curriculum,
    )
    evaluator = Evaluator(
        accelerator=accelerator,
        pipeline=pipeline,
        adapted=adapted,
        held_out=held_out_objects,
        original=original,
        reference_view=trainer.context.reference_view,
        timesteps=trainer.context.held_out_timesteps,
        batch_size=config.train.batch_size,
        preview_objects=config.monitor.preview_objects,
        preview_steps=config.monitor.preview_steps,
        guidance_scale=config.monitor.guidance_scale,
        eta=config.monitor.eta,
        seed=config.train.seed,
    )
    notes += [note for term in objectives.terms for note in term.open(trainer.context)]
    return Job(config, trainer, evaluator, train_objects, held_out_objects, replay, notes, skipped)


def make_objectives(config: Config, pipeline: Pipeline) -> Objectives:
    """The objectives that are trained or evaluated. Raises: InputError for one that cannot work with the model."""
    terms: list[Term] = []
    if config.uses("draft"):
        terms.append(Draft(config.draft, load_reward(config.draft.reward, config.draft.encoder, pipeline, "draft")))
    if config.uses("dpo"):
        terms.append(make_dpo(config, pipeline))
    if config.uses("spin"):
        terms.append(Spin(config))
    if config.uses("studio"):
        terms.append(make_studio(config.studio, pipeline))
    if config.uses("separate"):
        terms.append(make_separate(config.separate, config.prompt.waypoints, pipeline))
    if config.uses("custom"):
        function = config.custom.function
        assert function is not None, "checked when the configuration is read"
        terms.append(Custom(config.custom.weight, load_function(function, "custom.function"), function))
    return Objectives(terms)


def _check_together(config: Config, pipeline: Pipeline) -> None:
    """Check options against the model. Raises: InputError."""
    config.data.references(pipeline.num_views)
    schedule = len(pipeline.scheduler.alphas_cumprod)
    steps = {f"monitor.{name}": getattr(config.monitor, name) for name in ("preview_steps", "validation_timesteps")}
    steps |= {"draft.steps": config.draft.steps, "dpo.sample_steps": config.dpo.sample_steps}
    steps |= {"spin.sample_steps": config.spin.sample_steps}
    for name, asked in steps.items():
        if asked > schedule and (name.startswith("monitor.") or config.uses(name.partition(".")[0])):
            raise InputError(f"{name}: is {asked}; the model has {schedule} timesteps, expected so many at most")
    if config.loss.snr_weighting == "v" and pipeline.scheduler.config["prediction_type"] == "epsilon":
        raise InputError(
            f"loss.snr_weighting: is v, the min-SNR weight of v-prediction; {pipeline.folder} predicts epsilon. Use "
            f"`facelift`, which is right for epsilon, or `none`"
        )


def _make_curriculum(config: Config, pipeline: Pipeline) -> Curriculum:
    """The run's curricula. Raises: InputError."""
    try:
        return make_curriculum(config, pipeline.scheduler.alphas_cumprod)
    except ValueError as error:
        raise InputError(f"timesteps: {error}") from error


# --------------------------------------------------------------------------------------------------------------------- data


def _open_data(config: Config, pipeline: Pipeline) -> tuple[Source, Source, list[str]]:
    """Training and held-out samples, and notes for the user."""

    train = _open_source(pipeline, config.data.train, "mice", 0, config.data.limit or MICRO_TRAIN_OBJECTS)
    if config.data.val is not None or config.data.train == MICRO:
        held_out = _open_source(pipeline, config.data.val or MICRO, "mice", FIRST_HELD_OUT, MICRO_HELD_OUT_OBJECTS)
        held = set(_identities(held_out))
        both = [name for name, identity in zip(train.names, _identities(train), strict=True) if identity in held]
        note = f"; WARNING: {len(both)} of them are trained on as well, e.g. {both[0]}" if both else ""
    elif len(train) > 1:
        count = min(HELD_OUT_OBJECTS, max(1, round(HELD_OUT_SHARE * len(train))))
        everything = train
        train = Subset(everything, range(len(everything) - count))
        held_out = Subset(everything, range(len(everything) - count, len(everything)))
        note = " (the last of the list)"
    else:
        held_out = train
        note = "; WARNING: the only object is both trained on and validated on, so validation shows no generalisation"
    if config.data.limit is not None:
        if config.data.limit > len(train):
            raise InputError(
                f"data.limit: is {config.data.limit}; {config.data.train} has {len(train)} objects to train on. Expected that "
                f"many or fewer, or null for all"
            )
        train = Subset(train, range(config.data.limit))
        note += f" (data.limit {config.data.limit})"
    notes = [f"data       {len(train)} objects to train on, {len(held_out)} held out{note}"]
    return train, held_out, notes + [f"WARNING    {moved}" for moved in what_moved(train, held_out)]


def _open_original(
    config: Config, pipeline: Pipeline, cache: PictureCache | None
) -> tuple[EncodedObjects | None, EncodedObjects | None, list[str]]:
    """Objects of the original domain, if any: those for the KL, those that forgetting is measured on, and notes."""
    path = config.data.original_or_micro
    if path is None:
        return None, None, []
    source = _open_source(pipeline, path, "heads", FIRST_HELD_OUT, MICRO_TRAIN_OBJECTS + ORIGINAL_HELD_OUT_OBJECTS)
    held = min(ORIGINAL_HELD_OUT_OBJECTS, max(1, len(source) // 2))
    replayed = max(1, len(source) - held)
    parts = Subset(source, range(replayed)), Subset(source, range(len(source) - held, len(source)))
    replay, held_out = (EncodedObjects(part, pipeline, config.data.still_background, cache) for part in parts)
    note = f", {replayed} to measure the KL on" if _measures_kl_on_original(config) else ""
    if len(source) == 1 and _measures_kl_on_original(config):
        note += "; WARNING: both are the same object"
    notes = [f"original   {held} objects to measure forgetting on{note}"]
    return replay, held_out, notes + [f"WARNING    {moved}" for moved in what_moved(source)]


def _measures_kl_on_original(config: Config) -> bool:
    return config.kl.weight > 0 and config.kl.domain != "new"


def _open_source(pipeline: Pipeline, path: str, domain: str, first: int, count: int) -> Source:
    """Samples on the disk, or `count` objects of the embedded world."""
    size, views = pipeline.picture_size, pipeline.num_views
    if path == MICRO:
        return MicroWorld(domain, first, count, size=size)
    return open_source(path, size=size, num_views=views, check=False)  # EncodedObjects.fill checks what is new


def _identities(source: Source) -> Sequence[str]:
    """Identity of each sample: its place on the disk, or its name in the embedded world."""
    return source.locations or source.names


def _encode(
    needed: Sequence[EncodedObjects], accelerator: Accelerator, cache: PictureCache | None, config: Config
) -> tuple[list[str], list[str]]:
    """Encode what is not cached, shared out over the processes. Returns: notes; the samples left out, each with the reason.

    Raises: InputError for a sample that cannot be used, or, with data.on_bad_sample skip, for too many of them.
    """
    share = accelerator.process_index, accelerator.num_processes
    encoded, wrong = 0, []
    for objects in needed:
        bad: dict[int, str] | None = {} if config.data.on_bad_sample == "skip" and objects.source.locations else None
        encoded += objects.fill(progress=accelerator.is_main_process, share=share, bad=bad)
        if bad is not None:
            wrong += _leave_out(objects, bad, config.data.bad_share)
    notes = []
    if cache is not None:
        by_all = int(accelerator.reduce(torch.tensor(encoded, device=accelerator.device), reduction="sum"))
        accelerator.wait_for_everyone()
        cache.refresh()
        notes.append(f"cache      {cache.folder}: {by_all} pictures encoded into it now, the others were there")
    if wrong:
        notes.append(f"WARNING    {len(wrong)} samples cannot be used and are left out (data.on_bad_sample), e.g. {wrong[0]}")
    if any(objects.background == "random" for objects in needed):
        notes.append(
            "WARNING    data.background random: no picture can be encoded ahead, so each is encoded at every step, which takes "
            "several times as long; three_choices can be encoded ahead"
        )
    return notes, wrong


def _leave_out(objects: EncodedObjects, bad: dict[int, str], most: float) -> list[str]:
    """Leave out the samples that any process found bad. Returns: the reasons. Raises: InputError."""
    found = dict(sorted(gather_object(list(bad.items()))))
    wrong = [f"{objects.names[index]}: {reason}" for index, reason in found.items()]
    if wrong and (len(wrong) > most * len(objects) or len(wrong) == len(objects)):
        raise InputError(
            f"data.on_bad_sample: {len(wrong)} of {len(objects)} samples cannot be used, more than data.bad_share, {most:g}, "
            f"allows; the first is {wrong[0]}. python -m train.doctor lists them all"
        )
    if wrong:
        objects.leave_out(found.keys())
    return wrong
