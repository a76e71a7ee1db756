"""One YAML file per method."""
