"""The optional compiled part; everything runs without it."""
