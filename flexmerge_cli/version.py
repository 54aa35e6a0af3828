"""Holds the version, which the package metadata and every file that flexmerge writes read from here."""

VERSION = "0.1.0"
GENERATOR = f"flexmerge {VERSION}"
