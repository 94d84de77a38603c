"""From a configuration to the objectives of its run."""

from softprompt.model.pipeline import Pipeline
from train.objectives.custom import Custom
from train.objectives.dpo import make_dpo
from train.objectives.draft import Draft
from train.objectives.functions import load_function
from train.objectives.rewards import load_reward
from train.objectives.separate import make_separate
from train.objectives.spin import Spin
from train.objectives.studio import make_studio
from train.objectives.terms import Objectives, Term
from train.options.config import Config


def make_objectives(config: Config, pipeline: Pipeline) -> Objectives:
    """Those that the configuration gives a weight, or measures. Raises: InputError for one that cannot work with this model."""
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
        terms.append(make_separate(config.separate, pipeline))
    if config.uses("custom"):
        assert config.custom.function is not None, "checked when the configuration is read"
        terms.append(
            Custom(config.custom.weight, load_function(config.custom.function, "custom.function"), config.custom.function)
        )
    return Objectives(terms)
