"""Storage: files, folders, locks and caches that survive crashes and strangers on one disk."""
