"""FaceLift's pipeline folder (`pipeckpts`) and its parts from the disk, every weight checked."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, ModelMixin, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from transformers import CLIPImageProcessorPil, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from softprompt.errors import InputError, base_of
from softprompt.files import new_folder, read_json
from softprompt.model.pipeline import Pipeline
from softprompt.model.unet import UNET_CLASSES, build_unet, save_unet
from softprompt.model.weights import (
    DIFFUSERS,
    TRANSFORMERS,
    as_saved_plainly,
    find_weights,
    how_they_fit,
    noted,
    read_weights,
    why_not,
)

_NEEDED = {
    "unet": "config.json",
    "vae": "config.json",
    "image_encoder": "config.json",
    "feature_extractor": "preprocessor_config.json",
    "image_normalizer": "config.json",
    "image_noising_scheduler": "scheduler_config.json",
    "scheduler": "scheduler_config.json",
}


def load_pipeline(folder: str | Path, *, unet: str | Path | None = None, dtype: torch.dtype = torch.float32) -> Pipeline:
    """Load a FaceLift pipeline folder; nothing is fetched from a hub, the text encoder is not loaded.

    unet: folder of the UNet that takes the place of the pipeline's own, as FaceLift's trainer leaves it in a checkpoint.
    dtype: of the UNet. The VAE and the image encoder stay float32: the one overflows in float16 (`force_upcast`), and both
    run once a picture.
    Raises: InputError naming the folder and all that is missing, or weights that do not fit their configuration.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such folder{base_of(folder)}; expected a FaceLift pipeline folder (pipeckpts) on this disk"
        )
    other_unet = None if unet is None else _unet_given(Path(unet))
    needed = ["model_index.json", *(f"{part}/{file}" for part, file in _NEEDED.items())]
    if other_unet is not None:
        needed.remove("unet/config.json")
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        _refuse_lone_unet(folder)
        raise InputError(f"{folder}: is no FaceLift pipeline folder; missing {', '.join(missing)}")
    for name in needed:
        _check_configuration(folder / name)
    unet_folder = folder / "unet" if other_unet is None else other_unet
    if other_unet is not None:
        _check_configuration(other_unet / "config.json")
    notes: list[str] = []
    with noted(notes):
        denoiser = load_unet(unet_folder, dtype=dtype)
        vae = load_frozen(AutoencoderKL, folder / "vae")
        image_encoder = load_frozen(CLIPVisionModelWithProjection, folder / "image_encoder")
        image_normalizer = load_frozen(StableUnCLIPImageNormalizer, folder / "image_normalizer")
    if denoiser.config["class_embed_type"] != "projection":
        raise InputError(
            f"{unet_folder}: class_embed_type is {denoiser.config['class_embed_type']!r}; FaceLift is given its picture "
            f"through 'projection' class labels (Stable Diffusion 2.1-unCLIP), so this UNet cannot see the input"
        )
    pipeline = Pipeline(
        unet=denoiser,
        vae=vae,
        image_encoder=image_encoder,
        feature_extractor=_read(CLIPImageProcessorPil, folder / "feature_extractor"),
        image_normalizer=image_normalizer,
        image_noising_scheduler=_read(DDPMScheduler, folder / "image_noising_scheduler"),
        scheduler=_read(DDIMScheduler, folder / "scheduler"),
        folder=folder,
        other_unet=other_unet,
        notes=[*_variants(unet_folder, folder / "vae", folder / "image_encoder", folder / "image_normalizer"), *notes],
    )
    if other_unet is not None:
        _check_fit(pipeline)
    prediction = pipeline.scheduler.config["prediction_type"]
    if prediction not in ("v_prediction", "epsilon"):
        raise InputError(f"{folder / 'scheduler'}: prediction_type is {prediction!r}; expected v_prediction or epsilon")
    return pipeline


def _variants(*folders: Path) -> list[str]:
    """Of which parts a variant of the weights was taken, in words."""
    found = [(folder, find_weights(folder, DIFFUSERS, *TRANSFORMERS)) for folder in folders]
    return [
        f"{folder}: the variant {weights.variant} is taken; no weights in full precision are there"
        for folder, weights in found
        if weights.variant is not None
    ]


def _unet_given(folder: Path) -> Path:
    """The folder that `unet` names. Raises: InputError where it is none of a UNet."""
    if is_unet(folder):
        return folder
    if inside := unets_in(folder):
        others = f"; there is {folder / inside[1]} as well" if len(inside) > 1 else ""
        found, likely = "holds the UNet in a folder of its own", f"give that: --unet {folder / inside[0]}{others}"
    elif not folder.is_dir():
        found, likely = f"no such folder{base_of(folder)}", "give CHECKPOINT/unet of a checkpoint of FaceLift's trainer"
    else:
        found, likely = "holds no config.json of a UNet", "give CHECKPOINT/unet of a checkpoint of FaceLift's trainer"
    raise InputError(f"unet: {folder}: {found}; expected the folder with the UNet's config.json and weights; {likely}")


def _refuse_lone_unet(folder: Path) -> None:
    """Raises: InputError where a UNet was given as the pipeline, alone or in a checkpoint of FaceLift's trainer."""
    inside = unets_in(folder)
    if is_unet(folder):
        found, unets = "is a UNet's folder", [folder]
    elif inside and not any((folder / part).is_dir() for part in _NEEDED if part != "unet"):
        found, unets = (
            f"is a training checkpoint: it holds {' and '.join(inside)} and no other part",
            [folder / n for n in inside],
        )
    else:
        return
    likely = " or ".join(f"--unet {unet}" for unet in unets)
    average = " (the moving average)" if len(unets) > 1 else ""
    raise InputError(
        f"model: {folder} {found}; expected a FaceLift pipeline folder (pipeckpts). Give the one that was trained from as "
        f"--model PIPECKPTS, and with it {likely}{average}"
    )


def is_unet(folder: Path) -> bool:
    """Whether a folder is a UNet's, by its config.json."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and config.get("_class_name") in UNET_CLASSES


def unets_in(folder: Path) -> list[str]:
    """Names of the folders of UNets in a checkpoint of FaceLift's trainer: as trained, and their moving average."""
    return [name for name in ("unet", "unet_ema") if is_unet(folder / name)]


def _check_fit(pipeline: Pipeline) -> None:
    """Raises: InputError where a UNet that is not the folder's own has other sizes than the parts beside it."""
    channels, embedding = int(pipeline.vae.config["latent_channels"]), int(pipeline.image_encoder.config.projection_dim)
    for name, size, of in (
        ("in_channels", 2 * channels, "vae"),
        ("out_channels", channels, "vae"),
        ("projection_class_embeddings_input_dim", 2 * embedding, "image_encoder"),
    ):
        if pipeline.unet.config[name] != size:
            raise InputError(
                f"unet: {pipeline.unet_folder}: {name} is {pipeline.unet.config[name]}; {pipeline.folder / of} takes {size}; "
                f"likely --model is another pipeline than the UNet was trained in"
            )


def load_text_encoder(folder: str | Path) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """The tokenizer and text encoder of a pipeline folder: only what encodes text needs them.

    Raises: InputError naming every missing file (FaceLift's published tokenizer came without merges.txt).
    """
    folder = Path(folder)
    needed = ["tokenizer/vocab.json", "tokenizer/merges.txt", "text_encoder/config.json"]
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"{folder}: cannot encode text, missing {', '.join(missing)}; copy them from the Stable Diffusion 2.1 tokenizer "
            f"and text encoder, or give every waypoint as a prompt file (.pt) instead of a text or template"
        )
    _check_configuration(folder / "text_encoder" / "config.json")
    return _read(CLIPTokenizer, folder / "tokenizer"), load_frozen(CLIPTextModel, folder / "text_encoder")


def _check_configuration(file: Path) -> None:
    """Refuse what the libraries would not: a text or number instead of options is to them a name on a hub, which they look up;
    and sizes that no model has they would allocate before they look at the weights. Raises: InputError."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return  # no JSON: what reads it next refuses it
    if not isinstance(config, dict):
        raise InputError(f"{file}: holds a JSON {type(config).__name__}; expected an object with the part's options")
    for name, value in config.items():
        most = 100 if "layers" in name else 2**16
        if any(isinstance(number, int) and number > most for number in (value if isinstance(value, list) else [value])):
            raise InputError(f"{file}: {name} is {value}; expected {most} at most; likely the file is damaged")


def _read(cls: Any, folder: Path, *, shown: Path | None = None, **options: Any) -> Any:
    """`cls.from_pretrained` from this disk; whatever is wrong with the files is the user's to know in one line.

    shown: the folder to name in it, if `folder` is a copy.
    """
    try:
        return cls.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:  # which one depends on what is wrong in which file
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{shown or folder}: cannot be loaded as {cls.__name__} ({problem[:300]})") from error


def load_frozen(cls: Any, folder: Path, *, left_over: bool = False) -> Any:
    """A model of diffusers or transformers, in float32, that does not train.

    left_over: weights that it has no place for are as good, as those of a whole CLIP where one tower is loaded.
    Raises: InputError, also for what the libraries only warn of: weights missing, of another shape, or left over.
    """
    stems = (DIFFUSERS,) if issubclass(cls, ModelMixin) else TRANSFORMERS
    with as_saved_plainly(folder, *stems) as (place_of, found):
        options = {"variant": found.variant, "use_safetensors": found.is_safe, "torch_dtype": torch.float32}
        model, info = _read(cls, place_of, shown=folder, output_loading_info=True, **options)
    # Checkpoints of transformers < 4.31 carry position_ids, a constant that is no weight.
    problems = {
        kind: sorted(str(k) for k in keys if "position_ids" not in str(k))
        for kind, keys in info.items()
        if kind in ("missing_keys", "mismatched_keys") or (kind == "unexpected_keys" and not left_over)
    }
    if any(problems.values()):
        said = "; ".join(
            f"{len(keys)} {kind.replace('_', ' ')} in its weights ({', '.join(keys[:3])})"
            for kind, keys in problems.items()
            if keys
        )
        wanted = list(model.state_dict())
        lacking = {*problems["missing_keys"], *problems.get("mismatched_keys", ())}
        found_names = [name for name in wanted if name not in problems["missing_keys"]] + problems.get("unexpected_keys", [])
        raise InputError(
            f"{folder}: {said}; {len(wanted) - len(lacking)} of the {len(wanted)} of its config.json fit; "
            f"{why_not(found_names, wanted)}"
        )
    return model.requires_grad_(False).eval()


def load_unet(folder: str | Path, *, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    """Load a `unet` folder, FaceLift's (`UNetMV2DConditionModel`) or a stock one, every weight matched.

    The attention is what the folder's flags say. A base Stable Diffusion UNet (4 input channels, no such flags) is widened to
    8 input channels with zeros and given FaceLift's shipped flags, as FaceLift starts its own training.
    Returns: the UNet in evaluation mode, no parameter requiring a gradient.
    Raises: InputError naming the file: missing, no UNet, unsupported flags, weights that do not match.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json", what="a UNet's configuration (give the `unet` folder itself)")
    if config.get("_class_name") not in UNET_CLASSES:
        raise InputError(
            f"{folder / 'config.json'}: its _class_name is {config.get('_class_name')!r}; expected "
            f"UNetMV2DConditionModel (FaceLift) or UNet2DConditionModel (stock)"
        )
    weights = {name: weight.to(dtype) for name, weight in read_weights(folder, DIFFUSERS).items()}
    if config.get("in_channels") == 4 and "conv_in.weight" in weights:
        config["in_channels"] = 8
        weights["conv_in.weight"] = F.pad(weights["conv_in.weight"], (0, 0, 0, 0, 0, 4))  # new inputs start at zero
    with torch.device("meta"):  # the weights follow at once: do not spend a minute on random ones
        unet = build_unet(config, origin=str(folder / "config.json"))
    if misfit := how_they_fit(weights, unet.state_dict()):
        raise InputError(
            f"{folder}: weights and config.json do not belong together: {misfit}; {why_not(weights, unet.state_dict())}"
        )
    unet.load_state_dict(weights, strict=True, assign=True)
    return unet.requires_grad_(False).eval()


def save_pipeline(pipeline: Pipeline, folder: str | Path, *, merge_lora: bool = True) -> None:
    """Write a complete FaceLift pipeline folder: this UNet, everything else copied from `pipeline.folder` byte for byte.

    merge_lora: add the active LoRA to the UNet's weights.
    Raises: InputError when `folder` exists and is not empty.
    """
    index = read_json(pipeline.folder / "model_index.json", what="the pipeline's index of parts")
    with new_folder(folder) as partial:
        for part in sorted(pipeline.folder.iterdir()):
            if part.is_dir() and part.name in index and part.name != "unet":
                shutil.copytree(part, partial / part.name)
        shutil.copyfile(pipeline.folder / "model_index.json", partial / "model_index.json")
        save_unet(pipeline.unet, partial / "unet", layout="facelift", merge_lora=merge_lora)
