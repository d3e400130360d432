"""Do images that are generated together show the same thing? The protocol of the multimodal VAE papers."""
