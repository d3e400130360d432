"""The parts of a call to the pipeline: arguments, conditioning, guidance, reverse steps and head reads."""
