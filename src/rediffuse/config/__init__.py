"""Configuration: `schema` says what a run is made of, `compose` puts it together from files and flags."""
