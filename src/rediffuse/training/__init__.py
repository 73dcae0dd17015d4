"""The engine: a state, a step, a loop, and what looks on. It runs with torch alone, on any machine."""
