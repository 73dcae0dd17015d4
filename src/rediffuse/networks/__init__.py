"""Networks know nothing of diffusion: `network(x, label, cond)`; `label` tells the noise level."""
