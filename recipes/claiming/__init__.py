"""Claims of papers: read, tried by a study, judged test by test, told on a page."""
