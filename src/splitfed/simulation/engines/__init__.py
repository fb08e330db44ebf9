"""The engines of a simulation: where its virtual clients run."""
