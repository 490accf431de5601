"""What papers say, each as a small study with tests and a verdict; `zoo claims` reads these."""
