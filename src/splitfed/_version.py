"""The version of the package, in a file that needs nothing else: the build reads it, and every room may."""

__version__ = "0.1.0"
