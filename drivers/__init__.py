"""How a microscope is reached: simulated, recorded, and what every driver must pass."""
