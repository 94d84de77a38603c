"""The comparisons that are shipped, and variants that could not be compared."""

from pathlib import Path

import pytest

from softprompt.errors import InputError
from train.compare.__main__ import read_request
from train.compare.plan import Comparison, make_plan

REPOSITORY = Path(__file__).parents[3]


@pytest.mark.parametrize(
    "file",
    [f for f in sorted((REPOSITORY / "configs" / "compare").glob("*.yaml")) if not f.stem.startswith("micro_")],
    ids=lambda f: f.stem,
)
def test_every_shipped_comparison_can_be_run(file, tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    request = read_request(["--config", str(file), "--output", str(tmp_path)])
    plan = make_plan(request.comparison, tmp_path)
    assert request.name == file.stem and not plan.warnings
    assert len(plan.runs()) == len(request.comparison.variants) * len(request.comparison.seeds)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prompt.learn": True, "prompt": {"learn": False}}, r"prompt\.learn is there twice, dotted and under prompt"),
        ({"data.reference_view": []}, r"variant learned: .*data\.reference_view: is \[\]"),
        ({"prompt.waypoints": ["realistic", "facelift"]}, r"prompt\.waypoints \(the first: what the untouched model is\)"),
        ({"monitor.validate_every": 7}, r"monitor\.validate_every is 7 in learned"),
    ],
)
def test_variants_that_would_be_measured_otherwise_are_refused(tmp_path, options, said):
    comparison = Comparison(baseline="plain", variants={"plain": {}, "learned": options})
    with pytest.raises(InputError, match=said):
        make_plan(comparison, tmp_path)
