"""A LoRA that was saved from a compiled or wrapped UNet is read under its own names; one that does not fit says how much."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from softprompt.errors import InputError
from softprompt.model.loading import load_pipeline
from tests.runs import run_to_end
from train.export.read import open_lora
from train.export.write import LORA_WEIGHTS
from train.options.config import Config
from train.state.run import Job


@pytest.fixture(scope="module")
def export(small: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = small(**{"train.steps": 2, "lora.learning_rate": 0.01})
    return run_to_end(config, tmp_path_factory.mktemp("run") / "run").folder / "export"


def rename(export: Path, folder: Path, change: Callable[[str], str]) -> Path:
    """A copy of an export with the tensors of its LoRA under other names."""
    shutil.copytree(export, folder)
    file = folder / "lora" / LORA_WEIGHTS
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    save_file({change(name): weight for name, weight in load_file(file).items()}, file, metadata=metadata)
    return folder


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
@pytest.mark.parametrize("inside", [True, False])
def test_a_wrapper_s_prefix_is_taken_off_and_said(
    export: Path,
    smallest_model: Path,
    make_job: Callable[..., Job],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    prefix: str,
    inside: bool,
) -> None:
    wrapped = rename(export, tmp_path / "e", lambda n: n.replace("unet.", f"unet.{prefix}", 1) if inside else prefix + n)
    pipeline = load_pipeline(smallest_model)
    expected = open_lora(pipeline, export, torch.float32).unet.state_dict()
    with pytest.warns(UserWarning, match=r"named as .*saved compiled, or under DDP"):
        found = open_lora(pipeline, wrapped, torch.float32).unet.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], weight) for name, weight in expected.items())
    job = make_job(init_from=str(wrapped))
    assert "WARNING" in (printed := capsys.readouterr().err) and "named as " in printed
    assert any("weights    " in note and "taken off" in note for note in job.notes)
    begun = job.pipeline.unet.state_dict()
    assert all(torch.equal(begun[name], weight) for name, weight in expected.items() if ".lora_" in name)


def test_how_much_of_a_lora_fits_is_said(
    export: Path, smallest_model: Path, make_job: Callable[..., Job], tmp_path: Path
) -> None:
    names = sorted(load_file(export / "lora" / LORA_WEIGHTS))[:4]
    other = rename(export, tmp_path / "e", lambda n: n.replace(".lora_A.", ".far.lora_A.") if n in names else n)
    moved = [name for name in names if ".lora_A." in name]
    with pytest.raises(InputError, match=rf"{len(moved)} of its \d+ tensors have no place in .*, e\.g\. .*\.far\.lora_A"):
        open_lora(load_pipeline(smallest_model), other, torch.float32)
    with pytest.raises(InputError, match=r"is not this configuration's LoRA: of its tensors \d+ of \d+ fit, .* are missing \("):
        make_job(init_from=str(other))
