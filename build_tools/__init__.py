"""What setup.py needs for a build, and nobody afterwards."""
