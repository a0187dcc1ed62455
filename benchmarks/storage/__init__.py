"""Formats, compressors, disks and buckets."""
