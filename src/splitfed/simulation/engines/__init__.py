"""The engines of a simulation: where and in which order its virtual clients run."""
