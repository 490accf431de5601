"""Post-training quantisation: pure functions on weights and on the inputs of calibration."""

from layers.posttraining.candidates import SearchOptions, channel_shift
from layers.posttraining.gptq import gptq, hessian, round_groups
from layers.posttraining.group_scales import CONSTRAINTS, fit_scales, group_fit
from layers.posttraining.lorc import low_rank
from layers.posttraining.real_bias import SmallFloat, formats
from layers.posttraining.search import Found, fold, search, search_rows

__all__ = [
    "CONSTRAINTS",
    "Found",
    "SearchOptions",
    "SmallFloat",
    "channel_shift",
    "fit_scales",
    "fold",
    "formats",
    "gptq",
    "group_fit",
    "hessian",
    "low_rank",
    "round_groups",
    "search",
    "search_rows",
]
