"""How good images are: feature networks, distances between sets of images, and what they hide."""
