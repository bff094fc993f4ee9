"""What bench.py and recipe.py measure, and what it comes to."""
