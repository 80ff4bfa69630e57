"""Where an output is kept: in a folder of a filesystem, or in an object store."""
