"""The configuration files, packaged as ``mucs_cli.conf``."""
