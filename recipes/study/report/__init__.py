"""The report of a study: sizes, matchings, tuned learning rates, controls, what it all cost."""
