"""The mathematics of the evaluations: arrays, tensors, floats and generators; no configuration, no files."""
