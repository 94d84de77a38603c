"""Logger of a run: metrics.jsonl, TensorBoard, preview pictures."""

import io
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from softprompt.files import new_file
from softprompt.prompt.templates import view_names
from train.log.series import FILE, is_evaluation, read_series

GROUPS = (
    "loss",
    "objective",
    "watch",
    "views",
    "ablation",
    "ablation_psnr",
    "ablation_ssim",
    "loss_view",
    "views_psnr",
    "views_ssim",
    "prompt_views_alike",
    "prompt_drift_from_start",
    "prompt_cosine_to_waypoint",
    "prompt_norm",
    "prompt_effect",
    "curriculum",
    "kl",
    "kl_view",
    "kl_timestep",
    "learning_rate",
    "gradient",
    "speed",
)
"""Groups of series, the most important first."""


WORKING = {
    "loss/train": "1_training_loss_falls",
    "loss/validation": "2_held_out_loss_falls",
    "loss/original": "3_pretrained_domain_stays",
    "loss/kl_to_pretrained": "4_KL_levels_off",
    "curriculum/position": "5_position_arrives",
    "views/psnr": "6_PSNR_rises",
    "views/ssim": "7_SSIM_rises",
    "views/copy_score": "8_copies_go_to_0",
    "views/separation_ratio": "9_separation_nears_1",
    "prompt_views_alike/mean_cosine": "10_prompts_part",
}
"""The ten series that answer whether a run works, by what they do where it does: TensorBoard's first group."""


def tensorboard_name(name: str) -> str:
    """`loss/train` => `01_loss/train`: TensorBoard sorts groups by name, and would show gradients before the loss."""
    group = name.split("/")[0].rstrip("_0123456789")
    return f"{GROUPS.index(group) + 1:02d}_{name}"


class Logger:
    """Series and pictures of one run, on the main process; elsewhere it writes nothing."""

    def __init__(self, folder: Path, *, active: bool) -> None:
        self.folder = folder
        self.active = active
        self.writer: SummaryWriter | None = None

    def open(self, *, resumed_step: int | None = None, evaluated: bool = False) -> None:
        """Begin to write.

        resumed_step: of the checkpoint; what came after it is done again, and so dropped. evaluated: whether that step's
        evaluation is in the checkpoint; if not, it is done again too.
        """
        if not self.active:
            return
        if resumed_step is None:
            self.writer = SummaryWriter(str(self.folder / "tensorboard"))
            return
        kept = _drop_after(self.folder, resumed_step, evaluated=evaluated)
        # TensorBoard drops whole steps: what of this one stays is written again.
        self.writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=resumed_step + evaluated)
        for point in kept if not evaluated else []:
            if point["step"] == resumed_step:
                self._to_tensorboard(resumed_step, {name: value for name, value in point.items() if name != "step"})

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl and one point in each TensorBoard series."""
        if self.writer is None:
            return
        with (self.folder / FILE).open("a", encoding="utf-8") as file:
            finite = {name: value if math.isfinite(value) else None for name, value in values.items()}  # JSON has no NaN
            file.write(json.dumps({"step": step, **finite}) + "\n")
        self._to_tensorboard(step, values)

    def _to_tensorboard(self, step: int, values: Mapping[str, float | None]) -> None:
        assert self.writer is not None
        for name, value in values.items():
            number = math.nan if value is None else value
            self.writer.add_scalar(tensorboard_name(name), number, step)
            if name in WORKING:
                self.writer.add_scalar(f"00_is_it_working/{WORKING[name]}", number, step)
        self.writer.flush()

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        """RUN/previews/NAME-step-N.png, and in TensorBoard."""
        self.tiles(step, name, image)
        if self.writer is not None:
            pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
            self.writer.add_image(name, pixels.view(image.height, image.width, 3), step, dataformats="HWC")

    def tiles(self, step: int, name: str, image: Image.Image) -> None:
        """RUN/previews/NAME-step-N.png alone: for programs, as pictures with nothing around them."""
        if self.writer is not None:
            with new_file(self.folder / "previews" / f"{name}-step-{step:06d}.png") as partial:
                image.save(partial)

    def projector(self, step: int, prompt: Tensor, waypoints: Tensor, names: Sequence[str]) -> None:
        """The prompt of each view and its waypoints, as points in TensorBoard's projector.

        prompt: E [V, T, D]. waypoints: [S + 1, V, T, D]. names: of the waypoints.
        """
        if self.writer is None:
            return
        points = torch.cat([prompt[None], waypoints]).flatten(2).flatten(0, 1).double().cpu()  # (S + 2) V, T D
        # Of so few points, as many principal axes as there are points keep each distance; all T x D numbers would take 10 MB.
        left, lengths, _ = torch.linalg.svd(points - points.mean(dim=0), full_matrices=False)
        labels = [[name, view] for name in ("E", *names) for view in view_names(len(prompt))]
        with redirect_stdout(io.StringIO()):  # it remarks upon a step that is written again, as after a resume
            self.writer.add_embedding(
                (left * lengths).float(), metadata=labels, metadata_header=["prompt", "view"], global_step=step, tag="prompts"
            )

    def hparams(self, options: Mapping[str, Any], last: Mapping[str, float]) -> None:
        """The run's line in TensorBoard's table of hyper-parameters. options: by dotted name; last: its newest evaluation.

        The table takes numbers, booleans and texts; anything else, a list or null, is written as text.
        """
        if self.writer is None:
            return
        plain = {name: value if isinstance(value, bool | int | float | str) else str(value) for name, value in options.items()}
        metrics = {tensorboard_name(name): value for name, value in last.items() if "/" in name}
        for summary in hparams(plain, metrics):
            assert self.writer.file_writer is not None
            self.writer.file_writer.add_summary(summary)

    def text(self, name: str, markdown: str) -> None:
        """A page of text in TensorBoard."""
        if self.writer is not None:
            self.writer.add_text(name, markdown)

    def close(self) -> None:
        """Flush and close."""
        if self.writer is not None:
            self.writer.close()


def _drop_after(run: Path, step: int, *, evaluated: bool) -> list[dict[str, Any]]:
    kept = [
        point
        for point in read_series(run)
        if point["step"] < step or (point["step"] == step and (evaluated or not is_evaluation(point)))
    ]
    with new_file(run / FILE) as partial:
        partial.write_text("".join(json.dumps(point) + "\n" for point in kept), encoding="utf-8")
    return kept
