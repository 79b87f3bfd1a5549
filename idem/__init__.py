"""The vocabulary of Idem: table schemas, types, configuration, manifests, metrics and storage; a leaf of the imports."""

__version__ = "0.1.0"
