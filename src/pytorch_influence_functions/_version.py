"""The version, in one place: the build, the result files and the tests read it here."""

__version__ = "1.0.0"
