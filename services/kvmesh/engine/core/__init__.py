"""Batches, blocks, rooms: what all engines of ours share."""
