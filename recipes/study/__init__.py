"""A study: variants at their own learning rates, over sizes and matchings, with seeds enough."""
