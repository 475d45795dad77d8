"""cryorecon: ab initio cryo-EM maps from RELION particle stacks."""

__version__ = "0.1.0"
