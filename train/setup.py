"""From a configuration to everything a run needs, loaded and checked."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, gather_object

from softprompt.data.cache import EncodedObjects, PictureCache
from softprompt.data.samples import Source, Subset, open_source, what_moved
from softprompt.data.shards import key_of
from softprompt.errors import InputError
from softprompt.micro import MICRO_MODEL
from softprompt.micro.world import MicroWorld
from softprompt.model.adapted import AdaptedModel, add_lora, compile_blocks
from softprompt.model.loading import load_pipeline
from softprompt.model.pipeline import Pipeline
from softprompt.model.weights import noted
from softprompt.prompt.curriculum import timestep_edges
from softprompt.prompt.encoding import load_waypoints
from softprompt.prompt.path import match_tokens
from softprompt.prompt.soft_prompt import SoftPrompt
from train.batches import Batches
from train.device import DTYPES, choose_precision, quiet_libraries
from train.export.read import start_from
from train.objectives.make import make_objectives
from train.objectives.terms import Objectives
from train.options.config import Config
from train.options.groups import MICRO
from train.options.objectives import OBJECTIVES
from train.state.pacing import Pace, least_steps, position_of

MICRO_TRAIN_OBJECTS = 40
FIRST_HELD_OUT = 10_000
"""Seed of the first object of the embedded world that nothing is trained on."""
MICRO_HELD_OUT_OBJECTS = 24
ORIGINAL_HELD_OUT_OBJECTS = 12
"""Of the pretrained model's own domain, at most, to measure what is forgotten on."""
HEAVY = 30
"""Times the denoising loss's pull from which on that of a preference is pointed out."""


@dataclass(frozen=True)
class OriginalDomain:
    """Objects of the domain that the model was pretrained on."""

    replay: EncodedObjects
    """To hold the KL term on; encoded when asked for."""
    held_out: EncodedObjects
    """To measure on what is forgotten."""


@dataclass
class Job:
    """A run, ready to start."""

    config: Config
    accelerator: Accelerator
    pipeline: Pipeline
    """Its `unet` is the one that is adapted."""
    model: AdaptedModel
    """As it is called in training: wrapped for many processes where there are."""
    adapted: AdaptedModel
    """The same, not wrapped."""
    optimizer: torch.optim.Optimizer
    train: EncodedObjects
    held_out: EncodedObjects
    original: OriginalDomain | None
    batches: Batches
    """What each step trains on."""
    notes: list[str]
    """What was decided on the user's behalf, to be said."""
    skipped: list[str]
    """Samples that cannot be used and are left out, each with what is wrong."""
    objectives: Objectives = field(default_factory=Objectives)
    """Terms of the loss beside the denoising one."""

    @property
    def data(self) -> dict[str, str]:
        """What stands for each set of samples: how many, and a digest of their names in order. Paths may differ."""
        sets = {"data.train": self.train, "data.val": self.held_out}
        if self.original is not None:
            sets["data.original"] = self.original.held_out
        return {name: f"{len(objects)} objects, {key_of(*objects.names).hex()[:8]}" for name, objects in sets.items()}

    @property
    def objects_per_step(self) -> int:
        """Objects that all processes together train on in a step."""
        return self.config.train.batch_size * self.config.train.accumulation * self.accelerator.num_processes


def make_accelerator(config: Config) -> Accelerator:
    """Device, precision and processes. Raises: InputError for a device or precision that this machine has not."""
    precision, _ = choose_precision(config.train.device, config.train.precision)
    accelerator = Accelerator(
        cpu=config.train.device == "cpu" or not torch.cuda.is_available(),
        mixed_precision={"fp32": "no"}.get(precision, precision),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    quiet_libraries(accelerator.is_main_process)
    return accelerator


def prepare(config: Config, accelerator: Accelerator | None = None, *, resumed: bool = False) -> Job:
    """Load and check everything. resumed: a checkpoint is put in afterwards, instead of what `init_from` gives.

    Raises: InputError for whatever cannot be used.
    """
    precision, said = choose_precision(config.train.device, config.train.precision)
    notes = [f"{said}; what trains is fp32"]
    accelerator = accelerator or make_accelerator(config)
    folder = MICRO_MODEL if config.model == MICRO else Path(config.model)
    pipeline = load_pipeline(folder, unet=config.unet, dtype=DTYPES[precision]).to(accelerator.device)
    if config.unet is not None:
        notes.append(f"unet       {config.unet}, instead of the one in {config.model}")
    notes += [f"weights    {said}" for said in pipeline.notes]
    _check_together(config, pipeline)
    objectives = make_objectives(config, pipeline)
    waypoints = load_waypoints(
        config.prompt.waypoints,
        folder=folder,
        subject=config.prompt.subject,
        angle=config.prompt.angle,
        num_views=pipeline.num_views,
        width=pipeline.prompt_width,
    )
    train, held_out, data_notes = _open_data(config, pipeline)

    waypoints = match_tokens(waypoints, config.prompt.matching)
    prompt = SoftPrompt(waypoints, carry=config.prompt.carry, interpolation=config.prompt.interpolation)
    prompt.requires_grad_(config.prompt.learn)
    if config.lora.rank:
        add_lora(
            pipeline.unet,
            rank=config.lora.rank,
            alpha=config.lora.alpha,
            dropout=config.lora.dropout,
            targets=config.lora.targets,
            seed=config.train.seed,
        )
    if config.train.gradient_checkpointing == "always":
        pipeline.unet.enable_gradient_checkpointing()
    if config.train.compile:
        compile_blocks(pipeline.unet)
    adapted = AdaptedModel(pipeline.unet, prompt).to(accelerator.device).train()
    # A prompt that does not train is in no checkpoint: a resumed run takes it from where it began, too.
    if config.init_from is not None and not (resumed and config.prompt.learn):
        names: list[str] = []
        with noted(names):
            start_from(Path(config.init_from), adapted, position_of(config, Pace.start(config), 0))
        notes += [f"start      prompt and LoRA of {config.init_from}, at step 0", *(f"weights    {said}" for said in names)]
    model, optimizer = accelerator.prepare(adapted, make_optimizer(config, adapted, scaled=precision == "fp16"))

    cache = None
    if config.data.cache is not None and (train.locations or held_out.locations):
        cache = PictureCache(Path(config.data.cache), pipeline)
    original, original_notes = _open_original(config, pipeline, cache)
    sources = (
        EncodedObjects(train, pipeline, config.data.background, cache),
        EncodedObjects(held_out, pipeline, config.data.still_background, cache),
    )
    needed = [*sources]
    if original is not None:
        needed += [original.held_out, original.replay] if _replays(config) else [original.held_out]
    encoding_notes, skipped = _encode(needed, accelerator, cache, config)
    notes += data_notes + original_notes + encoding_notes + _advice(config)
    if all(objects.background != "random" for objects in needed) and not objectives.decode:
        with pipeline.encoders_on_device():  # they leave the device as the block ends
            pipeline.encoders_rest = True
    batches = Batches(
        config,
        pipeline,
        sources[0],
        None if original is None else original.replay,
        process=accelerator.process_index,
        processes=accelerator.num_processes,
    )
    job = Job(config, accelerator, pipeline, model, adapted, optimizer, *sources, original, batches, notes, skipped, objectives)
    notes += objectives.open(job)
    return job


def _encode(
    needed: Sequence[EncodedObjects], accelerator: Accelerator, cache: PictureCache | None, config: Config
) -> tuple[list[str], list[str]]:
    """Encode what is not kept, shared out over the processes. Returns: what to say of it; what is wrong with samples left out.

    Raises: InputError for a sample that cannot be used, or, where they are to be left out, when there are too many of them.
    """
    share = accelerator.process_index, accelerator.num_processes
    encoded, wrong = 0, []
    for objects in needed:
        bad: dict[int, str] | None = {} if config.data.on_bad_sample == "skip" and objects.source.locations else None
        encoded += objects.fill(progress=accelerator.is_main_process, share=share, bad=bad)
        if bad is not None:
            wrong += _leave_out(objects, bad, accelerator, config.data.bad_share)
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
            "WARNING    data.background random: no picture can be encoded ahead, so each is at every step, which takes several "
            "times as long; three_choices can be"
        )
    return notes, wrong


def _leave_out(objects: EncodedObjects, bad: dict[int, str], accelerator: Accelerator, most: float) -> list[str]:
    """Go on without the samples that any process found bad. Returns: what is wrong with them. Raises: InputError."""
    found = dict(sorted(gather_object(list(bad.items()))))
    wrong = [f"{objects.names[index]}: {reason}" for index, reason in found.items()]
    if wrong and (len(wrong) > most * len(objects) or len(wrong) == len(objects)):
        raise InputError(
            f"data.on_bad_sample: {len(wrong)} of {len(objects)} samples cannot be used, more than data.bad_share, {most:g}, "
            f"lets pass; the first is {wrong[0]}. python -m train.doctor lists them all"
        )
    if wrong:
        objects.leave_out(found.keys())
    return wrong


def make_optimizer(config: Config, adapted: AdaptedModel, *, scaled: bool = False) -> torch.optim.Optimizer:
    """AdamW with one group per trained part, each with its own learning rate. scaled: by fp16's gradient scaler."""
    settings = {
        "prompt": {"lr": config.prompt.learning_rate, "weight_decay": 0.0},  # zero: it would pull toward 0, not the start
        "lora": {"lr": config.lora.learning_rate, "weight_decay": config.lora.weight_decay},
    }
    groups = [
        {"name": name, "params": list(parameters.values()), **settings[name]}
        for name, parameters in adapted.trainable().items()
    ]
    # A fused step would hide from accelerate that the scaler has left it out.
    return torch.optim.AdamW(groups, fused=next(adapted.parameters()).is_cuda and not scaled)


def _check_together(config: Config, pipeline: Pipeline) -> None:
    """What only shows when the model is there. Raises: InputError."""
    config.data.references(pipeline.num_views)
    schedule = len(pipeline.scheduler.alphas_cumprod)
    steps = {f"monitor.{name}": getattr(config.monitor, name) for name in ("preview_steps", "validation_timesteps")}
    steps |= {"draft.steps": config.draft.steps, "dpo.sample_steps": config.dpo.sample_steps}
    steps |= {"spin.sample_steps": config.spin.sample_steps}
    for name, asked in steps.items():
        if asked > schedule and (name.startswith("monitor.") or config.uses(name.partition(".")[0])):
            raise InputError(f"{name}: is {asked}; the model has {schedule} timesteps, expected so many at most")
    if config.timesteps.clusters > 1:
        try:
            timestep_edges(pipeline.scheduler.alphas_cumprod, config.timesteps.clusters, config.timesteps.edges)
        except ValueError as error:
            raise InputError(f"timesteps: {error}") from error
    if config.loss.snr_weighting == "v" and pipeline.scheduler.config["prediction_type"] == "epsilon":
        raise InputError(
            f"loss.snr_weighting: is v, the min-SNR weight of v-prediction; {pipeline.folder} predicts epsilon. Use "
            f"`facelift`, which is right for epsilon, or `none`"
        )


def _advice(config: Config) -> list[str]:
    """What a configuration does that its author may not have meant."""
    advice = []
    if config.model != MICRO:
        micro = Config()
        values = {
            "train.steps": (config.train.steps, micro.train.steps),
            "lora.learning_rate": (config.lora.learning_rate, micro.lora.learning_rate),
            "prompt.learning_rate": (config.prompt.learning_rate, micro.prompt.learning_rate),
        }
        unchanged = [f"{name} {mine:g}" for name, (mine, default) in values.items() if mine == default]
        if unchanged:
            advice.append(
                f"WARNING    {', '.join(unchanged)}: tuned for the micro model; configs/facelift_mouse.yaml has values for "
                f"real weights"
            )
    for group, trains in (("prompt", config.prompt.learn), ("LoRA", config.lora.rank > 0)):
        first, end = config.window(group.lower())
        if trains and config.train.warmup_steps >= end - first:
            advice.append(
                f"WARNING    train.warmup_steps {config.train.warmup_steps}: the learning rate of the {group}, which trains "
                f"for {end - first} steps, does not reach its full value"
            )
    if config.model != MICRO and config.data.train == MICRO:
        advice.append("WARNING    data.train is the embedded toy world; give --data.train for pictures of your own")
    advice += _advice_on_objectives(config)
    curriculum = config.curriculum
    for name, least in least_steps(config).items():
        if least > config.train.steps:
            advice.append(
                f"WARNING    the curriculum of the {name} takes {least} steps or more; the run has {config.train.steps} and "
                f"ends before it arrives. Lower its patience, or give it a max_stage_steps"
            )
    if curriculum.pacing == "plateau" and curriculum.watch == "train" and curriculum.smoothing == 0:
        advice.append(
            "WARNING    curriculum.watch train with curriculum.smoothing 0: the loss of one batch is mostly noise; try 0.9"
        )
    if curriculum.pacing == "step" and curriculum.unit == "step" and curriculum.at[-1] > config.train.steps:
        advice.append(
            f"WARNING    the curriculum reaches its end at step {curriculum.at[-1]:g}; the run has {config.train.steps} steps "
            f"and stops before"
        )
    return advice


def _advice_on_objectives(config: Config) -> list[str]:
    advice, untouched = [], Config()
    for group in (name for name in OBJECTIVES if not config.uses(name)):
        given, default = asdict(getattr(config, group)), asdict(getattr(untouched, group))
        if changed := [f"{group}.{name}" for name, value in given.items() if value != default[name]]:
            advice.append(
                f"WARNING    {', '.join(changed)}: of no use, since {group}.weight is 0 and the objective is left out"
            )
    for group, settings in (("dpo", config.dpo), ("spin", config.spin)):
        if (pull := settings.weight * settings.beta / 4) > HEAVY * max(1.0, config.loss.weight):
            advice.append(
                f"WARNING    {group}.weight {settings.weight:g}: a pair pulls {pull:.0f} times as hard as the denoising loss "
                f"(weight x beta / 4); begin with {4 / settings.beta:g}, 4 / {group}.beta"
            )
    return advice


def _open_data(config: Config, pipeline: Pipeline) -> tuple[Source, Source, list[str]]:
    """Training and held-out samples, and what to say of them."""

    def open_any(path: str, first: int, count: int) -> Source:
        return _open_source(pipeline, path, "mice", first, count)

    train = open_any(config.data.train, 0, config.data.limit or MICRO_TRAIN_OBJECTS)
    if config.data.val is not None or config.data.train == MICRO:
        held_out = open_any(config.data.val or MICRO, FIRST_HELD_OUT, MICRO_HELD_OUT_OBJECTS)
        held = set(_identities(held_out))
        both = [name for name, identity in zip(train.names, _identities(train), strict=True) if identity in held]
        note = f"; WARNING: {len(both)} of them are trained on as well, e.g. {both[0]}" if both else ""
    elif len(train) > 1:
        count = min(24, max(1, round(0.05 * len(train))))
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
    return train, held_out, notes + [f"WARNING    {said}" for said in what_moved(train, held_out)]


def _open_original(config: Config, pipeline: Pipeline, cache: PictureCache | None) -> tuple[OriginalDomain | None, list[str]]:
    """Objects of the pretrained model's domain where there are any, and what to say of them."""
    path = config.data.original_or_micro
    if path is None:
        return None, []
    source = _open_source(pipeline, path, "heads", FIRST_HELD_OUT, MICRO_TRAIN_OBJECTS + ORIGINAL_HELD_OUT_OBJECTS)
    held = min(ORIGINAL_HELD_OUT_OBJECTS, max(1, len(source) // 2))
    replayed = max(1, len(source) - held)
    parts = Subset(source, range(replayed)), Subset(source, range(len(source) - held, len(source)))
    replay, held_out = (EncodedObjects(part, pipeline, config.data.still_background, cache) for part in parts)
    note = f", {replayed} to hold the KL on" if _replays(config) else ""
    if len(source) == 1 and _replays(config):
        note += "; WARNING: they are one and the same"
    said = f"original   {held} objects to measure on what is forgotten{note}"
    return OriginalDomain(replay, held_out), [said, *(f"WARNING    {moved}" for moved in what_moved(source))]


def _replays(config: Config) -> bool:
    return config.kl.weight > 0 and config.kl.domain != "new"


def _open_source(pipeline: Pipeline, path: str, domain: str, first: int, count: int) -> Source:
    """Samples on the disk, or `count` objects of the embedded world."""
    size, views = pipeline.picture_size, pipeline.num_views
    if path == MICRO:
        return MicroWorld(domain, first, count, size=size)
    return open_source(path, size=size, num_views=views, check=False)  # EncodedObjects.fill looks at what is new


def _identities(source: Source) -> Sequence[str]:
    """What tells samples apart: where they are on the disk, or their name in the embedded world."""
    return source.locations or source.names
