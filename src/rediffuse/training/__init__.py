"""The engine: a state, a step, a loop, and what looks on; it runs with torch alone."""
