"""What a run learned, written, read back, and put to use."""
