"""aecontrol: autonomous STEM experiments that pay for every step in dose."""

__version__ = "0.1.0"
