"""The version of the package, in a file that needs nothing else: the build reads it too."""

__version__ = "0.1.0"
