"""Networks know nothing of diffusion: `network(x, label, cond)`, where `label` tells the noise level."""
