"""Device, precision, and what the libraries may print. Nothing large is imported before it is needed."""

import sys
import warnings
from typing import TYPE_CHECKING

from softprompt.errors import InputError, InputWarning

if TYPE_CHECKING:
    import torch


def dtype_of(precision: str) -> "torch.dtype":
    """The dtype of fp32, bf16 or fp16."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def choose_device(wanted: str) -> "torch.device":
    """The device for auto, cpu or cuda: CUDA where there is one, unless it is cpu."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() and wanted != "cpu" else "cpu")


def choose_precision(wanted: str, asked: str, *, group: str = "train.") -> tuple[str, str]:
    """Precision for a device (auto, cpu, cuda) and a precision (auto, fp32, bf16, fp16) here, and a note for the user.

    group: prefix of the two options, for errors. Raises: InputError for one that this machine does not have.
    """
    import torch

    precision = asked
    if wanted == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"{group}device: is cuda; this machine has no CUDA device that torch {torch.__version__} can use. Likely a CPU "
            f"build of torch, or no driver; use --{group}device cpu or auto"
        )
    on_cuda = choose_device(wanted).type == "cuda"
    if precision == "fp16" and not on_cuda:
        raise InputError(f"{group}precision: is fp16, which needs a CUDA device; expected fp32 or bf16 on a CPU")
    if precision == "auto":
        precision = ("bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16") if on_cuda else "fp32"
    device = torch.cuda.get_device_name() if on_cuda else f"CPU, {torch.get_num_threads()} threads"
    chosen = "chosen from the machine" if "auto" in (wanted, asked) else "as asked for"
    return precision, f"device     {device}; {precision} ({chosen})"


def quiet_libraries(is_main: bool) -> None:
    """Keep the libraries' progress bars and advice out of the output; each warning of this project is one line."""
    import diffusers
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    warnings.showwarning = _show_ours
    if not is_main:
        warnings.filterwarnings("ignore")


def _show_ours(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    """Replacement of `warnings.showwarning`."""
    if issubclass(category, InputWarning):
        print(f"WARNING    {message}", file=sys.stderr)
