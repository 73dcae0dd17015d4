"""From images to batches: sources decode, packing resizes and writes once, batches gather."""
