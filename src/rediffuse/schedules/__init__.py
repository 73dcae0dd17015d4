"""Schedules: one clock each, t -> (α, σ). `schedule=NAME` finds them by module and function."""
