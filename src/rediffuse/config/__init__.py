"""Configuration: `schema` says what a run is made of, `compose` puts one together."""
