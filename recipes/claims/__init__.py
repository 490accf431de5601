"""What papers say of their methods, each as a small study with tests: files that `zoo claims` reads."""
