"""Default configurations, one YAML file per command."""
