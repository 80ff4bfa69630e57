"""Where an output is kept: a folder of a filesystem, or an object store."""
