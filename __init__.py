"""nvvl: quantize the Nemotron Nano V2 VL family, and prove what was written."""

__version__ = "0.1.0"
