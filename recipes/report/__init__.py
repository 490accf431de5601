"""The report of a comparison: an HTML file (`page`), CSV (`export`), figures (`static`)."""
