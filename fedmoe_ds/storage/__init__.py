"""Storage: files, folders, locks and caches that survive crashes and other users of one disk."""
