"""Pure functions on arrays: the recurrences behind every cell. No Flax here."""
