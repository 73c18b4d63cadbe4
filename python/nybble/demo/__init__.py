"""The main job on a real model, out of packages that pip installs: ``nybble demo``."""
