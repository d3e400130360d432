"""`mmdiff benchmark gpu`: what an accelerator does with the backbones, in a fixed time; `run` is the command."""
