"""FaceLift's pipeline folder (`pipeckpts`) in and out: every weight checked, nothing fetched from a hub."""

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
    noted,
    read_weights,
    refuse_misfit,
)

_PARTS = {
    "unet": "config.json",
    "vae": "config.json",
    "image_encoder": "config.json",
    "feature_extractor": "preprocessor_config.json",
    "image_normalizer": "config.json",
    "image_noising_scheduler": "scheduler_config.json",
    "scheduler": "scheduler_config.json",
}
"""Folders in a pipeline folder, and the configuration file of each."""


def load_pipeline(folder: str | Path, *, unet: str | Path | None = None, dtype: torch.dtype = torch.float32) -> Pipeline:
    """Load a FaceLift pipeline folder, without its text encoder.

    unet: folder of a UNet that replaces the pipeline's own, as FaceLift's trainer leaves it in a checkpoint.
    dtype: of the UNet. The VAE and the image encoder stay float32: the VAE overflows in float16 (`force_upcast`), and both
    run once a picture.
    Raises: InputError naming the folder and all that is missing, or weights that do not fit their configuration.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such folder{base_of(folder)}; expected a FaceLift pipeline folder (pipeckpts) on this disk"
        )
    other_unet = None if unet is None else _unet_folder(Path(unet))
    unet_folder = other_unet or folder / "unet"
    configurations = {"model_index.json": folder / "model_index.json"}
    configurations |= {f"{part}/{file}": folder / part / file for part, file in _PARTS.items()}
    configurations["unet/config.json"] = unet_folder / "config.json"
    if missing := [name for name, file in configurations.items() if not file.is_file()]:
        _refuse_lone_unet(folder)
        raise InputError(f"{folder}: is no FaceLift pipeline folder; missing {', '.join(missing)}")
    for file in configurations.values():
        _check_configuration(file)
    notes: list[str] = []
    with noted(notes):
        denoiser = load_unet(unet_folder, dtype=dtype)
        vae = load_frozen(AutoencoderKL, folder / "vae")
        image_encoder = load_frozen(CLIPVisionModelWithProjection, folder / "image_encoder")
        image_normalizer = load_frozen(StableUnCLIPImageNormalizer, folder / "image_normalizer")
    if denoiser.config["class_embed_type"] != "projection":
        raise InputError(
            f"{unet_folder}: class_embed_type is {denoiser.config['class_embed_type']!r}; FaceLift passes the input picture "
            f"through 'projection' class labels (Stable Diffusion 2.1-unCLIP), so this UNet cannot see the input"
        )
    pipeline = Pipeline(
        unet=denoiser,
        vae=vae,
        image_encoder=image_encoder,
        feature_extractor=_from_pretrained(CLIPImageProcessorPil, folder / "feature_extractor"),
        image_normalizer=image_normalizer,
        image_noising_scheduler=_from_pretrained(DDPMScheduler, folder / "image_noising_scheduler"),
        scheduler=_from_pretrained(DDIMScheduler, folder / "scheduler"),
        folder=folder,
        other_unet=other_unet,
        notes=[*_variants(unet_folder, folder / "vae", folder / "image_encoder", folder / "image_normalizer"), *notes],
    )
    if other_unet is not None:
        _check_sizes(pipeline)
    prediction = pipeline.scheduler.config["prediction_type"]
    if prediction not in ("v_prediction", "epsilon"):
        raise InputError(f"{folder / 'scheduler'}: prediction_type is {prediction!r}; expected v_prediction or epsilon")
    return pipeline


def load_unet(folder: str | Path, *, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    """Load a `unet` folder, FaceLift's (`UNetMV2DConditionModel`) or a stock one, every weight matched.

    The folder's flags decide the attention. A base Stable Diffusion UNet (4 input channels, no such flags) is widened to
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
    with torch.device("meta"):  # random weights, soon replaced, would take a minute
        unet = build_unet(config, origin=str(folder / "config.json"))
    refuse_misfit(folder, weights, unet.state_dict())
    unet.load_state_dict(weights, strict=True, assign=True)
    return unet.requires_grad_(False).eval()


def load_text_encoder(folder: str | Path) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """Load the tokenizer and text encoder of a pipeline folder, which only encoding texts needs.

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
    return _from_pretrained(CLIPTokenizer, folder / "tokenizer"), load_frozen(CLIPTextModel, folder / "text_encoder")


def load_frozen(cls: Any, folder: Path, *, left_over: bool = False) -> Any:
    """Load a model of diffusers or transformers, in float32, that does not train.

    left_over: accept weights that the model has no place for, as those of a whole CLIP where one tower is loaded.
    Raises: InputError, also where the libraries only warn: weights missing, of another shape, or left over.
    """
    stems = (DIFFUSERS,) if issubclass(cls, ModelMixin) else TRANSFORMERS
    with as_saved_plainly(folder, *stems) as (plain, files):
        options = {"variant": files.variant, "use_safetensors": files.is_safe, "torch_dtype": torch.float32}
        model, info = _from_pretrained(cls, plain, shown=folder, output_loading_info=True, **options)
    wanted = model.state_dict()
    left = () if left_over else info["unexpected_keys"]
    # Checkpoints of transformers < 4.31 carry position_ids, a constant that is no weight.
    found = {name: weight for name, weight in wanted.items() if name not in info["missing_keys"] or "position_ids" in name}
    others = {str(name): torch.empty(0) for name in (*info["mismatched_keys"], *left) if "position_ids" not in str(name)}
    refuse_misfit(folder, found | others, wanted)
    return model.requires_grad_(False).eval()


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


def _from_pretrained(cls: Any, folder: Path, *, shown: Path | None = None, **options: Any) -> Any:
    """`cls.from_pretrained` from this disk. shown: the folder named in errors, if `folder` is a copy. Raises: InputError."""
    try:
        return cls.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:  # which one depends on what is wrong in which file
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{shown or folder}: cannot be loaded as {cls.__name__} ({problem[:300]})") from error


def _check_configuration(file: Path) -> None:
    """Refuse configurations that the libraries would not: a text or number instead of options, which they would look up on a
    hub, and sizes that no model has, which they would allocate before reading the weights. Raises: InputError."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return  # no JSON: the library that reads it refuses it
    if not isinstance(config, dict):
        raise InputError(f"{file}: holds a JSON {type(config).__name__}; expected an object with the part's options")
    for name, value in config.items():
        most = 100 if "layers" in name else 2**16
        if any(isinstance(number, int) and number > most for number in (value if isinstance(value, list) else [value])):
            raise InputError(f"{file}: {name} is {value}; expected {most} at most; likely the file is damaged")


def _check_sizes(pipeline: Pipeline) -> None:
    """Raises: InputError for a UNet from elsewhere whose sizes differ from those of the pipeline's other parts."""
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


def _variants(*folders: Path) -> list[str]:
    """Notes on the parts of which a variant of the weights was taken."""
    found = {folder: find_weights(folder, DIFFUSERS, *TRANSFORMERS).variant for folder in folders}
    said = "is taken; no weights in full precision are there"
    return [f"{folder}: the variant {variant} {said}" for folder, variant in found.items() if variant is not None]


def _unet_folder(folder: Path) -> Path:
    """The folder of option `unet`. Raises: InputError where it is none of a UNet."""
    if _is_unet(folder):
        return folder
    likely = "give CHECKPOINT/unet of a checkpoint of FaceLift's trainer"
    if inside := _unets_in(folder):
        others = f"; there is {inside[1]} as well" if len(inside) > 1 else ""
        found, likely = "holds the UNet in a folder of its own", f"give that: --unet {inside[0]}{others}"
    elif not folder.is_dir():
        found = f"no such folder{base_of(folder)}"
    else:
        found = "holds no config.json of a UNet"
    raise InputError(f"unet: {folder}: {found}; expected the folder with the UNet's config.json and weights; {likely}")


def _refuse_lone_unet(folder: Path) -> None:
    """Raises: InputError where the pipeline folder is that of a UNet alone, or a checkpoint of FaceLift's trainer."""
    unets = _unets_in(folder)
    if _is_unet(folder):
        found, unets = "is a UNet's folder", [folder]
    elif unets and not any((folder / part).is_dir() for part in _PARTS if part != "unet"):
        found = f"is a training checkpoint: it holds {' and '.join(unet.name for unet in unets)} and no other part"
    else:
        return
    likely = " or ".join(f"--unet {unet}" for unet in unets)
    average = " (the moving average)" if len(unets) > 1 else ""
    raise InputError(
        f"model: {folder} {found}; expected a FaceLift pipeline folder (pipeckpts). Give the one that was trained from as "
        f"--model PIPECKPTS, and with it {likely}{average}"
    )


def _unets_in(folder: Path) -> list[Path]:
    """Folders of UNets in a checkpoint of FaceLift's trainer: as trained, and their moving average."""
    return [folder / name for name in ("unet", "unet_ema") if _is_unet(folder / name)]


def _is_unet(folder: Path) -> bool:
    """Whether a folder is a UNet's, by its config.json."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and config.get("_class_name") in UNET_CLASSES
