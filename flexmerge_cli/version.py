"""The one place that knows the version; read by the package metadata and by every file that flexmerge writes."""

VERSION = "0.1.0"
GENERATOR = f"flexmerge {VERSION}"
