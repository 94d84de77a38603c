"""Metrics of the prompt itself: norms, drift, similarity of the views."""

import torch
import torch.nn.functional as F

from softprompt.objectives.losses import separation_ratios
from softprompt.prompt.similarity import closest_pair, mean_pairwise_cosine, prompt_cosines
from softprompt.prompt.soft_prompt import SoftPrompt, point_on_path
from softprompt.prompt.templates import view_names


@torch.no_grad()
def prompt_series(prompt: SoftPrompt, position: float) -> dict[str, float]:
    """Where E(position) is: norms, drift from W_0, nearness to each waypoint, how alike the views are."""
    effective = prompt(position)
    names = view_names(len(effective))
    norms = effective.norm(dim=-1)  # V T
    to_path = norms / point_on_path(prompt.waypoints, position, prompt.interpolation).norm(dim=-1).clamp(min=1e-12)
    drift = (effective - prompt.start).norm(dim=(1, 2)) / prompt.start.norm(dim=(1, 2))
    series = {
        "prompt_norm/mean": float(norms.mean()),
        "prompt_norm/min": float(norms.min()),
        "prompt_norm/max": float(norms.max()),
        "prompt_norm/least_to_path": float(to_path.min()),
        "prompt_norm/most_to_path": float(to_path.max()),
        "prompt_views_alike/mean_cosine": mean_pairwise_cosine(effective),
        "prompt_views_alike/closest_pair": closest_pair(effective, names)[2],
        "prompt_views_alike/closest_ratio": float(separation_ratios(effective, prompt.start).min()),
    }
    if "front_right" in names:
        cosines = prompt_cosines(effective)
        series["prompt_views_alike/front_right_front_left"] = float(cosines[1, 5])
    series |= {f"prompt_drift_from_start/{name}": float(d) for name, d in zip(names, drift, strict=True)}
    for i, waypoint in enumerate(prompt.waypoints):
        cosine = F.cosine_similarity(effective.flatten(1), waypoint.flatten(1), dim=-1)
        series |= {f"prompt_cosine_to_waypoint_{i}/{name}": float(c) for name, c in zip(names, cosine, strict=True)}
    return series
