"""What runs may claim: pure functions on numbers, in float64 (comparison.md, 3, 5 and 6)."""
