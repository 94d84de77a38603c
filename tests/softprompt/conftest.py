"""Pipelines that the tests of the package share."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from softprompt.micro import MICRO_MODEL
from softprompt.model.loading import load_pipeline, load_unet
from softprompt.model.pipeline import Pipeline


@pytest.fixture(scope="session")
def tiny_models(tiny_folder: Path) -> Pipeline:
    """FaceLift's tiny pipeline, loaded once; nothing may change it (see `tiny`)."""
    return load_pipeline(tiny_folder)


@pytest.fixture
def tiny(tiny_models: Pipeline, tiny_folder: Path) -> Pipeline:
    """FaceLift's tiny pipeline with a UNet of the test's own."""
    return replace(tiny_models, unet=load_unet(tiny_folder / "unet"))


@pytest.fixture(scope="session")
def micro_models() -> Pipeline:
    """The packaged pipeline, loaded once; nothing may change it."""
    return load_pipeline(MICRO_MODEL)


@pytest.fixture
def micro(micro_models: Pipeline) -> Pipeline:
    """The packaged pipeline with a UNet of the test's own."""
    return replace(micro_models, unet=load_unet(MICRO_MODEL / "unet"))


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """Copies a folder, so that a test can spoil it. The originals may be read-only, a copy never is."""

    def copy(folder: Path) -> Path:
        target = tmp_path / f"copy_of_{folder.name}"
        for file in folder.rglob("*"):
            if file.is_file():
                (target / file.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target / file.relative_to(folder))
        return target

    return copy
