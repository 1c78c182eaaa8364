"""Where rows come from: the standard library, local files and folders, or a data set of the `datasets` library."""

from fedmoe_ds.data.sources.hub import HubSource, SavedSource, quiet_datasets
from fedmoe_ds.data.sources.local_files import FileSource, FilesSource
from fedmoe_ds.data.sources.opening import Sources, open_source, open_sources, shown
from fedmoe_ds.data.sources.source import Source, StdlibSource

__all__ = [
    "FileSource",
    "FilesSource",
    "HubSource",
    "SavedSource",
    "Source",
    "Sources",
    "StdlibSource",
    "open_source",
    "open_sources",
    "quiet_datasets",
    "shown",
]
