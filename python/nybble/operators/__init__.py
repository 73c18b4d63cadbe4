"""The parts of `nybble.ops`, which says what they compute and is what others import."""
