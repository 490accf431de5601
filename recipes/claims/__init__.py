"""What papers say, each as a small study with tests and a verdict: files that `zoo claims` reads."""
