"""Identifies the files beside a model's weights that a score depends on."""

from pathlib import Path

import xxhash

from flexmerge_cli.checkpoint.digest import digest_bytes

# Beginnings of their names: config, processor, tokenizer.
SIDE_FILES = (
    "config.json", "generation_config", "preprocessor_config", "processor_config", "tokenizer", "vocab", "merges",
    "special_tokens", "added_tokens", "spiece", "sentencepiece", "chat_template", "templates.json",
)  # fmt: skip


def side_digest(folder: Path) -> str:
    """Compute the digest of the files that describe the weights, or how inputs become tokens or pixels."""
    files = sorted(path for path in folder.iterdir() if path.name.startswith(SIDE_FILES) and path.is_file())
    return xxhash.xxh3_128_hexdigest("\n".join(f"{p.name} {digest_bytes(p.read_bytes())}" for p in files).encode())
