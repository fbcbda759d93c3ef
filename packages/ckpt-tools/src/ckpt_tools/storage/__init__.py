"""Bytes on disk: files read by position, safetensors, torch's zip files, pickles read as data, atomic folders."""
