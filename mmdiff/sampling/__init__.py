"""What a call to the pipeline is made of: its arguments, conditioning, guidance, and the reading of heads."""
